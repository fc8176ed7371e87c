"""Counts where the host would wait for a GPU, on a CPU: wherever the code reads a tensor's values, asks for a result
whose shape depends on them, or makes a tensor of values from the host."""

from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount"}
FROM_THE_HOST = ("tensor", "as_tensor", "from_numpy")


class HostSyncs(TorchDispatchMode):
    """Context manager; `found` counts them by name."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    @property
    def count(self) -> int:
        return sum(self.found.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        if name in READS:
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.found["boolean index"] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self.patches = [
            *(mock.patch.object(torch, name, self._counting(name, getattr(torch, name))) for name in FROM_THE_HOST),
            mock.patch.object(torch.Tensor, "tolist", self._counting("tolist", torch.Tensor.tolist)),
        ]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*error)

    def _counting(self, name, function):
        def counted(*args, **kwargs):
            self.found[name] += 1
            return function(*args, **kwargs)

        return counted
