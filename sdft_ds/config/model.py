"""Settings of the model and its loading."""

from dataclasses import dataclass
from typing import Any

from sdft_ds.config.fields import (
    FREE,
    setting,
)


@dataclass
class ModelSettings:
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Keyword arguments (JSON) of AutoModelForCausalLM.from_pretrained, where the model is given by name.",
        resume=FREE,
    )
    trust_remote_code: bool = setting(
        False,
        "Run code from the model's repository, to load the model and its tokenizer. Only for authors you trust.",
        resume=FREE,
    )
    disable_dropout: bool = setting(True, "Set every dropout of the model to 0.", resume=FREE)
