"""Sums of a model's weights by layer, which tell whether an inference engine has the student's.

`WeightSums` is a worker extension of vLLM's server (--worker-extension-cls sdft_ds.rollouts.weight_sums.WeightSums).
"""

import re
from collections.abc import Iterable

from torch import Tensor

# layer -> (elements, sum, sum of absolute values)
Sums = dict[str, tuple[int, float, float]]
_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def add(sums: Sums, named: Iterable[tuple[str, Tensor]]) -> Sums:
    """Add tensors to the sums of their layers. Engines fuse weights within a layer, which leaves its sum as it is."""
    for name, tensor in named:
        layer = _LAYER.search(name)
        key = layer.group(1) if layer else ".".join(name.split(".")[-2:])
        count, total, size = sums.get(key, (0, 0.0, 0.0))
        values = tensor.detach().double()
        sums[key] = (count + tensor.numel(), total + float(values.sum()), size + float(values.abs().sum()))
    return sums


def differing(ours: Sums, theirs: Sums) -> list[str]:
    """Layers with other sums. Those of which the engine keeps another number of elements (repacked, padded, sharded)
    cannot be compared."""
    return [
        layer
        for layer, (count, total, size) in ours.items()
        if layer in theirs and theirs[layer][0] == count and abs(theirs[layer][1] - total) > 1e-9 * size
    ]


class WeightSums:
    """Adds methods to vLLM's workers, to be called by collective_rpc."""

    def weight_sums(self) -> Sums:
        return add({}, self.model_runner.model.named_parameters())

    def repack_tied_head(self) -> None:
        """On a CPU vLLM computes with a repacked copy of the head, which loading a tied embedding does not renew."""
        for module in self.model_runner.model.modules():
            if hasattr(module, "cpu_linear") and module.weight.numel():  # a linear layer's own weights are dropped
                module.quant_method.process_weights_after_loading(module)
