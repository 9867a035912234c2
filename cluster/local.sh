# A local Ray cluster of this project's own, closed by a token; to be sourced after environment.sh.
#
# Other Rays may run on the machine, so nothing here calls `ray stop`, which ends all of them. Every
# process of this cluster has NANOCHAT_CLUSTER in its environment, and only those are ended.

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
import random, socket, sys

# Below the ports of outgoing connections and the blocks of Ray Serve (nanochat_ray/on_ray/ports.py),
# above the ports of Ray's workers: a port that is free here stays free until Ray binds it.
sockets = []
for port in random.sample(range(20100, 23000), 2000):
    try:
        sockets.append(socket.create_server(("", port)))
    except OSError:
        continue
    if len(sockets) == int(sys.argv[1]):
        break
print(*(s.getsockname()[1] for s in sockets))
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
  mkdir -p "$LOGS"
  local try
  for try in 1 2 3; do
    local_stop quietly
    local_address
    . "$STATE/address"
    say "starting Ray (log: $LOGS/ray.log, dashboard: $RAY_API_SERVER_ADDRESS)"
    if local_head "$1" >"$LOGS/ray.log" 2>&1 </dev/null; then return; fi
    say "Ray did not start at try $try of 3"
  done
  tail -n 20 "$LOGS/ray.log" >&2
  fail "Ray did not start; its log is $LOGS/ray.log"
}

local_address() {  # chooses ports and a token, and writes them to a file
  local ports token serve
  read -r -a ports <<<"$(free_ports 5)"
  # Two clusters on one host must not answer each other's requests.
  serve="$("$VENV/bin/python" -m nanochat_ray.on_ray.ports)"
  token="$("$VENV/bin/python" -c 'import secrets; print(secrets.token_hex(32))')"
  # The dashboard binds loopback, but Ray's other ports bind every interface: a token guards them.
  (umask 077; cat >"$STATE/address" <<ADDRESS
export RAY_ADDRESS=127.0.0.1:${ports[0]}
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:${ports[1]}
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN=$token
$serve
RAY_PORTS=(--port=${ports[0]} --dashboard-port=${ports[1]} --ray-client-server-port=${ports[2]}
  --metrics-export-port=${ports[3]} --dashboard-agent-listen-port=${ports[4]})
ADDRESS
  )
}

local_head() (  # GPUS
  unset RAY_ADDRESS
  # Ray gives a job the address of the latest cluster of the machine, so this cluster passes its own
  # (on_ray/session.py).
  export NANOCHAT_RAY_ADDRESS="127.0.0.1:${RAY_PORTS[0]#--port=}"
  # HAProxy before the ingresses: Serve's own proxy costs more than the model (on_ray/BENCHMARKS.md).
  export RAY_SERVE_ENABLE_HA_PROXY="${RAY_SERVE_ENABLE_HA_PROXY:-1}" RAY_SERVE_HAPROXY_NBTHREAD=1
  export RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1
  # More logical CPUs than cores, so that tasks of Ray Data run beside the workers.
  cores="$("$VENV/bin/python" -c 'import os; print(max(8, os.cpu_count() or 1))')"
  ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 "${RAY_PORTS[@]}" \
    --num-cpus="$cores" --num-gpus="$1" --disable-usage-stats \
    --object-store-memory="${NANOCHAT_OBJECT_STORE:-500000000}"
)

local_clear() {  # removes HAProxy's files of the cluster that has ended
  [ -f "$STATE/address" ] || return 0
  (
    . "$STATE/address"
    case "${RAY_SERVE_HAPROXY_SERVER_STATE_BASE:-}" in
      */nanochat-*) rm -rf "$RAY_SERVE_HAPROXY_SERVER_STATE_BASE" ;;
    esac
  )
}

local_stop() {  # ends the cluster's processes and waits until they are gone
  local pids round signal=TERM
  pids="$(local_processes)"
  if [ -z "$pids" ]; then
    [ "${1:-}" = quietly ] || say "nothing runs for port $PORT"
    local_clear
    return 0
  fi
  [ "${1:-}" = quietly ] || say "stopping $(wc -w <<<"$pids") processes of port $PORT"
  for round in $(seq 20); do
    kill -"$signal" $pids 2>/dev/null || true
    sleep 0.5
    pids="$(local_processes)"
    if [ -z "$pids" ]; then local_clear; return 0; fi
    [ "$round" -lt 10 ] || signal=KILL
  done
  fail "these processes would not end: $pids"
}
