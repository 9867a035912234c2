#!/usr/bin/env bash
# Checks everything: format, lint, types, import contracts, tests. The same by hand and in CI.
#
#   bash cluster/check.sh [pytest arguments]
#   bash cluster/check.sh -n 2 -m "not ray and not browser and not slow"    # the quick round
#   COVERAGE=1 bash cluster/check.sh   # with coverage, which takes twice as long without Ray
#   bash cluster/check.sh --cluster    # the tests on several nodes, in network namespaces: as root
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPO"
environment dev
export PATH="$VENV/bin:$PATH" VIRTUAL_ENV="$VENV"
# Spinning OpenMP threads on shared cores cost more than they give.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive RAY_AUTH_MODE=disabled RAY_USAGE_STATS_ENABLED=0
# Many processes import the same files: without bytecode each compiles them again.
unset PYTHONDONTWRITEBYTECODE

compiler="${CC:-cc}"
command -v "${compiler%% *}" >/dev/null || say "no C compiler (cc): tests of the compiled kernels are skipped"
# The chat page is tested in a real browser, alert rules with promtool; both are installed from the
# system's packages if they can be.
for program in chromium:chromium promtool:prometheus; do
  if ! command -v "${program%:*}" >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing ${program#*:}"
    { apt-get update && apt-get install -y --no-install-recommends "${program#*:}"; } \
      >"$VENV/${program#*:}.log" 2>&1 || say "${program#*:} is not available: its tests are skipped"
  fi
done

say "format and lint"
ruff format --check .
ruff check .
find cluster jobs nanochat_ray tests -name "*.py" -print0 | xargs -0 python cluster/lint.py
say "types"
mypy
say "import contracts"
lint-imports --no-cache
if [ "${1:-}" = --cluster ]; then
  say "tests on several nodes"
  exec pytest -ra --durations=12 -m cluster "${@:2}"
fi
if [ $# -gt 0 ]; then
  say "tests"
  exec pytest "$@"
fi
say "kernels for this $(uname -m): $(python -m nanochat_ray.engine.kernels)"
# A Ray and a browser keep two cores busy by themselves.
status=0
say "tests without Ray and browser"
coverage=()
[ -z "${COVERAGE:-}" ] || coverage=(--cov --cov-report=term)
# The engine also as other CPUs will run it: at each level of the kernels, and with torch alone.
pytest -n 2 --all-kernels --durations=12 "${coverage[@]}" -m "not ray and not browser" || status=1
say "tests with Ray or a browser"
pytest --durations=12 -m "ray or browser" || status=1
exit "$status"
