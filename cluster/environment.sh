# Makes the virtual environment that the scripts of this folder share; to be sourced.
#
#   environment EXTRAS   installs the project with these extras, unless that was done before
#
# NANOCHAT_VENV names another folder than .venv; PYTHON another interpreter.

# With CDPATH cd may go elsewhere, and prints where it went.
unset CDPATH
REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${NANOCHAT_VENV:-$REPO/.venv}"

say() { printf '\033[1m[%s] %s\033[0m\n' "$(date +%H:%M:%S)" "$*"; }
fail() { printf 'error: %s\n' "$*" >&2; exit 2; }

find_python() {
  local name
  for name in "${PYTHON:-}" python3.11 python3.12 python3; do
    [ -n "$name" ] && command -v "$name" >/dev/null || continue
    if "$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))'; then
      command -v "$name"; return
    fi
  done
  fail "Python 3.11 or 3.12 is needed; PYTHON=/path/to/python names one"
}

environment() {
  local extras="$1" stamp="$VENV/.installed-${1:-base}" log="$VENV/install.log" python
  # Ray starts its workers by a line for a shell that does not quote the interpreter.
  case "$VENV" in *[[:space:]]*)
    fail "Ray starts no worker from a folder with blanks: NANOCHAT_VENV names one without, not $VENV" ;;
  esac
  if [ -f "$stamp" ] && cmp -s "$stamp" "$REPO/pyproject.toml"; then return; fi
  say "making the environment in $VENV (log: $log)"
  # Without Debian's package python3-venv the first try leaves an environment that has no pip.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || {
    python="$(find_python)"
    "$python" -m venv "$VENV"
  }
  # torch first and by its exact version, so that an index with a CPU build can provide it.
  local torch
  torch="$(sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' "$REPO/pyproject.toml")"
  if ! { "$VENV/bin/python" -m pip install "$torch" &&
         "$VENV/bin/python" -m pip install -e "$REPO${extras:+[$extras]}"; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    fail "the installation failed; its log is $log"
  fi
  cp "$REPO/pyproject.toml" "$stamp"
}
