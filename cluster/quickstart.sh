#!/usr/bin/env bash
# From raw text to a chat answer over HTTP, on Ray, with one command.
#
#   bash cluster/quickstart.sh [options]
#
#   --text URI...    files, folders, globs, s3:// or hf:// to train on
#                    (default: the documentation that is on this machine)
#   --storage URI    where data and checkpoints are kept: a folder, s3://, gs://
#   --depth D        layers of the model; all else follows from it (default 4)
#   --gpus N         train on N GPUs (default 0: two workers on the CPU)
#   --minutes M      about how long the base model is trained on a CPU (default: as long as all
#                    of this ends within 12 minutes on this machine, 5.2 at most)
#   --port P         of the HTTP endpoint (default 8000)
#   --stay | --leave wait for Ctrl-C at the end, or leave the endpoint up and return
#                    (default: wait if a person is at the terminal)
#
# Run it again and it goes on where it was: what is done is not done twice.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
. "$(dirname "${BASH_SOURCE[0]}")/local.sh"

BEGAN=$SECONDS
TEXT=() STORAGE="" DEPTH=4 GPUS=0 MINUTES="" PORT=8000 STAY=""
while [ $# -gt 0 ]; do
  case "$1" in
    --text)
      shift
      while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do
        case "$1" in *://*|/*) TEXT+=("$1") ;; *) TEXT+=("$PWD/$1") ;; esac
        shift
      done
      [ ${#TEXT[@]} -gt 0 ] || fail "--text needs at least one file, folder, glob or URI" ;;
    --storage|--depth|--gpus|--minutes|--port)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case "$1" in
        --storage) STORAGE="$2" ;; --depth) DEPTH="$2" ;; --gpus) GPUS="$2" ;;
        --minutes) MINUTES="$2" ;; --port) PORT="$2" ;;
      esac
      shift 2 ;;
    --stay) STAY=1; shift ;;
    --leave) STAY=0; shift ;;
    -h|--help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument $1; see --help" ;;
  esac
done
for pair in "depth=$DEPTH" "gpus=$GPUS" "port=$PORT"; do
  case "${pair#*=}" in ''|*[!0-9]*) fail "--${pair%%=*} must be a whole number, not '${pair#*=}'" ;; esac
done
if [ -n "$MINUTES" ]; then
  [[ "$MINUTES" =~ ^[0-9]*\.?[0-9]+$ && "$MINUTES" =~ [1-9] ]] \
    || fail "--minutes must be a number above 0, not '$MINUTES'"
  [ "$GPUS" -eq 0 ] || fail "--minutes bounds training on a CPU; it does not go with --gpus"
fi
[ "$DEPTH" -ge 1 ] || fail "--depth must be 1 or more"
[ -n "$STAY" ] || { [ -t 0 ] && [ -t 1 ] && STAY=1 || STAY=0; }
case "$STORAGE" in ''|/*|*://*) ;; *) STORAGE="$PWD/$STORAGE" ;; esac

EXTRAS=tasks
case " ${TEXT[*]-} " in *" hf://"*) EXTRAS=tasks,hub ;; esac
environment "$EXTRAS"
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
[ -n "$STORAGE" ] || STORAGE="$(python -c 'from nanochat_ray.storage import default_root as d; print(d())')"
local_state "$PORT"
mkdir -p "$LOGS"
# What this call has started ends with it, unless it comes to its end; an endpoint that was up
# before stays up.
STARTED=""
finish() {
  local code=$?
  trap - EXIT
  if [ "$code" -ne 0 ] && [ -n "$STARTED" ]; then local_stop; fi
  exit "$code"
}
trap finish EXIT
trap 'echo; exit 130' INT
trap 'exit 143' TERM

text_state() {  # what --text names now, with the files in folders, so that one that is new is noticed
  python - "${TEXT[@]}" <<'PY'
import sys
from nanochat_ray.data import sources

for name in sys.argv[1:]:
    print(name)
    if "://" not in name:
        try:
            for source in sources.find([name]):
                print(source.uri, source.size, source.mtime_ns)
        except (ValueError, OSError):  # the first stage says what is wrong with it
            pass
PY
}

# Other text, another depth or other minutes are another run, with a name of its own.
TAG="d$DEPTH"
[ -z "$MINUTES" ] || TAG="$TAG-${MINUTES}m"
[ ${#TEXT[@]} -eq 0 ] || TAG="$TAG-$(text_state | cksum | cut -d' ' -f1)"
BASE="base-$TAG" CHAT="chat-$TAG"
if [ "$GPUS" -gt 0 ]; then
  PREPARE=(--vocab-size 32768 --sequence-len 2048) TRAIN=(--workers "$GPUS" --gpus) BOUND=()
  SERVE=(--gpus 1) EVAL=(--device cuda --engine.precision bf16)
else
  # A few minutes instead of the compute-optimal hours: this is a first look.
  # How many tokens that is on this machine is measured when training begins.
  PREPARE=() TRAIN=(--workers 2) SERVE=() EVAL=()
  SFT_MINUTES="$(python -c 'import sys; print(max(2, float(sys.argv[1] or 0) / 2))' "$MINUTES")"
  BOUND=(--cpu-minutes "$SFT_MINUTES")
fi

job() {  # NAME COMMAND...: one Ray job, what it prints here, and all of it in its log
  local name="$1"; shift
  local log="$LOGS/$name.log" code
  # Ray's own notices stay in the log; the mark of the process is taken off our workers' lines.
  set +e
  ray job submit --log-style=record --log-color=false -- "$@" 2>&1 | tee "$log" \
    | sed -u -E 's/\x1b\[[0-9;]*m//g; /^[0-9]{4}-[0-9-]+ [0-9:,]+[[:space:]]+(INFO|SUCC|WARN)/d
                 s/^\(RayTrainWorker [^)]*\) (step [0-9])/\1/; /^\([A-Za-z_:]+ [^)]*(pid|ip)=/d
                 /^(INFO|WARNING) [0-9-]+ /d
                 /^(Tailing logs|Job submission|Running entrypoint|[- ]*$)/d'
  code="${PIPESTATUS[0]}"
  set -e
  [ "$code" -eq 0 ] || { say "$name failed; its log is $log"; exit "$code"; }
}

done_run() {  # NAME: true if that run has reached its last step
  python - "$STORAGE" "$1" <<'PY'
import sys
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.storage import Store

run = Store.at(sys.argv[1]).child("runs", sys.argv[2])
name = checkpoint.latest(run)
if name is None:
    sys.exit(1)
trainer = checkpoint.load_trainer(run, name)
sys.exit(trainer["step"] < trainer["train_config"]["steps"])
PY
}

base_minutes() {  # SECONDS: minutes of training, where preparing the text has taken so long
  python - "$STORAGE" "$BASE" "${MINUTES:-0}" "$1" "$((SECONDS - BEGAN))" "$SFT_MINUTES" \
    "${#TEXT[@]}" <<'PY'
import json, sys
from nanochat_ray.storage import Store
from nanochat_ray.train.speed import PLAN

storage, base, minutes, prepared, spent, sft, texts = sys.argv[1:]
run = Store.at(storage).child("runs", base)
try:  # a run that was begun keeps its plan
    planned = json.loads(run.read_text(PLAN))["plan"]["cpu_minutes"]
except (OSError, ValueError, KeyError, TypeError):
    planned = 0
# What else there is to do takes 6 times as long as preparing the text, on a fast and on a slow
# machine. The promise is 12 minutes; texts of one's own may be of any size.
left = 690 - int(spent) - 60 * float(sft) - 6 * int(prepared)
default = 5.2 if texts != "0" else round(min(5.2, max(1, left / 60)), 1)
print(planned or float(minutes) or default)
PY
}

measure() {
  [ ! -f "$LOGS/eval-$CHAT.log" ] || return 0
  say "measuring on fresh questions (log: $LOGS/eval-$CHAT.log)"
  job "eval-$CHAT" python "$REPO/jobs/eval.py" --storage "$STORAGE" --run "$CHAT" --count 200 \
    "${EVAL[@]}"
}

local_alive || STARTED=1
local_start "$GPUS"
if ! done_run "$CHAT"; then
  if ! done_run "$BASE"; then
    say "1/5 preparing the text (log: $LOGS/prepare-base.log)"
    preparing=$SECONDS
    job prepare-base python "$REPO/jobs/prepare.py" --stage base --storage "$STORAGE" \
      --dataset "$BASE" "${PREPARE[@]}" ${TEXT[@]+--text "${TEXT[@]}"}
    if [ "$GPUS" -eq 0 ]; then
      minutes="$(base_minutes $((SECONDS - preparing)))"
      say "2/5 training the base model for $minutes minutes (log: $LOGS/train-base.log)"
      bound=(--cpu-minutes "$minutes")
    else
      say "2/5 training the base model (log: $LOGS/train-base.log)"
      bound=()
    fi
    job train-base python "$REPO/jobs/train.py" --stage base --storage "$STORAGE" \
      --dataset "$BASE" --run "$BASE" --depth "$DEPTH" "${TRAIN[@]}" "${bound[@]}"
  fi
  say "3/5 preparing conversations (log: $LOGS/prepare-sft.log)"
  job prepare-sft python "$REPO/jobs/prepare.py" --stage sft --storage "$STORAGE" \
    --dataset "$CHAT" --tokenizer "$BASE"
  say "4/5 fine-tuning to chat (log: $LOGS/train-sft.log)"
  job train-sft python "$REPO/jobs/train.py" --stage sft --storage "$STORAGE" \
    --dataset "$CHAT" --run "$CHAT" --parent "$BASE" "${TRAIN[@]}" "${BOUND[@]}"
  rm -f "$LOGS/eval-$CHAT.log"  # of other weights
else
  say "1–4/5 run $CHAT is trained already"
fi
[ "$GPUS" -eq 0 ] || measure  # before the endpoint takes the GPU's memory
say "5/5 serving (log: $LOGS/serve.log)"
job serve python "$REPO/jobs/serve.py" --storage "$STORAGE" --run "$CHAT" --name "$CHAT" \
  --port "$PORT" --no-block "${SERVE[@]}"
URL="http://127.0.0.1:$PORT"
say "asking"
for question in "Who are you?" "What is 47 + 38 - 9?"; do
  printf '\n> %s\n' "$question"
  python "$REPO/jobs/chat.py" --url "$URL" --once "$question"
done
echo
[ "$GPUS" -gt 0 ] || measure
say "done in $(((SECONDS - BEGAN) / 60)):$(printf %02d $(((SECONDS - BEGAN) % 60))); the chat page: $URL"
echo "OpenAI clients: base_url=$URL/v1, model=$CHAT. Stop all of it: bash cluster/stop.sh --port $PORT"
if [ "$STAY" = 1 ]; then
  say "Ctrl-C stops it"
  while local_alive; do sleep 5; done
  fail "Ray has ended by itself; see $LOGS"
fi
