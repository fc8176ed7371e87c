"""Command line flags of the model: name, dtype, quantization and adapter."""

import warnings
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase

from sdft_ds.config.fields import setting
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.model import loading

# Prefix of flags -> the flag they require.
NEEDED = {
    "lora_": "use_peft",
    "use_rslora": "use_peft",
    "use_dora": "use_peft",
    "bnb_4bit_": "load_in_4bit",
    "use_bnb_": "load_in_4bit",
}


@dataclass
class ModelArguments:
    """Model, dtype, quantization and adapter."""

    _argument_group_name = "model and adapter"

    model_name_or_path: str | None = setting(None, "The model: a hub id or a folder. Unset: the embedded demo model.")
    model_revision: str = setting("main", "Branch, tag or commit on the hub.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = setting(
        None, "Load the weights in this dtype. Unset: float32, or that of DeepSpeed's engine."
    )
    attn_implementation: str | None = setting(None, "Attention: eager, sdpa, flash_attention_2, ...")
    use_peft: bool = setting(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = setting(16, "Rank of LoRA.")
    lora_alpha: int = setting(32, "Scale of LoRA, divided by its rank.")
    lora_dropout: float = setting(0.05, "Dropout of LoRA; disable_dropout sets it to 0.")
    lora_target_modules: list[str] | None = setting(None, "Modules to adapt; all-linear for every linear layer.")
    lora_target_parameters: list[str] | None = setting(None, "Parameters to adapt, such as fused expert weights.")
    lora_modules_to_save: list[str] | None = setting(None, "Modules to train in full beside the adapter.")
    lora_task_type: str = setting("CAUSAL_LM", "Task type of the adapter.")
    use_rslora: bool = setting(False, "Scale by lora_alpha / sqrt(lora_r).")
    use_dora: bool = setting(False, "Weight-decomposed LoRA.")
    load_in_4bit: bool = setting(False, "QLoRA: hold the frozen weights in 4 bits (bitsandbytes); needs use_peft.")
    load_in_8bit: bool = setting(False, "Hold the frozen weights in 8 bits; needs use_peft, not possible with ZeRO-3.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting("nf4", "The 4-bit type.")
    bnb_4bit_quant_storage: str | None = setting(
        None,
        "Dtype that packs the 4-bit weights. Unset: the engine's under ZeRO-3, which shards floats only; else uint8.",
    )
    use_bnb_nested_quant: bool = setting(False, "Quantize the 4-bit scales as well.")

    def __post_init__(self) -> None:
        """Warns of settings without effect."""
        for prefix, flag in NEEDED.items():
            for f in fields(self):
                if f.name.startswith(prefix) and not getattr(self, flag) and getattr(self, f.name) != f.default:
                    warnings.warn(f"--{f.name} has no effect without --{flag}.", stacklevel=3)

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
                f"ZeRO-3 shards floats only: bnb_4bit_quant_storage={self.bnb_4bit_quant_storage} cannot be; leave it "
                "unset.",
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
