# A local Ray cluster of this project's own, on loopback; to be sourced after environment.sh.
#
# Other Rays may run on the machine, so nothing here calls `ray stop`, which would end them all:
# every process that is started carries NANOCHAT_CLUSTER in its environment, and those alone are
# ended.

local_state() {  # PORT: where this cluster keeps its addresses, its token and its logs
  PORT="$1"
  case "$PORT" in ''|*[!0-9]*) fail "port=$PORT is not allowed: a number from 1 to 65535" ;; esac
  STATE="${XDG_STATE_HOME:-$HOME/.local/state}/nanochat_ray/$PORT"
  LOGS="$STATE/logs"
  export NANOCHAT_CLUSTER="nanochat_ray-$PORT"
}

local_processes() {  # prints the ids of the cluster's processes
  "$VENV/bin/python" - "$NANOCHAT_CLUSTER" <<'PY'
import os, sys
import psutil

keep = {p.pid for p in psutil.Process().parents()} | {os.getpid()}
for process in psutil.process_iter():
    try:
        if process.pid not in keep and process.environ().get("NANOCHAT_CLUSTER") == sys.argv[1]:
            print(process.pid)
    except psutil.Error:
        continue
PY
}

free_ports() {  # N: prints N free ports of the loopback interface
  "$VENV/bin/python" - "$1" <<'PY'
import socket, sys

taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in taken))
PY
}

local_alive() {  # true if the cluster answers
  [ -f "$STATE/address" ] || return 1
  . "$STATE/address"
  "$VENV/bin/python" - "$RAY_API_SERVER_ADDRESS" <<'PY' 2>/dev/null
import os, sys, urllib.request

token = {"Authorization": "Bearer " + os.environ.get("RAY_AUTH_TOKEN", "")}
request = urllib.request.Request(sys.argv[1] + "/api/version", headers=token)
urllib.request.urlopen(request, timeout=5).read()
PY
}

local_start() {  # GPUS: a Ray head on loopback, unless it runs already
  if local_alive; then say "Ray is up at $RAY_API_SERVER_ADDRESS"; return; fi
  local_stop quietly
  mkdir -p "$LOGS"
  local gcs dashboard agent metrics client cores
  read -r gcs dashboard agent metrics client <<<"$(free_ports 5)"
  cores="$("$VENV/bin/python" -c 'import os; print(max(8, os.cpu_count() or 1))')"
  # The dashboard binds loopback, but Ray's other ports bind every interface: a token guards them.
  (umask 077; cat >"$STATE/address" <<ADDRESS
export RAY_ADDRESS=127.0.0.1:$gcs
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:$dashboard
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=$("$VENV/bin/python" -c 'import secrets; print(secrets.token_hex(32))')
ADDRESS
  )
  . "$STATE/address"
  say "starting Ray (log: $LOGS/ray.log, dashboard: $RAY_API_SERVER_ADDRESS)"
  # More logical CPUs than cores: the tasks of Ray Data must find a place beside the workers.
  (unset RAY_ADDRESS; ray start --head --node-ip-address=127.0.0.1 --port="$gcs" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" \
    --dashboard-agent-listen-port="$agent" --metrics-export-port="$metrics" \
    --ray-client-server-port="$client" --num-cpus="$cores" ${1:+--num-gpus="$1"} \
    --object-store-memory="${NANOCHAT_OBJECT_STORE:-500000000}" --disable-usage-stats) \
    >"$LOGS/ray.log" 2>&1 </dev/null || { tail -n 20 "$LOGS/ray.log" >&2; fail "Ray did not start"; }
}

local_stop() {  # ends the cluster's processes and waits until they are gone
  local pids round signal=TERM
  pids="$(local_processes)"
  if [ -z "$pids" ]; then
    [ "${1:-}" = quietly ] || say "nothing runs for port $PORT"
    return 0
  fi
  [ "${1:-}" = quietly ] || say "stopping $(wc -w <<<"$pids") processes of port $PORT"
  for round in $(seq 20); do
    kill -"$signal" $pids 2>/dev/null || true
    sleep 0.5
    pids="$(local_processes)"
    [ -n "$pids" ] || return 0
    [ "$round" -lt 10 ] || signal=KILL
  done
  fail "these processes would not end: $pids"
}
