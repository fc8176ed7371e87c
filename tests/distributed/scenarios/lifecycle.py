"""Trainers one after the other, and used again."""

import torch
from datasets import Dataset
from transformers import TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer
from sdft_ds.distributed import engines, zero
from tests.helpers import tiny
from tests.helpers.trainers import ADAPTERS, SETTINGS, Recorder, digest, make_trainer, train


def in_turn(stage, actions: list[str], again: bool = False, **settings) -> list[float]:
    """What one trainer, or with `again` as many as actions on one model, has for losses: of each step of a `train`, of
    an `evaluate`."""
    settings = {"per_device_eval_batch_size": 2, "teacher_sync_steps": 1, "teacher_update_rate": 0.3, "max_steps": 2,
                **settings}  # fmt: skip
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    for i, action in enumerate(actions):
        if again and i:
            trainer = make_trainer(stage, callbacks=[recorder], **{**settings, "model": trainer.model, "lora": False})
        getattr(trainer, action)()
    logs = [log for log in recorder.logs if "loss" in log or "eval_loss" in log]
    assert all(log.get("eval_completions/loss_tokens", 1) > 0 for log in logs)  # metrics are in the right line
    return [log.get("loss", log.get("eval_loss")) for log in logs]


def side_by_side(stages, **settings) -> list[float]:
    """Losses of trainers that were all built, on one model, before the last of them trained, and then those before."""
    model, trainers = tiny.llama(), []
    for stage in stages:
        recorder = Recorder()
        trainers.append((make_trainer(stage, model=model, callbacks=[recorder], max_steps=2, **settings), recorder))
    found = []
    for stage, (trainer, recorder) in reversed(list(zip(stages, trainers, strict=True))):
        trainer.train()
        assert engines.stage(trainer.model_wrapped) == (stage or 0)
        found += [log["loss"] for log in recorder.logs if "loss" in log]
    return found


def one_config(stage) -> list[str]:
    """What trainers make of a model, one after the other, that share their settings; these stay as they were."""
    args = make_trainer(stage).args
    args = SDFTConfig(**SETTINGS, output_dir=args.output_dir, deepspeed=args.deepspeed)
    before, found = args.to_dict(), []
    for lora, width in ((True, 32), (None, 64), (True, 32)):
        trainer = SDFTTrainer(tiny.llama(hidden_size=width), args, Dataset.from_list(tiny.rows()),
                              processing_class=tiny.tokenizer(), peft_config=ADAPTERS.get(lora))  # fmt: skip
        trainer.train()
        found.append(f"{trainer.args.teacher_model_kind} {digest(zero.full_copies(list(trainer.model.parameters())))}")
    assert args.to_dict() == before
    return found


def taken_over(stage) -> list[str]:
    """What is said to those who come too late: a trainer that evaluates when another has trained its model since, and
    one without ZeRO for a model that ZeRO-3 has sharded."""
    first = make_trainer(stage)
    first.train()
    make_trainer(stage, model=first.model).train()
    said = []
    for attempt in (first.evaluate, lambda: make_trainer(None, model=first.model)):
        try:
            attempt()
        except ValueError as error:
            said.append(str(error))
    return said


def stopped(stage, **settings) -> list[float]:
    """A run that ends by an exception after its first step, and then a whole one of another trainer."""

    class Stop(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyError("on purpose")

    trainer = make_trainer(stage, callbacks=[Stop()], **settings)
    try:
        trainer.train()
    except KeyError:
        pass
    trainer = make_trainer(stage, callbacks=[recorder := Recorder()], model=trainer.model, **settings)
    trainer.train()
    return [log["loss"] for log in recorder.logs if "loss" in log]


def save_headless(folder) -> None:
    """A model whose head is not among the weights that are saved: loading it draws one."""
    model = tiny.llama(tie_word_embeddings=False)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(folder, state_dict=weights)


def run_twice(stage, **settings) -> list[tuple[list[float], str]]:
    """Losses and weights of two runs with one seed, whatever the process has drawn before."""
    found = []
    for drawn in (1, 2):
        torch.manual_seed(drawn)
        result = train(stage, **settings)
        found.append((result["losses"], digest(result["weights"].values())))
    return found
