#!/usr/bin/env bash
# Ends what cluster/quickstart.sh started on a port (default 8000), and nothing else.
#
#   bash cluster/stop.sh [--port P]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
. "$(dirname "${BASH_SOURCE[0]}")/local.sh"
PORT=8000
while [ $# -gt 0 ]; do
  case "$1" in
    --port) [ $# -ge 2 ] || fail "--port needs a number"; PORT="$2"; shift 2 ;;
    *) fail "unknown argument $1; there is --port" ;;
  esac
done
local_state "$PORT"
local_stop
