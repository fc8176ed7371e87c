"""Command line flags of the model: name, dtype, quantization and adapter."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from sdft_ds.config.fields import Range, at_least, check_ranges, setting
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.model import loading

# The demo has a model of its own.
OF_MODEL = ("model_name_or_path",)
OF_LORA, OF_4_BITS = ("use_peft",), ("load_in_4bit",)


@dataclass
class ModelArguments:
    """Model, dtype, quantization and adapter."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str | None = setting(None, "The model: a hub id or a folder. Unset: the embedded demo model.")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.", only_with=OF_MODEL)
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = setting(
        None,
        "Load the weights in this dtype. Unset: that of DeepSpeed's engine; without DeepSpeed float32, and with bf16 "
        "bfloat16 for weights that are frozen under LoRA.",
        only_with=OF_MODEL,
    )
    attn_implementation: str | None = setting(
        None, "Attention: eager, sdpa, flash_attention_2, ...", only_with=OF_MODEL
    )
    use_peft: bool = setting(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = setting(16, "Rank of LoRA.", valid=at_least(1), only_with=OF_LORA)
    lora_alpha: int = setting(32, "Scale of LoRA, divided by its rank.", valid=at_least(1), only_with=OF_LORA)
    lora_dropout: float = setting(
        0.05,
        "Dropout of LoRA; disable_dropout sets it to 0.",
        valid=Range(lambda value: 0 <= value < 1, "in [0, 1)"),
        only_with=(*OF_LORA, "disable_dropout=False"),
    )
    lora_target_modules: list[str] | None = setting(
        None, "Modules to adapt; all-linear for every linear layer.", only_with=OF_LORA
    )
    lora_target_parameters: list[str] | None = setting(
        None, "Parameters to adapt, such as fused expert weights.", only_with=OF_LORA
    )
    lora_modules_to_save: list[str] | None = setting(
        None, "Modules to train in full beside the adapter.", only_with=OF_LORA
    )
    lora_task_type: str = setting("CAUSAL_LM", "Task type of the adapter.", only_with=OF_LORA)
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(lora_r).", only_with=OF_LORA)
    use_dora: bool = setting(False, "Weight-decomposed LoRA.", only_with=OF_LORA)
    load_in_4bit: bool = setting(
        False, "QLoRA: hold the frozen weights in 4 bits (bitsandbytes); needs use_peft.", only_with=OF_MODEL
    )
    load_in_8bit: bool = setting(
        False, "Hold the frozen weights in 8 bits; needs use_peft, not possible with ZeRO-3.", only_with=OF_MODEL
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "The 4-bit type.", only_with=OF_4_BITS)
    bnb_4bit_quant_storage: str | None = setting(
        None,
        "Dtype that packs the 4-bit weights. Unset: the engine's under ZeRO-3, which shards floats only; else uint8.",
        only_with=OF_4_BITS,
    )
    use_bnb_nested_quant: bool = setting(False, "Quantize the 4-bit scales as well.", only_with=OF_4_BITS)

    def __post_init__(self) -> None:
        """Raises ValueError for values out of range."""
        check_ranges(self)

    def init_kwargs(self, args: SDFTConfig) -> dict[str, Any]:
        """Keyword arguments of from_pretrained."""
        named = {
            "revision": self.model_revision,
            "attn_implementation": self.attn_implementation,
            "dtype": self.dtype,
            "quantization_config": self._quantization(args),
        }
        return {name: value for name, value in named.items() if value is not None}

    def tokenizer(self, args: SDFTConfig) -> PreTrainedTokenizerBase:
        name = self.model_name_or_path
        try:
            return AutoTokenizer.from_pretrained(
                name, revision=self.model_revision, trust_remote_code=args.trust_remote_code
            )
        except (OSError, ValueError) as error:  # may not name the model
            raise ValueError(f"--model_name_or_path {name}: {error}") from None

    def _quantization(self, args: SDFTConfig) -> BitsAndBytesConfig | None:
        """Raises ValueError for combinations that cannot train, naming an alternative."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        zero3 = args.hf_deepspeed_config is not None and args.hf_deepspeed_config.is_zero3()
        trains_adapter = self.use_peft or loading.adapter_config(self.model_name_or_path, args) is not None
        refusals = [
            (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit are both set: choose one."),
            (
                not trains_adapter,
                "Quantized weights cannot be trained: add --use_peft, which trains an adapter on them.",
            ),
            (self.load_in_8bit and zero3, "8-bit weights cannot be sharded by ZeRO-3: use --load_in_4bit, or ZeRO-2."),
            (
                zero3 and self.bnb_4bit_quant_storage not in (None, "bfloat16", "float16", "float32"),
                f"ZeRO-3 shards floats only: bnb_4bit_quant_storage={self.bnb_4bit_quant_storage} is not "
                "possible; leave it unset.",
            ),
        ]
        for refused, reason in refusals:
            if refused:
                raise ValueError(reason)
        if self.load_in_8bit:
            return BitsAndBytesConfig(load_in_8bit=True)
        compute = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=self.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute,
            bnb_4bit_quant_storage=self.bnb_4bit_quant_storage or (compute if zero3 else None),
        )

    def peft_config(self) -> LoraConfig | None:
        """The LoRA configuration, or None without use_peft."""
        if not self.use_peft:
            return None
        targets = self.lora_target_modules
        return LoraConfig(
            task_type=self.lora_task_type,
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=targets[0] if targets and len(targets) == 1 else targets,
            target_parameters=self.lora_target_parameters,
            modules_to_save=self.lora_modules_to_save,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )
