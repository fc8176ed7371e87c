"""Base teacher: the model as it was at the start of the run.

For a PEFT model whose adapters were a no-op at the start, that is the network with adapters disabled, which costs
nothing; for full fine-tuning and all other adapters it is a shadow that never changes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel, PeftType
from torch import nn

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import zero
from sdft_ds.model.completion_forward import head_of
from sdft_ds.model.lm_head import tensors_of
from sdft_ds.model.modes import requires_grad_kept
from sdft_ds.teacher.protocol import Teacher
from sdft_ds.teacher.shadow import ShadowTeacher

# Values of init_lora_weights that leave the base weights unchanged, so that even a trained adapter can be disabled.
# Others (pissa, olora, corda, loftq, ...) move part of the base weights into the adapter.
SEPARATE = (True, "gaussian", "eva")


class FrozenShadow(ShadowTeacher):
    """The initial values of the trained weights: those of the given model object or as loaded, never a hub id's."""


class AdapterOff(Teacher):
    """The base model with adapters disabled. What an adapter learned before the run is not part of it."""

    def __init__(self, model: nn.Module, args: SDFTConfig):
        super().__init__(model, args)
        self.runs = 0
        self._warn_of_trained_adapter()

    def start(self, engine: nn.Module) -> None:
        if self.runs:
            self._warn_of_trained_adapter()
        self.runs += 1

    def _warn_of_trained_adapter(self) -> None:
        if _changes_something(self.model):
            warnings.warn(
                "The adapter of this model was trained before, and the base teacher, with adapters off, does not have "
                "what it learned. To keep it, merge it first: model.merge_and_unload().",
                stacklevel=2,
            )

    @contextmanager
    def weights(self, engine: nn.Module) -> Iterator[None]:
        # On re-enabling an adapter, PEFT makes all of it trainable, including what the user has frozen.
        with requires_grad_kept(self.model), self.model.disable_adapter():
            yield


def base_of_adapter(model: PeftModel, args: SDFTConfig) -> Teacher:
    """The base teacher of a PEFT model: adapters disabled, or a shadow where that differs from the start."""
    lora = model.active_peft_config
    plain = lora.peft_type == PeftType.LORA and (not _changes_something(model) or lora.init_lora_weights in SEPARATE)
    return (AdapterOff if plain and _all_is_switched_off(model) else FrozenShadow)(model, args)


def adapter_off(model: nn.Module, args: SDFTConfig) -> AdapterOff | None:
    """The model at the start beside a teacher that is another one: with adapters disabled, where that is the start and
    has the head of the student; None elsewhere, where it would be a second shadow, or a second head."""
    start = base_of_adapter(model, args) if hasattr(model, "peft_config") else None
    if not isinstance(start, AdapterOff):
        return None
    head = head_of(model)
    students = tensors_of(head)
    with start.weights(model):
        return start if tensors_of(head).is_that_of(students) else None


def _changes_something(model: PeftModel) -> bool:
    """Whether LoRA changes the model. If not, one factor of each product is zero: B, or A for an embedding."""
    factors = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    return any(bool(torch.any(copy)) for copy in zero.full_copies(factors)) if factors else False


def _all_is_switched_off(model: PeftModel) -> bool:
    """Whether no trained weight, such as a bias, remains active with adapters disabled: PEFT clears requires_grad of
    what it disables."""
    with requires_grad_kept(model), warnings.catch_warnings(action="ignore"), model.disable_adapter():
        return not any(param.requires_grad for param in model.parameters())
