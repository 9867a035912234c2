#!/usr/bin/env bash
# From raw text to a chat answer over HTTP, on Ray, with one command.
#
#   bash cluster/quickstart.sh [flags of "nanochat-ray quickstart"]
#
# Makes the environment in .venv, then runs "nanochat-ray quickstart" in it; --help lists the flags.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

EXTRAS=""
case " $* " in *hf://*) EXTRAS=hub ;; esac
environment "$EXTRAS"
exec "$VENV/bin/python" -m nanochat_ray quickstart "$@"
