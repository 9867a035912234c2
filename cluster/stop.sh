#!/usr/bin/env bash
# Ends what cluster/quickstart.sh started on a port (default 8000), and nothing else.
#
#   bash cluster/stop.sh [--port P]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$VENV/bin/python" -m nanochat_ray stop "$@"
