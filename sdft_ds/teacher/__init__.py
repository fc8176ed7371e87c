"""The kinds of teacher: the same network with other values in its trainable parameters, one kind in each file.

`make(kind, model)` looks the kind up in KINDS and raises ValueError where the kind does not fit the model.
"""

from torch import nn

from sdft_ds.teacher.base import AdapterOff
from sdft_ds.teacher.contract import Teacher
from sdft_ds.teacher.live import Live

KINDS: dict[str, type[Teacher]] = {"live": Live, "base": AdapterOff}


def default_kind(model: nn.Module) -> str:
    """With PEFT the base model is there for nothing; without, the student itself is."""
    return "base" if hasattr(model, "peft_config") else "live"


def make(kind: str, model: nn.Module) -> Teacher:
    if kind == "ema" or (kind == "base" and not hasattr(model, "peft_config")):
        raise NotImplementedError(
            f"teacher_model_kind={kind!r} of {'a PEFT model' if hasattr(model, 'peft_config') else 'full fine-tuning'}"
            " is not built yet: use a PEFT model with 'base', or 'live'."
        )
    return KINDS[kind](model)


__all__ = ["KINDS", "Teacher", "default_kind", "make"]
