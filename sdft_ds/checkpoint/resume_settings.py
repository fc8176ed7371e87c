"""Compares a checkpoint's settings with those of the resuming run: a changed setting is applied, refused or reported,
as its declaration specifies (config/fields.py, config/inherited.py).

A checkpoint restores the optimizer and the LR schedule with the old values; hyperparameters that come from the
settings are re-applied after loading.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdft_ds.checkpoint.storage import CannotResume
from sdft_ds.config.fields import (
    ANOTHER_RUN,
    FREE,
    NO_EFFECT,
    NOT_COMPARED,
    REFUSED,
    REFUSED_BY_DEEPSPEED,
    OnResume,
)  # fmt: skip
from sdft_ds.config.inherited import ON_RESUME
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import engines, ranks, zero

SETTINGS = "sdft_settings.json"
PACKAGES = ("sdft_ds", "torch", "transformers", "deepspeed", "accelerate", "peft", "datasets")

# Not a dataclass field, but compared as well.
METHOD = "method"
# Read only if the optimizer is created from the settings; one passed to the trainer has its own.
OF_THE_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1",
                    "adam_beta2", "adam_epsilon")  # fmt: skip
# Schedules whose rate depends on measured metrics, not on the step: their state holds it, along with their settings.
MEASURING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
OF_A_MEASURING_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
# Of a peft configuration: where it comes from, and how the weights that a checkpoint replaces were made.
OF_NO_ADAPTER = ("auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "init_lora_weights",
                 "loftq_config", "peft_version", "revision", "runtime_config")  # fmt: skip
HYPERPARAMETERS = ("weight_decay", "betas", "eps")


def settings_of(
    args: SDFTConfig, model: str, trained: dict[str, Any], rows: dict[str, int | None], zero_stage: int | None
) -> dict[str, Any]:
    """The settings that a resume is compared with; secrets are masked. model: its name; trained: see `trained_by`;
    rows: of each data set that is trained on."""
    uncompared = {f.name for f in fields(args) if on_resume(f.name).kind == NOT_COMPARED}
    apart = {*_names(args, ANOTHER_RUN), *uncompared}
    return {
        "what makes a step": {
            "rows of an optimizer step": args.per_device_train_batch_size
            * args.world_size
            * args.gradient_accumulation_steps,
            "generation_batch_size": args.generation_batch_size,
            **{f"rows of the {name}": count for name, count in rows.items()},
            **trained,
            **{name: getattr(args, name) for name in (METHOD, *_names(args, ANOTHER_RUN))},
        },
        "world_size": args.world_size,
        "zero_stage": zero_stage,
        "config": {name: value for name, value in args.to_dict().items() if name not in apart},
        "model": model,
        "versions": versions(),
    }


def trained_by(model: nn.Module) -> dict[str, Any]:
    """What a run trains of the model: how many weights, a digest of their names and shapes, and how an adapter applies
    them."""
    shapes = {name: tuple(zero.full_shape(p)) for name, p in model.named_parameters() if p.requires_grad}
    digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:12]
    found = {"trained weights": sum(map(prod, shapes.values())), "digest of the trained weights' names": digest}
    adapter = vars(model.peft_config[model.active_adapter]) if hasattr(model, "peft_config") else {}
    plain = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in adapter.items()
        if name not in OF_NO_ADAPTER and isinstance(value, str | int | float | list | set | dict)
    }
    return found | {f"the adapter's {name}": value for name, value in plain.items()}


def on_resume(name: str) -> OnResume:
    """How a resume handles a changed value of an SDFTConfig setting. An unknown name, as in an older checkpoint, is
    treated as FREE."""
    if name in ON_RESUME:
        return ON_RESUME[name]
    field = SDFTConfig.__dataclass_fields__.get(name)
    return FREE if field is None else field.metadata["resume"]


def _names(args: SDFTConfig, what: OnResume) -> list[str]:
    return [f.name for f in fields(args) if on_resume(f.name) == what]


@cache
def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def save(folder: str, settings: dict[str, Any]) -> None:
    if ranks.rank() == 0:
        Path(folder, SETTINGS).write_text(json.dumps(settings, indent=1, default=str))


def load(folder: str | Path) -> dict[str, Any] | None:
    """The saved settings, as read by rank 0; None for a checkpoint without settings. Collective."""
    path = Path(folder, SETTINGS)
    return ranks.all_gather_objects(json.loads(path.read_text()) if ranks.rank() == 0 and path.exists() else None)[0]


def compare(
    saved: dict[str, Any], now: dict[str, Any], own_optimizer: bool, tell: Callable[[str], None]
) -> dict[str, tuple[Any, Any]]:
    """Report and return the changed settings as name -> (old, new). Raises CannotResume if the run could not continue
    as the same run. own_optimizer: the optimizer was created from the settings."""
    now = json.loads(json.dumps(now, default=str))
    different = {
        name: (saved["config"].get(name), now["config"].get(name))
        for name in sorted({*saved["config"], *now["config"]})
        if saved["config"].get(name) != now["config"].get(name)
    }
    unread = set() if own_optimizer else set(OF_THE_OPTIMIZER)
    refusals = {REFUSED} if now["zero_stage"] is None else {REFUSED, REFUSED_BY_DEEPSPEED}
    refused = {name for name in different if on_resume(name).kind in refusals} - unread
    schedules = {side["config"].get("lr_scheduler_type") for side in (saved, now)}
    if schedules & set(MEASURING_SCHEDULES):
        refused |= set(OF_A_MEASURING_SCHEDULE) & different.keys() - unread
    steps = {name: (before, now["what makes a step"].get(name)) for name, before in saved["what makes a step"].items()}
    others = {name: (before, after) for name, (before, after) in steps.items() if before != after}
    others |= {name: different[name] for name in sorted(refused)}
    if others:
        what = "; ".join(f"{name} is {after!r} and was {before!r}" for name, (before, after) in others.items())
        raise CannotResume(
            f"The checkpoint was made by another run: {what}. Resume with its settings, or start a new run in another "
            "output_dir."
        )
    for name, (before, after) in different.items():
        done = OnResume(NO_EFFECT, "the optimizer was handed to the trainer") if name in unread else on_resume(name)
        if done.kind == NO_EFFECT:
            tell(f"{name} = {after!r} has no effect: {done.reason}. The checkpoint was made with {before!r}.")
        else:
            tell(f"Resuming with {name} = {after!r}; the checkpoint was made with {before!r}.")
    if saved.get("model") not in (None, now.get("model")):
        tell(f"Resuming with the model {now['model']!r}; the checkpoint was made with {saved['model']!r}.")
    for name, after in now["versions"].items():
        if saved["versions"].get(name) != after:
            tell(f"Resuming with {name} {after}; the checkpoint was made with {saved['versions'].get(name)}.")
    return different


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The hyperparameters of each param group, before a checkpoint is loaded; a schedule has added initial_lr."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore(optimizer: Optimizer, scheduler: Any, as_made: list[dict[str, Any]]) -> None:
    """Replace the hyperparameters loaded from a checkpoint by those of the settings. as_made: the hyperparameters
    before loading. The learning rate is that of the current schedule at its current step.
    """
    for group, values in zip(optimizer.param_groups, as_made, strict=True):
        # Keys are missing if another implementation with the same state saved them, e.g. before offload was enabled.
        group.update({name: value for name, value in values.items() if name in HYPERPARAMETERS or name not in group})
    scheduler = getattr(scheduler, "scheduler", scheduler)  # unwrap accelerate; DeepSpeed's engine steps it
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [values["initial_lr"] for values in as_made]
        bases = scheduler.base_lrs
        rates = [lr * factor(scheduler.last_epoch) for lr, factor in zip(bases, scheduler.lr_lambdas, strict=True)]
        for group, values, rate in zip(optimizer.param_groups, as_made, rates, strict=True):
            group.update(initial_lr=values["initial_lr"], lr=rate)
        scheduler._last_lr = rates
    else:
        engines.set_learning_rate(scheduler)
