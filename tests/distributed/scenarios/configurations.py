"""What the settings of several ranks are refused with, and where a DeepSpeed configuration may come from."""

import os
import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset

from sdft_ds import SDFTConfig
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.distributed import engines, launch
from sdft_ds.model import loading
from sdft_ds.trainer import TRAINERS
from tests.helpers import tiny
from tests.helpers.trainers import SETTINGS, Recorder, make_trainer


def refusal(**settings) -> str:
    """What a trainer with these settings is refused with."""
    try:
        make_trainer(**settings)
    except ValueError as error:
        return str(error)
    return ""


def refusals(cases: list[tuple[Any, dict[str, Any]]]) -> list[str | None]:
    """What SDFTConfig says of each (DeepSpeed configuration, settings); None where it accepts them."""
    said = []
    for deepspeed, settings in cases:
        try:
            SDFTConfig(**{**SETTINGS, "output_dir": "unused", "deepspeed": deepspeed, **settings})
            said.append(None)
        except ValueError as error:
            said.append(str(error))
    return said


def by_accelerates_configuration(stage: int) -> dict[str, Any]:
    """A run whose DeepSpeed configuration is set by accelerate's launcher, in the environment."""
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    before, launch._LAUNCHED_WITH_DEEPSPEED = launch._LAUNCHED_WITH_DEEPSPEED, True
    os.environ |= launched
    try:
        half = SDFTConfig(**{**SETTINGS, "output_dir": "unused", "bf16": True})
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            loading.warn_without_masters(tiny.llama(dtype=torch.bfloat16), half)
        try:
            quantized = ModelArguments(load_in_8bit=True, use_peft=True).init_kwargs(half)
        except ValueError as error:
            quantized = str(error)
        recorder = Recorder()
        trainer = TRAINERS["sdft"](
            model=tiny.llama(),
            args=SDFTConfig(**{**SETTINGS, "output_dir": tempfile.mkdtemp()}),
            train_dataset=Dataset.from_list(tiny.rows(6)),
            processing_class=tiny.tokenizer(),
            callbacks=[recorder],
        )
        trainer.train()
    finally:
        launch._LAUNCHED_WITH_DEEPSPEED = before
        for name in launched:
            os.environ.pop(name, None)
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "stage": engines.stage(trainer.model_wrapped),
        "told": " ".join(str(each.message) for each in told),
        "quantized": quantized,
        "dtype": str(half.hf_deepspeed_config.dtype()),
    }
