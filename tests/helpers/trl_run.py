"""A training script as written for TRL's SDFT, with trl.experimental.sdft or sdft_ds: losses and what callbacks get.

python -m tests.helpers.trl_run LIBRARY MODEL OUT RUNS [RECIPE]     RUNS: {name of a run: its settings}, as JSON
"""

import json
import sys
from importlib import import_module
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback

EVENTS = ("on_generation_prompts_selected", "on_self_distillation_batch_prepared", "on_generation_batch_built")
OF_TRANSFORMERS = ("args", "state", "control", "model", "processing_class")


class Recorder(TrainerCallback):
    """The losses, and what each event of self-distillation was given beside what all events are, in order."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def record(self, event: str, given: dict[str, Any]) -> None:
        self.events.append((event, {name: given[name] for name in given if name not in OF_TRANSFORMERS}))
        assert len(given) - len(self.events[-1][1]) == len(OF_TRANSFORMERS)

    def on_generation_prompts_selected(self, **given):
        self.record("on_generation_prompts_selected", given)

    def on_self_distillation_batch_prepared(self, **given):
        self.record("on_self_distillation_batch_prepared", given)

    def on_generation_batch_built(self, **given):
        self.record("on_generation_batch_built", given)


def rows(plain: bool) -> list[dict]:
    asked = [f"Question {i}?{' Why?' * i}" for i in range(4)]
    turns = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in asked]
    return [
        {"prompt": prompt, "privileged_context": f"Hint {i}. " + "It is so. " * (3 - i)}
        for i, prompt in enumerate(asked if plain else turns)
    ]


def train(library: str, model: str, out: str, settings: dict[str, Any], recipe: str | None = None) -> dict[str, Any]:
    """{losses, events} of a run of three steps. settings: over those below; plain_text: prompts are texts."""
    sdft = import_module(library)
    plain = settings.pop("plain_text", False)
    defaults = sdft.recipe(recipe) if recipe else {}
    own = {
        "output_dir": out, "max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "num_generations": 2, "max_completion_length": 12, "generation_kwargs": {"do_sample": False},
        "shuffle_dataset": False, "learning_rate": 1e-2, "logging_steps": 1, "bf16": False, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    recorder, data = Recorder(), Dataset.from_list(rows(plain))
    trainer = sdft.SDFTTrainer(
        model=model, args=sdft.SDFTConfig(**defaults | own | settings), train_dataset=data, eval_dataset=data,
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    return {"losses": recorder.losses, "events": recorder.events}


if __name__ == "__main__":
    _, library, model, out, runs, *recipe = sys.argv
    found = {name: train(library, model, f"{out}-{name}", more, *recipe) for name, more in json.loads(runs).items()}
    torch.save(found, out)
