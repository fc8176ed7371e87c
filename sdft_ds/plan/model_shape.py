"""Model sizes that determine its memory footprint, from its configuration alone: no weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sdft_ds.model.prefix_cache import CacheShape

# Built-in names: the public configurations of Llama 2 7B, Qwen3 32B, Llama 3.1 70B and Llama 3.1 405B.
BUILT_IN = {
    "7b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 11008, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "32b": {
        "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936, "max_position_embeddings": 40960,
    },
    "70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
    "405b": {
        "hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
        "intermediate_size": 53248, "vocab_size": 128256, "max_position_embeddings": 131072,
    },
}  # fmt: skip


@dataclass(frozen=True)
class ModelShape:
    """Sizes in elements. parameters: all, tied ones counted once. head: the LM head's weight, vocabulary x hidden;
    tied: shared with the embedding.

    largest: the largest parameter. linears: (last part of the name, in, out) of every linear layer but the head.
    query: width of a layer's queries; intermediate: of its feed-forward layer. cache: of a row. positions: tokens of
    its context.
    """

    parameters: int
    head: int
    tied: bool
    largest: int
    linears: tuple[tuple[str, int, int], ...]
    layers: int
    heads: int
    positions: int
    hidden: int
    query: int
    intermediate: int
    vocabulary: int
    cache: CacheShape

    @property
    def key_value(self) -> int:
        """Width of a layer's keys, and of its values."""
        return self.cache.width

    @property
    def layer(self) -> float:
        """Elements of a decoder layer."""
        return (self.parameters - self.head * (1 if self.tied else 2)) / self.layers

    @property
    def linear_parameters(self) -> int:
        """Elements of the linear layers' weights, which QLoRA quantizes to 4 bits."""
        return sum(width * height for _, width, height in self.linears)

    def adapter_parameters(self, rank: int, targets: Sequence[str] | None) -> int:
        """Elements of a LoRA adapter on the named linear layers; None: on all but the head.

        Raises ValueError if no layer has such a name.
        """
        adapted = [
            width + height
            for name, width, height in self.linears
            if targets in (None, ["all-linear"]) or name in targets
        ]
        if not adapted:
            known = ", ".join(sorted({name for name, *_ in self.linears}))
            raise ValueError(
                f"lora_target_modules: no linear layer is called {' or '.join(targets)}; there are {known}."
            )
        return rank * sum(adapted)


def shape_of(model: PreTrainedModel) -> ModelShape:
    """The shape of a causal LM, which may be on the meta device."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    sizes = [param.numel() for param in model.parameters()]
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        parameters=sum(sizes),
        head=head.weight.numel(),
        tied=head.weight is model.get_input_embeddings().weight,
        largest=max(sizes),
        linears=tuple(
            (name.rpartition(".")[2], module.in_features, module.out_features)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        ),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        positions=getattr(config, "max_position_embeddings", None) or 0,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_width,
        intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=head.weight.shape[0],
        cache=CacheShape.of(config),
    )


def load_shape(name_or_path: str) -> ModelShape:
    """The shape of a built-in name, a folder with a config.json, a config.json, or a model on the hub.

    Raises ValueError if there is no such configuration, or if it is not that of a causal LM.
    """
    if name_or_path in BUILT_IN:
        config = LlamaConfig(**BUILT_IN[name_or_path], tie_word_embeddings=False)
    else:
        try:
            config = AutoConfig.from_pretrained(name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model_name_or_path: {name_or_path} is neither {', '.join(BUILT_IN)} nor a folder or file with a "
                "model's config.json, and cannot be had from the hub."
            ) from error
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(config))
