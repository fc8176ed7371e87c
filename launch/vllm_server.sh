#!/usr/bin/env bash
# Starts vLLM's own server for rollouts: with --use_vllm true --vllm_mode server a run sends it its weights.
#
#   bash launch/vllm_server.sh MODEL [arguments of vLLM...]          e.g. --port 8001 --tensor-parallel-size 8
#   bash launch/vllm_server.sh --lora-rank 16 MODEL ...              also serves adapters, of this rank or less
#   bash launch/vllm_server.sh --dry-run ...                         prints the command and ends
#
# It listens on this machine alone; --host 0.0.0.0 opens it to others, and whoever reaches it can replace its weights:
# in a trusted network only. VENV: the environment with vLLM (.venv-vllm).
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "sdft_ds: $*" >&2
  exit 1
}

DRY_RUN='' LORA_RANK=''
while true; do
  case "${1:-}" in
    --dry-run) DRY_RUN=yes && shift ;;
    --lora-rank) LORA_RANK=${2:-} && shift 2 ;;
    '' | -*) fail "name the model first: bash launch/vllm_server.sh [--dry-run] [--lora-rank R] MODEL [arguments of vLLM...]" ;;
    *) break ;;
  esac
done
MODEL=$1
shift

VENV=$(realpath --canonicalize-missing "${VENV:-.venv-vllm}")
[ ! -d "$VENV/bin" ] || export PATH="$VENV/bin:$PATH"
VARIABLES=(VLLM_SERVER_DEV_MODE=1 "PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}")
# Log-probabilities before temperature and top-p; requests say how they sample, not the model's own files.
ARGUMENTS=(--model "$MODEL" --host 127.0.0.1 --worker-extension-cls sdft_ds.rollouts.weight_sums.WeightSums
  --logprobs-mode raw_logprobs --generation-config vllm)
if [ -n "$(nvidia-smi --list-gpus 2>/dev/null || true)" ]; then
  ARGUMENTS+=(--weight-transfer-config '{"backend": "nccl"}')
else
  VARIABLES+=("VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-4}")
  ARGUMENTS+=(--enforce-eager --gpu-memory-utilization 0.2) # of this machine's memory
fi
if [ -n "$LORA_RANK" ]; then
  for allowed in 8 16 32 64 128 256 320 512; do
    [ "$allowed" -lt "$LORA_RANK" ] || break
  done
  VARIABLES+=(VLLM_ALLOW_RUNTIME_LORA_UPDATING=1)
  ARGUMENTS+=(--enable-lora --max-lora-rank "$allowed")
fi
# vLLM's own program fails where the package is called vllm-cpu. Of an argument that is there twice the last one counts.
COMMAND=(env "${VARIABLES[@]}" python -m vllm.entrypoints.openai.api_server "${ARGUMENTS[@]}" "$@")
printf '+'
printf ' %q' "${COMMAND[@]}"
echo
[ -z "$DRY_RUN" ] || exit 0
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("vllm") is None)' ||
  fail "no vLLM in this environment: bash launch/vllm_environment.sh makes one."
exec "${COMMAND[@]}"
