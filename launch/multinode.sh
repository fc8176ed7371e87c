#!/usr/bin/env bash
# Several nodes without a scheduler: run the same line on each of them.
#
#   MASTER=HOST NODES=2 bash launch/multinode.sh --deepspeed ds_configs/zero2.json ...    flags of launch/train.py
#
# MASTER: the name or address of one of the nodes, as the others reach it. NODES: how many. NPROC_PER_NODE: processes on
# each, by default its GPUs, or one. PORT (29500): free on MASTER, open to the others. --dry-run as the first argument
# prints the command and ends.
set -euo pipefail
cd "$(dirname "$0")/.."
DRY_RUN=
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=yes
  shift
fi
for name in MASTER NODES; do
  [ -n "${!name:-}" ] || { echo "sdft_ds: set $name, for example: MASTER=node1 NODES=2 bash launch/multinode.sh ..." >&2; exit 1; }
done
if [ -d .venv/bin ]; then
  export PATH="$PWD/.venv/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$PWD/.venv/torch_extensions}"
fi
NPROC_PER_NODE=${NPROC_PER_NODE:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
[ "$NPROC_PER_NODE" -gt 0 ] || NPROC_PER_NODE=1
COMMAND=(torchrun --nnodes "$NODES" --nproc_per_node "$NPROC_PER_NODE" --rdzv_backend c10d
  --rdzv_id "${RUN_ID:-sdft}" --rdzv_endpoint "$MASTER:${PORT:-29500}" launch/train.py "$@")
printf '+'
printf ' %q' "${COMMAND[@]}"
echo
[ -n "$DRY_RUN" ] || exec "${COMMAND[@]}"
