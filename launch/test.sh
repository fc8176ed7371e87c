#!/usr/bin/env bash
# Lint, then all fast tests, in the same environment as quickstart.sh, and those of vLLM in an environment of its own
# (VLLM=no leaves them out); --full adds the slow ones. Other arguments go to pytest, and leave out those of vLLM. As root on Debian it installs shellcheck and, with --full, what the tests on a SLURM cluster and in a browser
# need; elsewhere they are skipped where it is missing. SYSTEM_PACKAGES=no leaves the system alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh

system_packages() {
  local packages=(shellcheck)
  case " $* " in
    *" --full "*)
      packages+=(slurmctld slurmd slurm-client munge openssh-server openssh-client pdsh iproute2 procps chromium) ;;
  esac
  if [ "${SYSTEM_PACKAGES:-}" = no ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    return
  fi
  dpkg-query --show "${packages[@]}" >/dev/null 2>&1 && return
  echo "Installing ${packages[*]} ..."
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; } >/dev/null ||
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
  VENV=.venv-vllm bash launch/vllm_environment.sh
  PATH="$PWD/.venv-vllm/bin:$PATH" python -m pytest "$@" tests/distributed/test_vllm_*.py
fi
