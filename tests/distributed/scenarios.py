"""What two-rank tests run on every rank; each function also runs alone, in one process without a launcher."""

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer, zero
from tests import tiny

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

SETTINGS = {
    "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2,
    "max_completion_length": 8, "save_strategy": "no", "report_to": "none", "bf16": False, "learning_rate": 1e-2,
    "disable_tqdm": True, "activation_checkpointing": False, "lr_scheduler_type": "constant", "seed": 5,
    "adam_epsilon": 1e-3,  # so that Adam does not blow rounding in tiny gradients up to whole updates
}  # fmt: skip


class Recorder(TrainerCallback):
    """Losses and gradient norms of every step, and the completions of every generation batch."""

    def __init__(self):
        self.logs, self.completions = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_self_distillation_batch_prepared(self, args, state, control, completion_ids=None, **kwargs):
        self.completions.append(completion_ids.tolist())


def make_trainer(stage: int | None = None, lora: bool = False, model: Any = None, callbacks=(), rows=6, **settings):
    """A trainer of the tiny Llama; stage None: without DeepSpeed."""
    if stage is not None:
        settings["deepspeed"] = str(DS_CONFIGS / f"zero{stage}.json")
    args = SDFTConfig(**{**SETTINGS, "output_dir": tempfile.mkdtemp(), **settings})
    dataset = Dataset.from_list(tiny.rows(rows))
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=True)
    return SDFTTrainer(
        model=model or tiny.llama(),
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        peft_config=adapter if lora else None,
    )


def train(stage: int | None = None, **settings) -> dict[str, Any]:
    """Train a few steps; (losses, gradient norms, the trained weights, completions) of this rank."""
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    trainer.train()
    steps = [log for log in recorder.logs if "loss" in log]
    names, params = zip(*((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad), strict=True)
    return {
        "losses": [log["loss"] for log in steps],
        "grad_norms": [log.get("grad_norm") for log in steps],
        "weights": dict(zip(names, (copy.float() for copy in zero.full_copies(list(params))), strict=True)),
        "completions": recorder.completions,
        "logs": steps,
    }


def evaluate(stage: int | None = None, **settings) -> float:
    return make_trainer(stage, **settings).evaluate()["eval_loss"]


def digest(tensors) -> str:
    """A fingerprint of values, bit by bit."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
