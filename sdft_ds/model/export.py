"""The student's weights as in a checkpoint for inference: whole, adapters merged, one decoder layer at a time.

For an inference engine with weights of its own. Names and layouts are those of the model's files on the hub.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sdft_ds.distributed import zero
from sdft_ds.model.completion_forward import causal_lm_of

_LAYER = re.compile(r"(.*?\.\d+)(\.|$)")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # starts of init_lora_weights


@dataclass
class _Part:
    """Modules whose weights are gathered together: of one decoder layer, or one other module. modules: name -> the
    module that has the weights in effect."""

    modules: dict[str, nn.Module] = field(default_factory=dict)

    def params(self) -> list[Tensor]:
        found = [param for module in self.modules.values() for param in _own(module)]
        return list({id(param): param for param in found}.values())


def refuse_unmergeable(model: nn.Module) -> None:
    """Raises ValueError for an adapter whose weights cannot be merged out of place."""
    for name, module in causal_lm_of(model).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        kind = type(module).__name__
        if not isinstance(module, LoraLayer) or not hasattr(module.get_base_layer(), "weight"):
            raise ValueError(f"use_vllm merges LoRA adapters only, and {name} has another one ({kind}).")
        for adapter in module.active_adapters:
            if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
                raise ValueError(f"use_vllm merges plain LoRA only: set use_dora=False and lora_bias=False ({name}).")


def is_tied(model: nn.Module) -> bool:
    """Whether the head's weights in effect are the embedding's, adapters considered."""
    lm = causal_lm_of(model)
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    adapted = any(isinstance(module, BaseTunerLayer | ModulesToSaveWrapper) for module in (head, embedding))
    return head is not None and not adapted and head.weight is embedding.weight


def adapter_obstacle(model: nn.Module) -> str | None:
    """Why the model's adapter cannot be served by itself, beside the weights that the base model has on the hub; None
    if it can."""
    lm = causal_lm_of(model)
    if not isinstance(model, PeftModel):
        return "the model has no adapter"
    if len(model.active_adapters) > 1:
        return "more than one adapter is active"
    config = model.peft_config[model.active_adapters[0]]
    for name in ("modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"):
        if getattr(config, name, None):
            return f"the adapter has {name}"
    if config.bias != "none":
        return f"the adapter has bias={config.bias!r}"
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights.startswith(_CHANGE_THE_BASE):
        return f"init_lora_weights={config.init_lora_weights!r} changes the base weights"
    if any(isinstance(each, BaseTunerLayer) for each in (lm.get_output_embeddings(), lm.get_input_embeddings())):
        return "the adapter is on the head or the embedding"
    if getattr(lm, "is_quantized", False):
        return "the base weights are quantized, so they differ from those of the server"
    others = [name for name, param in model.named_parameters() if param.requires_grad and ".lora_" not in name]
    return f"weights beside the adapter are trained ({others[0]})" if others else None


def adapter_weights(engine: nn.Module, model: PeftModel) -> dict[str, Tensor]:
    """Copies of the adapter's weights, whole, under the names of an adapter's file. Collective."""
    names, params = zip(*(pair for pair in model.named_parameters() if ".lora_" in pair[0]), strict=True)
    zero.drop_prefetched(engine)
    copies = dict(zip(names, zero.full_copies(list(params)), strict=True))
    return get_peft_model_state_dict(model, copies, model.active_adapters[0], save_embedding_layers=False)


def whole_weights(
    engine: nn.Module, model: nn.Module, dtype: torch.dtype, with_tied_head: bool
) -> Iterator[list[tuple[str, Tensor]]]:
    """(name, tensor) pairs of all weights in effect, a decoder layer at a time, floating-point ones in `dtype`.

    The tensors are copies, on the weights' device. with_tied_head: also give the embedding's weights under the name of
    a head that is tied to it. Collective: under ZeRO-3 every rank must iterate to the end.
    """
    lm = causal_lm_of(model)
    skipped = lm.get_output_embeddings() if is_tied(model) and not with_tied_head else None
    zero.drop_prefetched(engine)
    for part in _parts(lm):
        with torch.no_grad(), zero.gathered(part.params()):
            found = {
                f"{name}.{own}": _copy(tensor, dtype)
                for name, module in part.modules.items()
                for own, tensor in _in_effect(module).items()
                if not (module is skipped and own == "weight")
            }
        if found:
            yield list(revert_weight_conversion(lm, found).items())


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _parts(lm: PreTrainedModel) -> list[_Part]:
    """All modules with weights of their own, in the model's order."""
    parts: dict[str, _Part] = {}
    inside: tuple[str, ...] = ()  # names of wrappers, whose inner modules are handled by them
    for name, module in lm.named_modules():
        if name.startswith(inside) and inside:
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        elif isinstance(module, ModulesToSaveWrapper):
            inside += (f"{name}.",)
            for own, each in _active(module).named_modules():
                _add(parts, f"{name}.{own}".rstrip("."), each)
            continue
        _add(parts, name, module)
    return list(parts.values())


def _add(parts: dict[str, _Part], name: str, module: nn.Module) -> None:
    if _in_effect_names(module):
        layer = _LAYER.match(name)
        parts.setdefault(layer.group(1) if layer else name, _Part()).modules[name] = module


def _active(module: ModulesToSaveWrapper) -> nn.Module:
    return module.modules_to_save[module.active_adapters[0]]


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters and persistent buffers of a module, of a LoRA layer with those of its base and adapters."""
    if isinstance(module, BaseTunerLayer):
        return list(module.parameters())
    return [tensor for _, tensor in _named(module)]


def _named(module: nn.Module) -> list[tuple[str, Tensor]]:
    buffers = module.named_buffers(recurse=False)
    persistent = [(name, each) for name, each in buffers if name not in module._non_persistent_buffers_set]
    return [*module.named_parameters(recurse=False), *persistent]


def _in_effect_names(module: nn.Module) -> list[str]:
    return [name for name, _ in _named(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)]


def _in_effect(module: nn.Module) -> dict[str, Tensor]:
    """name -> tensor of a module's weights, dequantized, with active adapters merged out of place."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    found = dict(_named(base))
    if hasattr(found.get("weight"), "quant_state"):
        found = {name: tensor for name, tensor in found.items() if name in ("weight", "bias")}
        found["weight"] = dequantize_module_weight(base)
    if isinstance(module, BaseTunerLayer) and not module.disable_adapters:
        for adapter in module.active_adapters:
            if adapter in module.scaling:
                found["weight"] = found["weight"].float() + module.get_delta_weight(adapter).float()
    return found
