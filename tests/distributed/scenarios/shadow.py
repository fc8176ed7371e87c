"""The teacher's shadow: swapped in and out, and averaged."""

from typing import Any

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
