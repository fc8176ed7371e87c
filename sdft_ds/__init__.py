"""Self-Distilled Fine-Tuning on DeepSpeed: teach a language model new things without forgetting the old."""

from sdft_ds.config import SDFTConfig
from sdft_ds.trainer import SDFTTrainer

__all__ = ["SDFTConfig", "SDFTTrainer"]
__version__ = "0.1.0"
