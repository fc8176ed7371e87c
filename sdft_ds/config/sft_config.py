"""SFTConfig: settings of supervised fine-tuning, those of SDFTConfig that apply to it."""

import warnings
from dataclasses import dataclass

from sdft_ds.config.fields import default, unread_by
from sdft_ds.config.sdft_config import SDFTConfig


@dataclass
class SFTConfig(SDFTConfig):
    """An SDFTConfig for a run without a teacher: accepts the same settings, and warns of those it does not read."""

    method = "sft"

    def __post_init__(self) -> None:
        unread = unread_by(type(self), self.method)
        given = [name for name, fixed in unread.items() if getattr(self, name) not in (fixed, default(self, name))]
        if given:
            warnings.warn(
                f"Supervised fine-tuning has no teacher, divergence or generations, and does not read "
                f"{', '.join(given)}.",
                stacklevel=3,
            )
        for name, fixed in unread.items():
            setattr(self, name, fixed)
        super().__post_init__()
