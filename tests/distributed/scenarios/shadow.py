"""The teacher's shadow: swapped in and out, and averaged."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from sdft_ds.distributed import zero
from tests.helpers.trainers import Recorder, digest, make_trainer, state_of, teacher_logits, trainable


def swap_leaves_the_student_alone(stage, extra_pass: bool, **settings) -> str:
    """Train, with or without one more swap before every step; the trained weights, bit by bit."""
    trainer = make_trainer(stage, teacher_model_kind="ema", teacher_sync_steps=1, max_steps=3, **settings)
    if extra_pass:
        plain = trainer.get_batch_samples

        def get_batch_samples(*args):
            inputs = plain(*args)
            before = state_of(trainer.model)
            teacher_logits(trainer)
            assert state_of(trainer.model) == before
            return inputs

        trainer.get_batch_samples = get_batch_samples
    trainer.train()
    return digest(zero.full_copies(trainable(trainer)))


def average(stage, rate: float, **settings) -> dict[str, Any]:
    """An EMA teacher's pieces after some steps, beside an average of the student's masters made independently."""
    trainer = make_trainer(stage, teacher_model_kind="ema", teacher_update_rate=rate, teacher_sync_steps=1, **settings)
    expected, start = {}, {}

    class Follow(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            for piece in zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable):
                start[piece.name] = expected[piece.name] = piece.values.float().clone().double()

        def on_step_end(self, *args, **kwargs):
            for piece in zero.local_shards(trainer.model_wrapped, trainer.teacher.trainable):
                expected[piece.name] = (1 - rate) * expected[piece.name] + rate * piece.values.double()

    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(Follow())
    trainer.add_callback(recorder)
    trainer.train()
    off = moved = 0.0
    for name, values in trainer.teacher.values.items():
        off += (values.double() - expected[name]).square().sum().item()
        moved += (expected[name] - start[name]).square().sum().item()
    drift = [log["teacher/distance"] for log in recorder.logs if "teacher/distance" in log]
    return {"off": off**0.5, "moved": moved**0.5, "drift": drift}


@contextmanager
def copies_to_the_device() -> Iterator[list[int]]:
    """As on a GPU whose weights, masters and shadow are in host memory: each `to` copies. Yields how many copies were
    alive after each."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    counts: list[int] = []
    plain = torch.Tensor.to

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = plain(tensor, *args, **kwargs)
        found = found.clone() if found is tensor or found.data_ptr() == tensor.data_ptr() else found
        alive.add(found)
        counts.append(len(alive))
        return found

    torch.Tensor.to = to
    try:
        yield counts
    finally:
        del torch.Tensor.to


def copies_of_a_teachers_work(stage: int, **settings) -> dict[str, list[int]]:
    """Copies on the device in each part of an EMA teacher's work after a step of training."""
    trainer = make_trainer(stage, teacher_model_kind="ema", teacher_sync_steps=1, max_steps=1, **settings)
    trainer.train()
    teacher, engine = trainer.teacher, trainer.model_wrapped
    found = {}
    with torch.no_grad(), copies_to_the_device() as found["swap"], teacher.weights(engine):
        found["swap in"] = list(found["swap"])
    with copies_to_the_device() as found["update"]:
        teacher.after_step(engine, 1)
    with copies_to_the_device() as found["drift"]:
        teacher.drift(engine)
    return found
