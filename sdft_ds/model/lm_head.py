"""LM head tensors: of a linear layer, plain or 4-bit, with or without LoRA, or of the trained copy that PEFT's
modules_to_save adds."""

from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sdft_ds.distributed import zero
from sdft_ds.loss.chunked import Adapter, HeadValues


@dataclass(frozen=True)
class HeadTensors:
    """The head that a forward would use now; under ZeRO-3 its tensors may be sharded. down, up: LoRA's A and B."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    def present(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.bias, self.down, self.up) if tensor is not None]

    def is_that_of(self, other: "HeadTensors") -> bool:
        """Whether both are the same tensors."""
        return all(a is b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))

    def values(self) -> HeadValues:
        """The values to compute with, where the tensors are unsharded; a 4-bit weight is dequantized."""
        adapter = None if self.down is None else Adapter(self.down, self.up, self.scale)
        return HeadValues(_dequantized(self.weight), self.bias, adapter)

    def copied(self, student: "HeadTensors") -> HeadValues:
        """Copies of the tensors that can differ from the student's head by the time of the loss; None for tensors
        shared with the student and not trained. Called by every rank."""
        wanted = {
            name: getattr(self, name)
            for name in ("weight", "bias", "down", "up")
            if getattr(self, name) is not None
            and (getattr(self, name) is not getattr(student, name) or getattr(student, name).requires_grad)
        }
        copies = dict(zip(wanted, zero.full_copies(list(wanted.values())), strict=True))
        adapter = None if self.down is None else Adapter(copies["down"], copies["up"], self.scale)
        return HeadValues(copies.get("weight"), copies.get("bias"), adapter)


def _dequantized(weight: Tensor) -> Tensor:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, state)


def tensors_of(head: nn.Module) -> HeadTensors:
    """The tensors of the active head. Raises ValueError, naming the head's type, if the loss does not support it."""
    if isinstance(head, ModulesToSaveWrapper):
        active = head.active_adapters[0]
        return tensors_of(head.original_module if head.disable_adapters else head.modules_to_save[active])
    if isinstance(head, LoraLayer):
        base = tensors_of(head.get_base_layer())
        active = [name for name in head.active_adapters if name in head.lora_A]
        if head.disable_adapters or head.merged or not active:
            return base
        _refuse_variants(head, active)
        name = active[0]
        down, up = head.lora_A[name].weight, head.lora_B[name].weight
        return replace(base, down=down, up=up, scale=head.scaling[name])
    if type(head) is nn.Linear or type(head).__name__ == "Linear4bit":
        return HeadTensors(head.weight, head.bias)
    raise ValueError(
        f"The language-model head is a {type(head).__name__}, and the loss needs a linear layer: plain, in 4 bits, "
        "with LoRA, or in modules_to_save."
    )


def _refuse_variants(head: Any, active: list[str]) -> None:
    name = active[0]
    unlike = {
        f"{len(active)} adapters at once": len(active) > 1,
        "a LoRA variant (DoRA and the like)": name in head.lora_variant,
        "a LoRA bias": getattr(head.lora_B[name], "bias", None) is not None,
        "LoRA dropout": getattr(head.lora_dropout[name], "p", 0.0) > 0,
    }
    for what, holds in unlike.items():
        if holds:
            raise ValueError(
                f"The language-model head has {what}, which the loss in chunks does not compute: leave `lm_head` "
                "out of the adapter's target_modules, or use plain LoRA without dropout on it."
            )
