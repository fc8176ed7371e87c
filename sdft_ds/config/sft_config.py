"""SFTConfig: settings of supervised fine-tuning, those of SDFTConfig that apply to it."""

from dataclasses import dataclass

from sdft_ds.config.sdft_config import SDFTConfig


@dataclass
class SFTConfig(SDFTConfig):
    """An SDFTConfig for a run without a teacher: accepts the same settings, and warns of those it does not read."""

    method = "sft"
    lacks = "Supervised fine-tuning has no teacher, divergence or generations"
