"""Runs that are asked questions."""

from typing import Any

import torch

from sdft_ds.distributed import zero
from sdft_ds.evaluation.task_evaluation import TaskEvaluation
from sdft_ds.evaluation.tasks import Task, TaskRow
from sdft_ds.preview.teacher_check import CheckTeacher
from tests.helpers.trainers import Recorder, digest, make_trainer, state_of, trainable


def questions(n: int = 5) -> list[Task]:
    """A task and a retention set; what a random model says is right now and then."""
    prompts = [f"{i} " + "what is it? " * (3 * i % 5) for i in range(n)]
    rows = [TaskRow([{"role": "user", "content": text}], "[a-m]", "regex") for text in prompts]
    return [Task("vowels", rows), Task("retention", [*rows[:2], TaskRow("Tell a story.", None, "exact"), *rows[2:]])]


def examined(
    stage, folder: str, every: int | None = 2, tasks: bool = True, check_rows: int = 0, **settings
) -> dict[str, Any]:
    """Train four steps, asked questions or not; what training came to, and what was logged. check_rows: of the check
    of the teacher before."""
    recorder = Recorder()
    trainer = make_trainer(
        stage, callbacks=[recorder], max_steps=4, output_dir=folder, per_device_eval_batch_size=2, **settings
    )
    recorder.trainer = trainer
    before = state_of(trainer.model)
    if tasks:
        trainer.add_callback(TaskEvaluation(trainer, questions(), every))
    if check_rows:
        trainer.add_callback(CheckTeacher(trainer, check_rows))
    trainer.train()
    assert [part[:2] for part in state_of(trainer.model)[0]] == [part[:2] for part in before[0]]
    return {
        "losses": [log["loss"] for log in recorder.logs if "loss" in log],
        "logged": [log for log in recorder.logs if "tasks/vowels/accuracy" in log],
        "completions": recorder.completions,
        "weights": digest(zero.full_copies(trainable(trainer))),
        "random": torch.random.get_rng_state().tolist(),
    }
