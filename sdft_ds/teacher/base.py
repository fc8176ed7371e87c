"""base: the teacher is the model as it was at the start of the run.

Of a PEFT model that is the network with its adapters switched off, which costs nothing; of full fine-tuning it is a
shadow that never changes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sdft_ds import zero
from sdft_ds.config import SDFTConfig
from sdft_ds.teacher.contract import Teacher
from sdft_ds.teacher.shadow import ShadowTeacher


class Base(ShadowTeacher):
    """The trained weights as they were given: the model object's own, or those that were loaded, never a hub id's."""


class AdapterOff(Teacher):
    """The base model under the adapters. An adapter that was trained before the run is not part of it."""

    def __init__(self, model: nn.Module, args: SDFTConfig):
        super().__init__(model, args)
        if _adapter_was_trained(model):
            warnings.warn(
                "The adapter of this model was trained before, and the base teacher, with adapters off, does not have "
                "what it learned. To keep it, merge it first: model.merge_and_unload().",
                stacklevel=2,
            )

    @contextmanager
    def weights(self, engine: nn.Module) -> Iterator[None]:
        with self.model.disable_adapter():
            yield


def _adapter_was_trained(model: nn.Module) -> bool:
    """A fresh LoRA's B factors are all zero."""
    factors = [param for name, param in model.named_parameters() if "lora_B" in name]
    return any(bool(torch.any(copy)) for copy in zero.full_copies(factors)) if factors else False
