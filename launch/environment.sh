# Sourced by quickstart.sh, test.sh and vllm_environment.sh: makes $VENV with the tested packages, once, and enters it.
# shellcheck shell=bash

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

fail() {
  echo "sdft_ds: $*" >&2
  exit 1
}

enter_environment() {
  command -v "$PYTHON" >/dev/null || fail "no $PYTHON found: install Python 3.11 or newer, or set PYTHON."
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$PYTHON" --version) is too old: Python 3.11 or newer is needed; set PYTHON to one."
  if [ ! -x "$VENV/bin/python" ]; then
    echo "Making $VENV ..."
    "$PYTHON" -m venv "$VENV" || fail "$PYTHON -m venv failed: install the venv module (Debian: python3-venv)."
  fi
  VENV=$(realpath "$VENV")
  # DeepSpeed builds operators with ninja, found on PATH; a cache of their own keeps other environments' ninja away.
  PATH="$VENV/bin:$PATH"
  export PATH TORCH_EXTENSIONS_DIR="$VENV/torch_extensions"
}

# install_project EXTRAS CONSTRAINTS [HINT, added to the message if it fails]
install_project() {
  local extras=$1 constraints=$2 hint=${3:-} stamp
  stamp="$VENV/installed-$(cat "$constraints" pyproject.toml launch/environment.sh | cksum | tr ' ' -)-${extras:-none}"
  if [ ! -e "$stamp" ]; then
    echo "Installing the tested packages into $VENV (several minutes the first time) ..."
    python -m pip install --quiet --constraint "$constraints" --editable ".${extras:+[$extras]}" ||
      fail "pip could not install the packages; its message is above$hint."
    touch "$stamp"
  fi
}

make_environment() {
  enter_environment
  install_project "$1" sdft_ds/constraints.txt
}
