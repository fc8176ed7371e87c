"""Starts that follow one another: each is a trainer of its own."""

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sdft_ds.checkpoint import storage
from sdft_ds.distributed import ranks, zero
from tests.helpers import tiny
from tests.helpers.trainers import DS_CONFIGS, Recorder, digest, make_trainer, shadow_pieces, trainable

FOLLOWING = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3}


def start(
    stage: int | None, folder: str, resume: bool | str | None = None, callbacks=(), **settings
) -> dict[str, Any]:
    """One start of a run; how it went and what it left."""
    recorder, said, steps = Recorder(), io.StringIO(), []
    trainer = make_trainer(
        stage, callbacks=[recorder, *callbacks], output_dir=folder, **{"save_strategy": "steps", **settings}
    )
    collect = trainer.meters["train"].collect
    trainer.meters["train"].collect = lambda steps_since: steps.append(steps_since) or collect(steps_since)
    with redirect_stdout(said):
        trainer.train(resume_from_checkpoint=resume)
    logs = [log for log in recorder.logs if "loss" in log]
    ranks.barrier()
    return {
        "step": trainer.state.global_step,
        "losses": [log["loss"] for log in logs],
        "rates": [log["learning_rate"] for log in logs],
        "logged": [log["step"] for log in trainer.state.log_history if "loss" in log],
        "evaluated": [log["step"] for log in trainer.state.log_history if "eval_loss" in log],
        "steps since": steps,
        "completions": recorder.completions,
        "weights": digest(zero.full_copies(trainable(trainer))),
        "values": zero.full_copies(trainable(trainer)),
        "teacher": digest(tensor for _, _, tensor in shadow_pieces(trainer)),
        "groups": [
            {name: group[name] for name in ("lr", "weight_decay", "betas", "eps")}
            for group in trainer.optimizer.param_groups
        ],
        "best": (trainer.state.best_global_step, Path(trainer.state.best_model_checkpoint or "").name),
        "checkpoints": sorted(path.name for path in storage.checkpoints(folder)),
        "said": said.getvalue(),
    }


def starts(stage: int | None, folder: str, each: list[dict[str, Any]], **settings) -> list[dict[str, Any]]:
    """One start after the other in a folder, with these settings and each its own."""
    return [start(stage, folder, **{**settings, **own}) for own in each]


def best_then_evaluated(stage: int | None, folder: str, **settings) -> dict[str, float]:
    """The evaluation's loss at the step that was kept as the best, and what an evaluation says after the training."""
    recorder = Recorder()
    trainer = make_trainer(
        stage, callbacks=[recorder], output_dir=folder, save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=2, load_best_model_at_end=True, max_steps=3,
        **{**FOLLOWING, **settings},
    )  # fmt: skip
    trainer.train()
    losses = [log["eval_loss"] for log in recorder.logs if "eval_loss" in log]
    teacher = digest(tensor for _, _, tensor in shadow_pieces(trainer))
    return {"losses": losses, "best": trainer.state.best_global_step, "now": trainer.evaluate()["eval_loss"],
            "teacher": teacher}  # fmt: skip


def saved(stage: int | None, folder: str, tied: bool = True, ungathered: bool = False, **settings) -> dict[str, Any]:
    """The model in the output folder after a step: the names in its file, and how far it is from the trained one."""
    if ungathered:
        config = json.loads((DS_CONFIGS / f"zero{stage}.json").read_text())
        config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
        path = Path(folder, f"ds-{ranks.rank()}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(config))
        settings["deepspeed"] = str(path)
        stage = None
    trainer = make_trainer(
        stage, model=tiny.llama(tie_word_embeddings=tied), output_dir=folder, max_steps=1, **settings
    )
    trainer.train()
    trainer.save_model()
    ranks.barrier()
    unset_hf_deepspeed_config()  # or the loaded model is sharded as well
    loaded = type(tiny.llama()).from_pretrained(folder, dtype=torch.float32)
    names, params = zip(*trainer.model.named_parameters(), strict=True)
    trained = dict(zip(names, zero.full_copies(list(params)), strict=True))
    with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
        written = sorted(file.keys())
    return {
        "names": written,
        "off": max((value - trained[name].float()).abs().max().item() for name, value in loaded.named_parameters()),
        "size": os.path.getsize(Path(folder, "model.safetensors")),
    }


def checkpoint_with_stale_listings(folder: str) -> dict[str, Any]:
    """Each rank writes three files of a checkpoint, and its listing lacks those of the others."""
    rank, files = ranks.rank(), storage._files
    listed = []

    def stale(where):
        own = [name for name in files(where) if name.startswith(f"rank-{rank}")]
        listed.append(sorted(own))
        return own

    storage._files = stale
    try:
        with storage.writing(folder, 5) as aside:
            for i in range(3):
                Path(aside, f"rank-{rank}-{i}").write_text(f"{rank} {i}")
    finally:
        storage._files = files
    manifest = json.loads(Path(folder, "checkpoint-5", "manifest.json").read_text())
    return {
        "listed": listed,
        "manifest": sorted(manifest["files"]),
        "problem": storage.problem(f"{folder}/checkpoint-5"),
    }
