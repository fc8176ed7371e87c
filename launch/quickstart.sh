#!/usr/bin/env bash
# From a fresh clone to a model that has learned: makes .venv, installs the tested packages, trains the embedded demo
# under DeepSpeed. Arguments go on to launch/train.py. NUM_GPUS sets the number of ranks (default: every GPU, or 1).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
make_environment ""
exec deepspeed --log_level error ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} launch/train.py --deepspeed ds_configs/zero2.json "$@"
