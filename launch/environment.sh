# Sourced by quickstart.sh and test.sh: makes .venv with the tested set of packages, once, and enters it.
# shellcheck shell=bash

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

fail() {
  echo "sdft_ds: $*" >&2
  exit 1
}

make_environment() {
  local extras=$1 stamp
  command -v "$PYTHON" >/dev/null || fail "no $PYTHON found: install Python 3.11 or newer, or set PYTHON."
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one."
  if [ ! -x "$VENV/bin/python" ]; then
    echo "Making $VENV ..."
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON -m venv failed: install the venv module (Debian: python3-venv)."
  fi
  # DeepSpeed builds operators with ninja, found on PATH; a cache of their own keeps other environments' ninja away.
  PATH="$PWD/$VENV/bin:$PATH"
  export PATH TORCH_EXTENSIONS_DIR="$PWD/$VENV/torch_extensions"
  stamp="$VENV/installed-$(cat sdft_ds/constraints.txt pyproject.toml launch/environment.sh | cksum | tr ' ' -)-${extras:-none}"
  if [ ! -e "$stamp" ]; then
    echo "Installing the tested packages into $VENV (several minutes the first time) ..."
    python -m pip install --quiet --constraint sdft_ds/constraints.txt --editable ".${extras:+[$extras]}" ||
      fail "pip could not install the packages; its message is above."
    touch "$stamp"
  fi
}
