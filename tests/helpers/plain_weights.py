"""Worker extension of vLLM for tests: weights stay as they were loaded, so that they can be compared. Imports vllm."""

import vllm._custom_ops as ops
from safetensors.torch import save_file

from sdft_ds.rollouts import weight_sums

ops._supports_onednn = False  # on a CPU it would repack them


class WeightSums(weight_sums.WeightSums):
    def save_weights(self, path: str) -> None:
        named = self.model_runner.model.named_parameters()
        save_file({name: param.detach().float().clone() for name, param in named}, path)
