"""Teacher kinds and their registry: the student's network with other values of its trained weights, one file each."""

from collections.abc import Callable

from torch import nn

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.teacher import TEACHER_KINDS
from sdft_ds.teacher.ema import Ema
from sdft_ds.teacher.frozen import FrozenShadow, adapter_off, base_of_adapter
from sdft_ds.teacher.live import Live
from sdft_ds.teacher.protocol import Teacher

# (model, settings) -> Teacher
Maker = Callable[[nn.Module, SDFTConfig], Teacher]
# kind -> (for full fine-tuning, for a PEFT model)
KINDS: dict[str, tuple[Maker, Maker]] = {
    "live": (Live, Live),
    "base": (FrozenShadow, base_of_adapter),
    "ema": (Ema, Ema),
}


def make(model: nn.Module, args: SDFTConfig) -> Teacher:
    """Build the teacher of a trainer. If no kind is set, it is base for a PEFT model, where base costs nothing, else
    live; the choice is written to args."""
    peft = hasattr(model, "peft_config")
    if args.teacher_model_kind is None:
        args.teacher_model_kind = "base" if peft else "live"
    return KINDS[args.teacher_model_kind][peft](model, args)


def add_kind(name: str, full: Maker, adapter: Maker | None = None) -> None:
    """Register a teacher, selected by teacher_model_kind=name. adapter: a different one for PEFT models."""
    KINDS[name] = (full, adapter or full)
    if name not in TEACHER_KINDS:
        TEACHER_KINDS.append(name)


__all__ = ["KINDS", "Teacher", "adapter_off", "add_kind", "make"]
