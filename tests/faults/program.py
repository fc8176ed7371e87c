"""A small run for tests to kill, preempt and resume; one rank of it, as its environment says.

python -m tests.faults.program OUTPUT_DIR SETTINGS_AS_JSON
"""

import json
import os
import resource
import signal
import sys
import time

import torch

torch.set_num_threads(1)

from transformers import TrainerCallback  # noqa: E402

from sdft_ds.checkpoint import storage  # noqa: E402
from sdft_ds.distributed import shutdown, zero  # noqa: E402
from tests.helpers.trainers import Recorder, digest, make_trainer, shadow_pieces, trainable  # noqa: E402


def me(rank: int) -> bool:
    return int(os.environ.get("RANK", "0")) == rank


class Fault(TrainerCallback):
    """Does something to this rank: at a point of a save (point, step), at a rollout (step), after a step, or when
    all is done."""

    def __init__(self, what: str, when: str, step: int, rank: int, trainer):
        self.what, self.when, self.step, self.rank, self.trainer = what, when, step, rank, trainer
        storage.reached = lambda point: self.at(point)

    def at(self, when: str) -> None:
        if when == self.when and self.trainer.state.global_step == self.step and me(self.rank):
            {
                "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
                "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
                "int": lambda: os.kill(os.getpid(), signal.SIGINT),
                "usr1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
                "stop file": lambda: open(f"{self.trainer.args.output_dir}/STOP", "w").close(),
                "raise": self._raise,
                "small files": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
                "hang": lambda: time.sleep(1000),
                "hang a little": self._hang_a_little,
                "linger": lambda: time.sleep(25),
            }[self.what]()

    def _hang_a_little(self):
        """Says so by a file, and sleeps on whatever signals come."""
        open(f"{self.trainer.args.output_dir}/hanging", "w").close()
        time.sleep(3)

    def _raise(self):
        raise KeyError("on purpose")

    def on_generation_prompts_selected(self, *args, **kwargs):
        self.at("rollout")

    def on_generation_batch_built(self, *args, **kwargs):
        self.at("rolled out")

    def on_step_end(self, *args, **kwargs):
        self.at("step")


def main(output_dir: str, settings: dict) -> None:
    resume, faults, stage = (settings.pop(name, None) for name in ("resume", "faults", "stage"))
    recorder = Recorder()
    trainer = make_trainer(stage, output_dir=output_dir, callbacks=[recorder], **settings)
    made = [Fault(**fault, trainer=trainer) for fault in faults or []]
    for fault in made:
        trainer.add_callback(fault)
    trainer.train(resume_from_checkpoint=resume)
    end = {
        "step": trainer.state.global_step,
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "rates": [log["learning_rate"] for log in trainer.state.log_history if "loss" in log],
        "weights": digest(zero.full_copies(trainable(trainer))),
        "teacher": digest(tensor for _, _, tensor in shadow_pieces(trainer)),
    }
    with open(f"{output_dir}/end-of-rank-{os.environ.get('RANK', '0')}.json", "w") as file:
        json.dump(end, file)
    for fault in made:
        fault.at("end")


if __name__ == "__main__":
    with shutdown.together():
        main(sys.argv[1], json.loads(sys.argv[2]))
