"""Losses that are not finite, on one rank."""

from typing import Any

from transformers import TrainerCallback

from sdft_ds.distributed import zero
from tests.helpers.trainers import Recorder, digest, make_trainer, shadow_pieces, trainable


def one_bad_step(stage, poisoned: list[int], **settings) -> dict[str, Any]:
    """Weights and teacher after each step; at the given ones rank 0's loss is not a number."""
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1, "max_steps": 4, "weight_decay": 0.1, **settings}
    recorder = Recorder()
    trainer = make_trainer(stage, callbacks=[recorder], **settings)
    after, plain = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        loss = plain(*args, **kwargs)
        bad = trainer.state.global_step + 1 in poisoned and trainer.args.process_index == 0
        return loss * float("nan") if bad else loss

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            weights = digest(zero.full_copies(trainable(trainer)))
            after.append((weights, digest(tensor for _, _, tensor in shadow_pieces(trainer))))

    trainer.compute_loss = compute_loss
    trainer.add_callback(Look())
    trainer.train()
    logs = [log for log in recorder.logs if "loss" in log]
    return {"after": after, "losses": [log["loss"] for log in logs], "bad": [log["steps/nonfinite"] for log in logs]}
