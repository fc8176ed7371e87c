"""Trainers of the tiny Llama on real engines, in one process or on every rank, and what tests compare of the runs."""

import hashlib
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer
from sdft_ds.distributed import zero
from sdft_ds.model.modes import evaluating
from sdft_ds.trainer import TRAINERS
from tests.helpers import tiny

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"

SETTINGS = {
    "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2,
    "max_completion_length": 8, "save_strategy": "no", "report_to": "none", "bf16": False, "learning_rate": 1e-2,
    "disable_tqdm": True, "activation_checkpointing": False, "lr_scheduler_type": "constant", "seed": 5,
    "adam_epsilon": 1e-3,  # so that Adam does not blow rounding in tiny gradients up to whole updates
}  # fmt: skip

ADAPTERS = {
    True: LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_dropout=0.0),
    "on the head": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj", "lm_head"], r=4),
    "head saved": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4, modules_to_save=["lm_head"]),
}
PROBE = torch.arange(20).view(2, 10) * 7 % 250


class Recorder(TrainerCallback):
    """Losses and gradient norms of every step, and the completions of every generation batch."""

    def __init__(self):
        self.logs, self.completions, self.rollouts = [], [], []
        self.trainer = None  # set it to record rollouts as well

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer is not None:
            self.rollouts.append([scored.batch.rollouts for scored in self.trainer.current_batch.scored])

    def on_self_distillation_batch_prepared(self, args, state, control, completion_ids=None, **kwargs):
        self.completions.append(completion_ids.tolist())


def grown_student(lora: bool | str, tied: bool = True, **sizes: int):
    """The tiny Llama; its adapter is one that was trained, so that a teacher without it is another model.

    Made on the rank that uses it: a tensor that is sent to two processes is shared memory, trained by both.
    """
    model = tiny.llama(tie_word_embeddings=tied, **sizes)
    if lora:
        torch.manual_seed(11)
        model = get_peft_model(model, ADAPTERS[lora])
        for name, param in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                torch.nn.init.normal_(param, std=0.1)
    return model


def make_trainer(
    stage: int | None = None,
    lora: bool | str = False,
    grown: bool = False,
    tied: bool = True,
    model: Any = None,
    callbacks=(),
    rows=6,
    stream=False,
    config=SDFTConfig,
    peft_config=None,
    anchors=None,
    functions=None,
    **settings,
):
    """A trainer of the tiny Llama; stage None: without DeepSpeed. anchors: their rows; functions: by the names of the
    trainer's arguments."""
    if stage is not None:
        settings["deepspeed"] = str(DS_CONFIGS / f"zero{stage}.json")
    args = config(**{**SETTINGS, "output_dir": tempfile.mkdtemp(), **settings})
    dataset = Dataset.from_list(rows if isinstance(rows, list) else tiny.rows(rows))
    return TRAINERS[args.method](
        model=grown_student(lora, tied) if grown else model or tiny.llama(),
        args=args,
        train_dataset=dataset.to_iterable_dataset() if stream else dataset,
        eval_dataset=dataset,
        processing_class=tiny.tokenizer(),
        callbacks=list(callbacks),
        peft_config=ADAPTERS[lora] if lora and not grown else peft_config,
        anchor_dataset=None if anchors is None else Dataset.from_list(anchors),
        **(functions or {}),
    )


def train(stage: int | None = None, resume: bool = False, **settings) -> dict[str, Any]:
    """Train a few steps; (losses, gradient norms, the trained weights, completions) of this rank."""
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    steps = [log for log in recorder.logs if "loss" in log]
    names, params = zip(*((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad), strict=True)
    return {
        "losses": [log["loss"] for log in steps],
        "grad_norms": [log.get("grad_norm") for log in steps],
        "weights": dict(zip(names, (copy.float() for copy in zero.full_copies(list(params))), strict=True)),
        "completions": recorder.completions,
        "logs": steps,
        "rollouts": recorder.rollouts,
        "teacher_logits": teacher_logits(trainer),
        "shadow": shadow_pieces(trainer),
    }


def evaluate(stage: int | None = None, **settings) -> float:
    return make_trainer(stage, **settings).evaluate()["eval_loss"]


def trainable(trainer: Any) -> list[torch.nn.Parameter]:
    return [param for param in trainer.model.parameters() if param.requires_grad]


@torch.no_grad()
def teacher_logits(trainer: SDFTTrainer) -> torch.Tensor:
    """The teacher's logits on fixed tokens, as the trainer's scoring pass would see them; without one the model's."""
    engine = trainer.model_wrapped
    weights = trainer.teacher.weights(engine) if hasattr(trainer, "teacher") else nullcontext()
    with zero.scoring_pass(engine), evaluating(engine), weights:
        return _logits(engine, trainer.args.device)


@torch.no_grad()
def student_logits(trainer: SDFTTrainer) -> torch.Tensor:
    engine = trainer.model_wrapped
    with zero.scoring_pass(engine), evaluating(engine):
        return _logits(engine, trainer.args.device)


def _logits(engine: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Of fixed tokens, on the CPU."""
    tokens = PROBE.to(device)
    return engine(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits.float().cpu()


def shadow_pieces(trainer: SDFTTrainer) -> list[tuple[str, int, torch.Tensor]]:
    """(name, offset, values) of what this rank holds of the teacher."""
    values = getattr(getattr(trainer, "teacher", None), "values", {})
    if not values:
        return []
    pieces = zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable)
    return [(piece.name, piece.offset, values[piece.name].cpu()) for piece in pieces]


def state_of(model) -> list:
    """What a teacher pass must leave as it was."""
    return [
        [(name, module.training, getattr(module, "p", None)) for name, module in model.named_modules()],
        [(name, param.requires_grad, param.grad is None) for name, param in model.named_parameters()],
        getattr(model, "active_adapters", None),
    ]


def digest(tensors) -> str:
    """A fingerprint of values, bit by bit."""
    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
