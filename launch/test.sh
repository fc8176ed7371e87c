#!/usr/bin/env bash
# Lint, then all fast tests, in the same environment as quickstart.sh; --full adds the slow ones. Other arguments go to
# pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment dev
ruff check .
ruff format --check .
exec python -m pytest "$@"
