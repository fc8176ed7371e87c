"""Checkpoints: resumed from, exported, complete before a rank goes on."""

import os
import time
from typing import Any

import torch
from peft import (
    PeftModel,
)
from transformers import TrainerCallback, TrainerState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sdft_ds.distributed import zero
from tests.helpers import tiny
from tests.helpers.trainers import PROBE, Recorder, digest, make_trainer, shadow_pieces, teacher_logits, trainable


def resume(stage, folder: str, **settings) -> dict[str, Any]:
    """Five steps in one go, and three, a new trainer, two more; what both end with."""
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6}  # another rate at every step
    settings = {"teacher_update_rate": 0.3, "teacher_sync_steps": 1, **warmup, **settings}
    ends = []
    for steps, again in ((5, None), (3, None), (5, f"{folder}/parts/checkpoint-3")):
        recorder = Recorder()
        part = "whole" if len(ends) == 0 else "parts"
        trainer = make_trainer(
            stage, callbacks=[recorder], max_steps=steps, output_dir=f"{folder}/{part}", save_strategy="steps",
            save_steps=3, **settings,
        )  # fmt: skip
        recorder.trainer = trainer
        start = {}

        class Begin(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                start.update(_state(trainer))  # noqa: B023

        trainer.add_callback(Begin())
        trainer.train(resume_from_checkpoint=again)
        ends.append(
            {
                "start": start,
                "losses": [log["loss"] for log in recorder.logs if "loss" in log],
                "rates": [log["learning_rate"] for log in recorder.logs if "loss" in log],
                "completions": recorder.completions,
                **_state(trainer),
            }
        )
    return {"whole": ends[0], "resumed": ends[2], "first": ends[1]}


def _state(trainer) -> dict[str, str]:
    """Fingerprints of weights and teacher."""
    weights = digest(zero.full_copies(trainable(trainer)))
    return {"weights": weights, "teacher": digest(tensor for _, _, tensor in shadow_pieces(trainer))}


def exports(stage, folder: str, **settings) -> dict[str, Any]:
    """A saved teacher, loaded, beside the teacher itself; DeepSpeed's fp32 weights of the checkpoint, and ours."""
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "teacher_update_rate": 0.3, **settings}
    trainer = make_trainer(stage, output_dir=folder, save_strategy="steps", save_steps=3, **settings)
    trainer.train()
    ours = teacher_logits(trainer)
    trainable = {name: param for name, param in trainer.model.named_parameters() if param.requires_grad}
    copies = dict(zip(trainable, zero.full_copies(list(trainable.values())), strict=True))
    trainer.save_teacher(f"{folder}/teacher")
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()  # or the loaded model is sharded as well
    base = tiny.llama() if settings.get("lora") else None
    loaded = PeftModel.from_pretrained(base, f"{folder}/teacher") if base else type(tiny.llama()).from_pretrained(
        f"{folder}/teacher", dtype=torch.float32
    )  # fmt: skip
    with torch.no_grad():
        saved = loaded.eval()(PROBE).logits
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    fp32 = get_fp32_state_dict_from_zero_checkpoint(f"{folder}/checkpoint-3")
    worst = max((fp32[name] - copies[name]).abs().max().item() for name in trainable)
    return {"teacher": (saved - ours).abs().max().item(), "fp32": worst}


def whole_at_on_save(stage, folder: str) -> bool:
    """Whether this rank finds the last file of a checkpoint at on_save, though rank 0 is slow in writing it."""
    found, write = [], TrainerState.save_to_json

    def slowly(self, path):
        time.sleep(1)
        write(self, path)

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(os.path.exists(f"{folder}/checkpoint-1/trainer_state.json"))

    TrainerState.save_to_json = slowly
    try:
        make_trainer(stage, callbacks=[Look()], max_steps=1, output_dir=folder, save_strategy="steps").train()
    finally:
        TrainerState.save_to_json = write
    return found == [True]
