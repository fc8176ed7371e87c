"""Model loading: model name or object -> the causal LM to train, its tokenizer, stop tokens and prompt length limits.

Tokenizer and config, which data validation needs, are available before the weights are loaded.
"""

import copy
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
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
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import find_adapter_config_file, is_flash_attn_2_available, is_flash_attn_3_available

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.distributed import launch, zero
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.model.prefix_cache import longest_row


def refuse_second_adapter(model: str | nn.Module, peft_config: PeftConfig | None, args: SDFTConfig) -> None:
    """Raises ValueError if a new adapter is requested for a model that already has one."""
    if peft_config is None:
        return
    if isinstance(model, PeftModel) or (isinstance(model, str) and adapter_config(model, args) is not None):
        raise ValueError(
            f"{model if isinstance(model, str) else 'The model'} has an adapter already, and peft_config (--use_peft) "
            "asks for another one, and the first would be lost. Leave peft_config out to continue training the "
            "adapter; or merge it first (python -m sdft_ds.merge, or model.merge_and_unload()), and give what is made."
        )


def load_model(
    model: str | PreTrainedModel | nn.Module, args: SDFTConfig, peft_config: PeftConfig | None = None
) -> nn.Module:
    """Load a model given by name; wrap it with a new adapter if peft_config is given.

    The name may be an adapter's: it is loaded with its base model, and its training continues. Weights are loaded in
    the dtype of `_default_dtype`, unless `model_init_kwargs` overrides it.
    """
    if isinstance(model, str):
        adapter = adapter_config(model, args)
        options = {"dtype": _default_dtype(args, adapter or peft_config), **_init_kwargs(args)}
        if isinstance(options["dtype"], str) and options["dtype"] != "auto":
            options["dtype"] = dtype_named(options["dtype"])
        with nullcontext() if _made_of_shards(adapter or peft_config) else launch.unsharded():
            if adapter is None:
                return _with_adapter(AutoModelForCausalLM.from_pretrained(model, **options), peft_config)
            base = AutoModelForCausalLM.from_pretrained(
                adapter["base_model_name_or_path"], **_of_the_base(options, adapter)
            )
            return PeftModel.from_pretrained(base, model, is_trainable=True, **_hub_options(args))
    if args.model_init_kwargs:
        warnings.warn("model_init_kwargs is ignored: the model is given as an object.", stacklevel=2)
    if zero.is_sharded(model):
        if not _made_of_shards(peft_config):
            raise ValueError(
                f"{peft_config.peft_type.value} computes its initialization from the full weights, and those of this "
                "model are sharded by ZeRO-3: give the model by its name, or load it before the SDFTConfig is made."
            )
        return _with_adapter(model, peft_config)
    with launch.unsharded():
        return _with_adapter(model, peft_config)


def _made_of_shards(config: PeftConfig | dict[str, Any] | None) -> bool:
    """Whether PEFT gathers the ZeRO-3 sharded weights that it needs to build this adapter. Where it does not, it
    computes with empty ones, with or without an error; then weights are loaded unsharded, and sharded when the engine
    is created."""
    if config is None:
        return True
    config = _as_dict(config)
    return config["peft_type"] == PeftType.LORA and config.get("trainable_token_indices") is None


def _as_dict(config: PeftConfig | dict[str, Any]) -> dict[str, Any]:
    """An adapter's configuration, as in its adapter_config.json."""
    return config.to_dict() if isinstance(config, PeftConfig) else config


def _with_adapter(model: nn.Module, peft_config: PeftConfig | None) -> nn.Module:
    """The model, wrapped with a new adapter if one is given; peft_config is not modified."""
    if not isinstance(model, PeftModel) and any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"This {type(model).__name__} has an adapter inside, but is no PeftModel: give the PeftModel that "
            "get_peft_model or an earlier trainer (trainer.model) made of it, or take the adapter out with its "
            "unload() or merge_and_unload()."
        )
    if peft_config is not None:
        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config must be a peft.PeftConfig, not {type(peft_config).__name__}.")
        _refuse_method(peft_config)
        model = get_peft_model(model, copy.deepcopy(peft_config))
    elif isinstance(model, PeftModel):
        _refuse_method(model.active_peft_config)
    return model


# PEFT methods with inputs other than a row's tokens -> those inputs.
NEED_MORE = {PeftType.POLY: "the task of each row", PeftType.XLORA: "other adapters"}


def _refuse_method(config: PeftConfig) -> None:
    name = config.peft_type.value
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{name} prepends learned tokens to the prompt, which moves the completion's positions: use LoRA instead."
        )
    if config.peft_type in NEED_MORE:
        raise ValueError(f"{name} needs {NEED_MORE[config.peft_type]} beside the tokens: use LoRA instead.")


def config_of(model: str | nn.Module, args: SDFTConfig) -> PreTrainedConfig:
    """The model's config, without loading the model. Raises ValueError, naming the model, if it is not a decoder with
    an LM head."""
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
    adapter, options = adapter_config(model, args), _hub_options(args)
    name = model
    if adapter is not None:
        name, options = adapter["base_model_name_or_path"], _of_the_base(options, adapter)
    with named_in_errors(name):
        return AutoConfig.from_pretrained(name, **options)


@contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Within the block a model is loaded by this name, a folder or a hub id. Raises ValueError, naming it, if it
    cannot be: the errors of transformers may not name it, and take a folder that is not there for a hub id."""
    path = Path(name)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is None and not path.exists():
        raise ValueError(f"The model {name}: there is no such folder.")
    try:
        yield
    except (OSError, ValueError) as error:
        missing = "there is no such folder, and from the hub: " if "/" in name and not path.exists() else ""
        raise ValueError(f"The model {name}: {missing}{error}") from None


def adapter_config(model: str | None, args: SDFTConfig) -> dict[str, Any] | None:
    """The contents of adapter_config.json if `model` is the name or folder of an adapter, else None."""
    if model is None:
        return None
    options = {name: value for name, value in _hub_options(args).items() if name != "trust_remote_code"}
    with named_in_errors(model):
        file = find_adapter_config_file(model, **options)
    if file is None:
        return None
    config = json.loads(Path(file).read_text())
    if config.get("base_model_name_or_path") is None:
        raise ValueError(f"{model} is an adapter that names no base model: load both, and give the PeftModel.")
    return config


def _of_the_base(options: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """Options of from_pretrained for an adapter's base model: revision and subfolder of the adapter do not apply."""
    kept = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    return kept if adapter.get("revision") is None else {**kept, "revision": adapter["revision"]}


def _hub_options(args: SDFTConfig) -> dict[str, Any]:
    """The from_pretrained options that select the location and trust_remote_code."""
    names = ("revision", "trust_remote_code", "subfolder", "cache_dir", "local_files_only")
    return {name: value for name, value in _init_kwargs(args).items() if name in names}


def _init_kwargs(args: SDFTConfig) -> dict[str, Any]:
    return {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}


def _default_dtype(args: SDFTConfig, adapter: PeftConfig | dict[str, Any] | None) -> torch.dtype:
    """With DeepSpeed its engine's, which keeps fp32 masters of what it trains. Without, fp32, in which no update is
    lost; for weights that stay frozen under LoRA the compute dtype, to which autocast would cast them at each use."""
    if args.hf_deepspeed_config is not None:
        return args.hf_deepspeed_config.dtype()
    return torch.bfloat16 if args.bf16 and _trains_factors_only(adapter) else torch.float32


def _trains_factors_only(adapter: PeftConfig | dict[str, Any] | None) -> bool:
    """Whether only LoRA's factors are trained: PEFT keeps those in fp32 beside weights in bf16, and converts their
    inputs. What else an adapter may train, a bias or a copied module, would have the dtype of the loaded weights."""
    if adapter is None:
        return False
    config = _as_dict(adapter)
    others = ("modules_to_save", "trainable_token_indices", "target_parameters")
    return (
        config["peft_type"] == PeftType.LORA
        and config.get("bias", "none") == "none"
        and not any(config.get(name) for name in others)
    )


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype of this name; raises ValueError if there is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"model_init_kwargs: there is no dtype {name!r}; use bfloat16, float16, float32 or auto.")
    return dtype


def name_of(model: nn.Module) -> str:
    """The name or folder that the model was loaded from, else its class."""
    causal_lm = causal_lm_of(model)
    return causal_lm.config.name_or_path or type(causal_lm).__name__


def refuse_without_trainable(model: nn.Module) -> None:
    """Raises ValueError for a model without trainable parameters."""
    if any(param.requires_grad for param in model.parameters()):
        return
    if isinstance(model, PeftModel):
        raise ValueError(
            "The model's adapter has no trainable weights: load it with PeftModel.from_pretrained(..., "
            "is_trainable=True), or give its name or folder."
        )
    raise ValueError(
        f"{name_of(model)} has no trainable weights: call model.requires_grad_(True) to train all of them, or give a "
        "peft_config (--use_peft) for an adapter."
    )


def load_tokenizer(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None, model: str, args: SDFTConfig
) -> tuple[PreTrainedTokenizerBase | ProcessorMixin, PreTrainedTokenizerBase]:
    """(processing_class as given, or the model's; its tokenizer, with a pad token)."""
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(model, **_hub_options(args))
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class must be a tokenizer or a processor that has one, not {type(processing_class).__name__}."
        )
    return processing_class, with_pad_token(tokenizer)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer; if it has no pad token, a copy with EOS as the pad token, which is safe because nothing infers
    padding from token ids. Raises ValueError if it has neither."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token: set "
                "tokenizer.eos_token, or eos_token in its tokenizer_config.json."
            )
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_embedding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raises ValueError if the tokenizer has token ids outside the model's embedding."""
    embeddings = zero.full_shape(causal_lm_of(model).get_input_embeddings().weight)[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= embeddings:
        raise ValueError(
            f"The tokenizer has token id {largest}, but the model's embedding has {embeddings} rows: call "
            "model.resize_token_embeddings(len(tokenizer)), or use the model's own tokenizer."
        )


def stop_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All EOS token ids: those of the model's generation config and the tokenizer's."""
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
    tokenizer: PreTrainedTokenizerBase,
    model_config: PreTrainedConfig,
    args: SDFTConfig,
    context_optional: bool = False,
) -> PromptBuilder:
    """The PromptBuilder for this model. Raises ValueError for length limits that exceed its context."""
    return PromptBuilder(
        tokenizer,
        args.teacher_prompt_template,
        *_prompt_limits(model_config, args),
        args.truncation,
        args.chat_template_kwargs,
        args.teacher_chat_template_kwargs,
        context_optional,
        demonstrations=args.method == "sft",
    )


def _prompt_limits(model_config: PreTrainedConfig, args: SDFTConfig) -> tuple[int | None, int | None]:
    """Maximum tokens of the student's and the teacher's prompt, such that each fits into the model's longest row
    together with the longest completion. None if neither the model's config nor a setting limits them."""
    longest, what = longest_row(model_config)
    if longest is None:
        return args.max_prompt_length, args.max_teacher_prompt_length
    room = longest - args.max_completion_length

    def limit(name: str) -> int:
        value, default = getattr(args, name), SDFTConfig.__dataclass_fields__[name].default
        if room < 1 or (value not in (None, default) and value > room):
            raise ValueError(
                f"{name}={value} and max_completion_length={args.max_completion_length} exceed {what}: lower one of "
                "them."
            )
        return min(value or room, room)

    return limit("max_prompt_length"), limit("max_teacher_prompt_length")


FLASH_ATTENTION = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


def check_attention(config: PreTrainedConfig, args: SDFTConfig) -> None:
    """Raises ValueError for an attention implementation that this machine cannot train with."""
    name = getattr(config, "_attn_implementation", None) or _init_kwargs(args).get("attn_implementation")
    if name in FLASH_ATTENTION and not FLASH_ATTENTION[name]():
        raise ValueError(
            f"attn_implementation={name!r} needs a GPU, and its package, which is not installed: see `pip install "
            "flash-attn`. Or use attn_implementation='sdpa'."
        )
    if name == "flex_attention" and args.use_cpu:
        raise ValueError("attn_implementation='flex_attention' cannot train on a CPU: use attn_implementation='sdpa'.")


def check_kernels(config: PreTrainedConfig, args: SDFTConfig) -> None:
    """Raises ValueError if use_liger_kernel has no kernels for the model."""
    if args.use_liger_kernel:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise ValueError(
                f"use_liger_kernel=True: this liger-kernel has no kernels for {config.model_type} models: leave it "
                "False, or install a newer one."
            )


def apply_kernels(model: nn.Module, args: SDFTConfig) -> None:
    """With use_liger_kernel, compute the model's norms, rotary embeddings and MLPs with Liger's kernels, now, not as
    transformers does when training begins: rollouts and evaluations before it compute with them as well."""
    if args.use_liger_kernel:
        apply_liger_kernel(model, args.liger_kernel_config)


def check_support(config: PreTrainedConfig, args: SDFTConfig) -> None:
    """Raises ValueError if distillation_topk exceeds the model's vocabulary."""
    vocabulary = config.get_text_config().vocab_size
    if args.distillation_topk is not None and args.distillation_topk > vocabulary:
        raise ValueError(
            f"distillation_topk={args.distillation_topk} exceeds the model's vocabulary of {vocabulary}: lower it, or "
            "set distillation_mode='full_logits'."
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate to 0: of dropout modules, and of attention layers, which pass it to their kernel."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def keep_quantized_layout(model: nn.Module) -> None:
    """Keep forwards from repacking 4-bit weights: on CPUs with bf16 units bitsandbytes does so in eval mode under
    no_grad, as in rollouts and scoring. Repacked weights pass no gradient, and ZeRO-3 cannot shard them.

    Raises ValueError, naming the module, if it has already happened: it rounded the scales to bf16.
    """
    for name, module in model.named_modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                raise ValueError(
                    f"The 4-bit weights of {name} were repacked by a forward in eval mode, which rounds them and "
                    "stops the gradient: reload the model, and evaluate it after the trainer is built."
                )


def warn_of_router_loss(config: PreTrainedConfig) -> None:
    """Warn if a mixture-of-experts config requests the load-balancing loss, which distillation does not add."""
    if getattr(config.get_text_config(), "output_router_logits", False):
        warnings.warn(
            "The model's config asks for output_router_logits, whose load-balancing loss is not added here: its "
            "routers are trained by the divergence alone. Set it to false to compute no such logits.",
            stacklevel=2,
        )


def warn_without_masters(model: nn.Module, args: SDFTConfig) -> None:
    """Warn about trainable half-precision weights without fp32 masters, in which small updates are lost."""
    halves = {
        str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    }
    if halves and args.hf_deepspeed_config is None:
        warnings.warn(
            f"Trainable weights are {', '.join(sorted(halves))} and no fp32 master is kept: updates smaller than "
            "their rounding are lost. Load the model in float32 (bf16 autocast computes as fast), or use DeepSpeed.",
            stacklevel=2,
        )
