"""A model by name or as an object -> the causal LM to train, its tokenizer, its stop tokens, its limits of prompts.

What the data is checked by, tokenizer and config, is there before the weights are loaded.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import find_adapter_config_file

from sdft_ds import zero
from sdft_ds.completion_head import causal_lm_of
from sdft_ds.config import SDFTConfig
from sdft_ds.prompts import PromptBuilder


def load_model(model: str | PreTrainedModel | nn.Module, args: SDFTConfig) -> nn.Module:
    """Load a model that is given by name; check one that is given as an object.

    Weights are loaded in fp32, or in the dtype of DeepSpeed's engine, which keeps fp32 masters itself;
    `model_init_kwargs` may say otherwise.
    """
    if isinstance(model, str):
        options: dict[str, Any] = {"dtype": _default_dtype(args), **(args.model_init_kwargs or {})}
        if isinstance(options["dtype"], str) and options["dtype"] != "auto":
            options["dtype"] = getattr(torch, options["dtype"])
        return AutoModelForCausalLM.from_pretrained(model, **options)
    if args.model_init_kwargs:
        warnings.warn("model_init_kwargs is ignored: the model is given as an object.", stacklevel=2)
    return model


def config_of(model: str | nn.Module, args: SDFTConfig) -> PreTrainedConfig:
    """The model's config, without loading the model. Raises ValueError, naming it, for one that is no decoder with a
    language-model head."""
    if isinstance(model, str):
        config = _config_by_name(model, args)
        name = f"{model} ({config.model_type})"
        has_head = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        has_head = has_head or "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    else:
        causal_lm = causal_lm_of(model)
        name, config = type(causal_lm).__name__, getattr(causal_lm, "config", None)
        has_head = isinstance(causal_lm, PreTrainedModel) and causal_lm.get_output_embeddings() is not None
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model, and prompts are continued here: use a causal LM.")
    if not has_head:
        raise ValueError(f"{name} has no language-model head: use one that AutoModelForCausalLM loads.")
    return config


def _config_by_name(model: str, args: SDFTConfig) -> PreTrainedConfig:
    options = _hub_options(args)
    adapter = find_adapter_config_file(model, **{k: v for k, v in options.items() if k != "trust_remote_code"})
    if adapter is not None and not Path(model, "config.json").exists():
        return AutoConfig.from_pretrained(json.loads(Path(adapter).read_text())["base_model_name_or_path"])
    return AutoConfig.from_pretrained(model, **options)


def _hub_options(args: SDFTConfig) -> dict[str, Any]:
    """Of what from_pretrained of a model is given, that which says where it lies and whom to trust."""
    names = ("revision", "trust_remote_code", "subfolder", "cache_dir", "local_files_only")
    return {name: value for name, value in (args.model_init_kwargs or {}).items() if name in names}


def _default_dtype(args: SDFTConfig) -> torch.dtype:
    return args.hf_deepspeed_config.dtype() if args.deepspeed else torch.float32


def name_of(model: nn.Module) -> str:
    """The name or folder that the model was loaded from; of one that was not, its class."""
    causal_lm = causal_lm_of(model)
    return causal_lm.config.name_or_path or type(causal_lm).__name__


def add_adapter(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """Wrap the model with a fresh adapter, if one is asked for."""
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise ValueError(
                "The model is a PeftModel already, and a peft_config was given too: give a plain model with "
                "peft_config, or the PeftModel alone."
            )
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig, not {type(peft_config).__name__}.")
        model = get_peft_model(model, peft_config)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"{model.active_peft_config.peft_type.value} prepends learned tokens to the prompt, which moves the "
            "completion's positions: use LoRA instead."
        )
    return model


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, model: str, args: SDFTConfig
) -> tuple[PreTrainedTokenizerBase | ProcessorMixin, PreTrainedTokenizerBase]:
    """(what was given, or that of the model of this name; its tokenizer, with a pad token)."""
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(model, **_hub_options(args))
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer or a processor that has one, not {type(processing_class).__name__}."
        )
    return processing_class, with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer; a missing pad token becomes the end-of-sequence token, which is safe here: nothing infers padding
    from token ids."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_embedding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raises ValueError for a tokenizer with tokens that the model has no embedding of."""
    embeddings = zero.full_shape(causal_lm_of(model).get_input_embeddings().weight)[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings:
        raise ValueError(
            f"The tokenizer knows token id {largest}, but the model's embedding has {embeddings} rows: call "
            "model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer."
        )


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: those of the model's generation config, and the tokenizer's."""
    declared = causal_lm_of(model).generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    ids = {token for token in (*declared, tokenizer.eos_token_id) if token is not None}
    if not ids:
        raise ValueError(
            "Neither the model's generation_config nor the tokenizer names an end-of-sequence token: set "
            "tokenizer.eos_token."
        )
    return sorted(ids)


def prompt_builder(
    tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig, args: SDFTConfig
) -> PromptBuilder:
    """What makes both prompts of a row for this model. Raises ValueError for limits that exceed its context."""
    return PromptBuilder(
        tokenizer,
        args.teacher_prompt_template,
        *_prompt_limits(model_config, args),
        args.truncation,
        args.chat_template_kwargs,
    )


def _prompt_limits(model_config: PreTrainedConfig, args: SDFTConfig) -> tuple[int | None, int | None]:
    """Most tokens of the student's and of the teacher's prompt: either fits into the model's context together with the
    longest completion. None where neither the config of the model nor a setting says anything."""
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        return args.max_prompt_length, args.max_teacher_prompt_length
    room = context - args.max_completion_length

    def limit(name: str) -> int:
        value, default = getattr(args, name), SDFTConfig.__dataclass_fields__[name].default
        if room < 1 or (value not in (None, default) and value > room):
            raise ValueError(
                f"{name}={value} and max_completion_length={args.max_completion_length} exceed the model's context of "
                f"{context} tokens: lower one of them."
            )
        return min(value or room, room)

    return limit("max_prompt_length"), limit("max_teacher_prompt_length")


def check_support(config: PreTrainedConfig, args: SDFTConfig) -> None:
    """Raises ValueError for a top-k that is larger than the model's vocabulary."""
    vocabulary = config.get_text_config().vocab_size
    if args.distillation_topk is not None and args.distillation_topk > vocabulary:
        raise ValueError(
            f"distillation_topk={args.distillation_topk} exceeds the model's vocabulary of {vocabulary}: lower it, or "
            "set distillation_mode='full_logits'."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the modules, and the rates that attention layers hand to their kernel."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def warn_of_router_loss(config: PreTrainedConfig) -> None:
    """A mixture of experts may ask for a loss that balances its routers; distillation has none."""
    if getattr(config.get_text_config(), "output_router_logits", False):
        warnings.warn(
            "The model's config asks for output_router_logits, whose load-balancing loss is not added here: its "
            "routers are trained by the divergence alone. Set it to false to compute no such logits.",
            stacklevel=2,
        )


def warn_without_masters(model: nn.Module, args: SDFTConfig) -> None:
    """Small updates are lost in half-precision weights that no fp32 master stands behind."""
    halves = {
        str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if halves and not args.deepspeed:
        warnings.warn(
            f"Trainable weights are {', '.join(sorted(halves))} and no fp32 master is kept: updates smaller than "
            "their rounding are lost. Load the model in float32 (bf16 autocast computes as fast), or use DeepSpeed.",
            stacklevel=2,
        )
