"""What a run was started with, and what becomes of a setting that has another value when the run is resumed.

A checkpoint holds the optimizer and the schedule with the values of then; where the settings decide them, they are put
in place again after the checkpoint was loaded.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from sdft_ds import ranks, zero
from sdft_ds.checkpoint import CannotResume
from sdft_ds.config import SDFTConfig

SETTINGS = "sdft_settings.json"
PACKAGES = ("sdft_ds", "torch", "transformers", "deepspeed", "accelerate", "peft", "datasets")

# Setting -> what becomes of another value on a resume, and why. Those that are not here are read while the run runs:
# the value that is given counts from the next step or generation batch on.
APPLIED, NO_EFFECT = "put in place of the checkpoint's", "without effect"
REFUSED, REFUSED_BY_DEEPSPEED = "refused", "refused with DeepSpeed"
_MAKES_A_STEP = "with another value it would be another run"
ON_RESUME: dict[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
        (APPLIED, "the schedule is made anew and goes on at the step of the checkpoint"),
    ),
    **dict.fromkeys(
        ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
        (APPLIED, "set in the groups of the optimizer"),
    ),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), (APPLIED, "set in the Trainer's state")),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), (APPLIED, "the best checkpoint is sought anew")),
    **dict.fromkeys(
        ("optim", "optim_args", "optim_target_modules"), (REFUSED, "the optimizer's state is that of another one")
    ),
    **dict.fromkeys(
        (
            "method", "seed", "data_seed", "shuffle_dataset", "num_generations", "num_iterations",
            "teacher_model_kind", "generate_from_teacher", "dataloader_drop_last",
        ),
        (REFUSED, _MAKES_A_STEP),
    ),
    **dict.fromkeys(("bf16", "fp16"), (REFUSED_BY_DEEPSPEED, "its files are those of one precision")),
    "logging_first_step": (NO_EFFECT, "the first step is over"),
}  # fmt: skip
STEP_FIELDS = tuple(name for name, (_, reason) in ON_RESUME.items() if reason == _MAKES_A_STEP)
# These say where and how a run is started, not what it does; or they are compared as rows of a step.
UNTOLD_FIELDS = {
    "output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "local_rank", "deepspeed",
    "gradient_accumulation_steps", "steps_per_generation", "generation_batch_size", "per_device_train_batch_size",
    *STEP_FIELDS,
}  # fmt: skip
# Read where the optimizer is made from the settings; one that is handed to the trainer has its own.
OF_THE_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1",
                    "adam_beta2", "adam_epsilon")  # fmt: skip
# Schedules whose rate follows from what was measured, not from the step: it lies in their state, with their settings.
MEASURING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
OF_A_MEASURING_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "learning_rate")
HYPERPARAMETERS = ("weight_decay", "betas", "eps")


def settings_of(args: SDFTConfig, rows: int | None, trained_weights: int, zero_stage: int | None) -> dict[str, Any]:
    """What a resumed run is compared with; secrets are masked."""
    return {
        "what makes a step": {
            "rows of an optimizer step": args.per_device_train_batch_size
            * args.world_size
            * args.gradient_accumulation_steps,
            "generation_batch_size": args.generation_batch_size,
            "rows of the data set": rows,
            "trained weights": trained_weights,
            **{name: getattr(args, name) for name in STEP_FIELDS},
        },
        "world_size": args.world_size,
        "zero_stage": zero_stage,
        "config": {name: value for name, value in args.to_dict().items() if name not in UNTOLD_FIELDS},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def save(folder: str, settings: dict[str, Any]) -> None:
    if ranks.index() == 0:
        Path(folder, SETTINGS).write_text(json.dumps(settings, indent=1, default=str))


def load(folder: str | Path) -> dict[str, Any] | None:
    """None for a checkpoint without settings. Every rank calls it: what the first one reads counts for all."""
    path = Path(folder, SETTINGS)
    return ranks.gather(json.loads(path.read_text()) if ranks.index() == 0 and path.exists() else None)[0]


def compare(
    saved: dict[str, Any], now: dict[str, Any], own_optimizer: bool, tell: Callable[[str], None]
) -> dict[str, tuple[Any, Any]]:
    """Tell what differs, and return it, each setting with its values before and now; raise CannotResume where the run
    would not go on as it was. own_optimizer: it is made from the settings."""
    now = json.loads(json.dumps(now, default=str))
    different = {
        name: (saved["config"].get(name), now["config"].get(name))
        for name in sorted({*saved["config"], *now["config"]})
        if saved["config"].get(name) != now["config"].get(name)
    }
    unread = set() if own_optimizer else set(OF_THE_OPTIMIZER)
    refusals = {REFUSED} if now["zero_stage"] is None else {REFUSED, REFUSED_BY_DEEPSPEED}
    refused = {name for name in different if ON_RESUME.get(name, ("", ""))[0] in refusals} - unread
    schedules = {side["config"].get("lr_scheduler_type") for side in (saved, now)}
    if schedules & set(MEASURING_SCHEDULES):
        refused |= set(OF_A_MEASURING_SCHEDULE) & different.keys() - unread
    steps = {name: (before, now["what makes a step"].get(name)) for name, before in saved["what makes a step"].items()}
    others = {name: (before, after) for name, (before, after) in steps.items() if before != after}
    others |= {name: different[name] for name in sorted(refused)}
    if others:
        what = "; ".join(f"{name} is {after!r} and was {before!r}" for name, (before, after) in others.items())
        raise CannotResume(
            f"The checkpoint was made by another run: {what}. Resume with its settings, or start anew in another "
            "output_dir."
        )
    for name, (before, after) in different.items():
        kind, reason = ON_RESUME.get(name, ("", ""))
        if name in unread:
            kind, reason = NO_EFFECT, "the optimizer was handed to the trainer"
        if kind == NO_EFFECT:
            tell(f"{name} = {after!r} has no effect: {reason}. The checkpoint was made with {before!r}.")
        else:
            tell(f"Resuming with {name} = {after!r}; the checkpoint was made with {before!r}.")
    for name, after in now["versions"].items():
        if saved["versions"].get(name) != after:
            tell(f"Resuming with {name} {after}; the checkpoint was made with {saved['versions'].get(name)}.")
    return different


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Of each group of an optimizer that stands as the settings made it, under a schedule."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def restore(optimizer: Optimizer, scheduler: Any, as_made: list[dict[str, Any]]) -> None:
    """Put the settings' values in place of those that a checkpoint's optimizer and schedule brought; as_made: the
    hyperparameters before it was loaded. The rate is that of the schedule, as it is now, at the step where it stands.
    """
    for group, values in zip(optimizer.param_groups, as_made, strict=True):
        # What is missing belongs to an optimizer of another make with the same state, as with offload switched on.
        group.update({name: value for name, value in values.items() if name in HYPERPARAMETERS or name not in group})
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps the one that DeepSpeed's engine steps
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [values["initial_lr"] for values in as_made]
        bases = scheduler.base_lrs
        rates = [lr * factor(scheduler.last_epoch) for lr, factor in zip(bases, scheduler.lr_lambdas, strict=True)]
        for group, values, rate in zip(optimizer.param_groups, as_made, rates, strict=True):
            group.update(initial_lr=values["initial_lr"], lr=rate)
        scheduler._last_lr = rates
    else:
        zero.set_rate(scheduler)
