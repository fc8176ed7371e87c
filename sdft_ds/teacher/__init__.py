"""The kinds of teacher: the same network with other values in its trainable parameters, one kind in each file."""

from collections.abc import Callable

from torch import nn

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.teacher import TEACHER_KINDS
from sdft_ds.teacher.ema import Ema
from sdft_ds.teacher.frozen import FrozenShadow, base_of_adapter
from sdft_ds.teacher.live import Live
from sdft_ds.teacher.protocol import Teacher

# (model, settings) -> a teacher of one kind
Maker = Callable[[nn.Module, SDFTConfig], Teacher]
# kind -> (for full fine-tuning, for a PEFT model)
KINDS: dict[str, tuple[Maker, Maker]] = {
    "live": (Live, Live),
    "base": (FrozenShadow, base_of_adapter),
    "ema": (Ema, Ema),
}


def make(model: nn.Module, args: SDFTConfig) -> Teacher:
    """The teacher of a trainer, whose own settings say its kind afterwards. Where none is set: base for a PEFT model,
    whose base costs nothing; else live."""
    peft = hasattr(model, "peft_config")
    if args.teacher_model_kind is None:
        args.teacher_model_kind = "base" if peft else "live"
    return KINDS[args.teacher_model_kind][peft](model, args)


def add_kind(name: str, full: Maker, adapter: Maker | None = None) -> None:
    """Let teacher_model_kind be `name`. adapter: for a PEFT model, if it is another."""
    KINDS[name] = (full, adapter or full)
    if name not in TEACHER_KINDS:
        TEACHER_KINDS.append(name)


__all__ = ["KINDS", "Teacher", "add_kind", "make"]
