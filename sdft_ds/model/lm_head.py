"""Which tensors make up a language-model head: a linear layer's, also in 4 bits, with a LoRA adapter beside it, or of
the trained copy that PEFT's modules_to_save keeps beside the original."""

from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from sdft_ds.distributed import zero
from sdft_ds.loss.chunked import Adapter, HeadValues


@dataclass(frozen=True)
class HeadTensors:
    """The head that a forward would use now; under ZeRO-3 its tensors may be sharded. down, up: of the adapter."""

    weight: Tensor
    bias: Tensor | None = None
    down: Tensor | None = None
    up: Tensor | None = None
    scale: float = 0.0

    def present(self) -> list[Tensor]:
        return [tensor for tensor in (self.weight, self.bias, self.down, self.up) if tensor is not None]

    def values(self) -> HeadValues:
        """To compute with, where the tensors are whole; the weight in full precision if it is kept in 4 bits."""
        adapter = None if self.down is None else Adapter(self.down, self.up, self.scale)
        return HeadValues(_dequantized(self.weight), self.bias, adapter)

    def copied(self, student: "HeadTensors") -> HeadValues:
        """Copies of what can differ from the student's head by the time of the loss; the rest, if it is the student's
        own and not trained, is left to it (None). Every rank calls it."""
        wanted = {
            name: getattr(self, name)
            for name in ("weight", "bias", "down", "up")
            if getattr(self, name) is not None
            and (getattr(self, name) is not getattr(student, name) or getattr(student, name).requires_grad)
        }
        if "weight" not in wanted:
            wanted.pop("bias", None)
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
    """Raises ValueError, naming what the head is, where the loss cannot do as it does."""
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
