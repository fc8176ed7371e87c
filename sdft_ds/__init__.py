"""Self-Distilled Fine-Tuning on DeepSpeed: teach a language model new things without forgetting the old."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdft_ds import register
    from sdft_ds.config.recipes import recipe
    from sdft_ds.config.sdft_config import SDFTConfig
    from sdft_ds.config.sdpo_config import SDPOConfig
    from sdft_ds.config.sft_config import SFTConfig
    from sdft_ds.data.loading.read import read_dataset
    from sdft_ds.trainer import SDFTTrainer, SDPOTrainer, SFTTrainer

__all__ = [
    "SDFTConfig", "SDFTTrainer", "SDPOConfig", "SDPOTrainer", "SFTConfig", "SFTTrainer",
    "read_dataset", "recipe", "register",
]  # fmt: skip
__version__ = "0.1.0"

# peft imports bitsandbytes, which on some CPUs warns that a kernel for 4-bit inference is not installed.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

_HOMES = {
    "SDFTConfig": "sdft_ds.config.sdft_config",
    "SDFTTrainer": "sdft_ds.trainer",
    "SDPOConfig": "sdft_ds.config.sdpo_config",
    "SDPOTrainer": "sdft_ds.trainer",
    "SFTConfig": "sdft_ds.config.sft_config",
    "SFTTrainer": "sdft_ds.trainer",
    "read_dataset": "sdft_ds.data.loading.read",
    "recipe": "sdft_ds.config.recipes",
}


def __getattr__(name: str) -> Any:
    """The classes, imported when they are asked for: the doctor runs where their imports fail."""
    if name == "register":
        return import_module("sdft_ds.register")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
