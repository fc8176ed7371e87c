"""The examples of docs/extending.md, as they stand there."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdft_ds import teacher
from sdft_ds.config.rollouts import ROLLOUT_BACKENDS
from sdft_ds.config.teacher import TEACHER_KINDS
from sdft_ds.loss import divergence
from sdft_ds.rollouts import sampler
from tests.helpers.trainers import make_trainer, train

ROOT = Path(__file__).parents[1]
EXAMPLES = dict(
    re.findall(r"`(\w+)\.py`:.*?```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
)
FLAGS = {name: re.search(rf"deepspeed {name}.py (.*)", text)[1].split() for name, text in EXAMPLES.items()}


@pytest.fixture(autouse=True)
def tables_as_before():
    lists, dicts = (
        [TEACHER_KINDS, ROLLOUT_BACKENDS],
        [
            divergence.MODES,
            teacher.KINDS,
            sampler.BACKENDS,
        ],
    )
    saved = copy.deepcopy((lists, dicts))
    yield
    for table, before in zip(lists, saved[0], strict=True):
        table[:] = before
    for table, before in zip(dicts, saved[1], strict=True):
        table.clear()
        table.update(before)


def load(name: str) -> None:
    exec(EXAMPLES[name], {"__name__": name})


def test_a_teacher():
    """At step 3 of 4 the snapshot was taken, and is the student then; one step later the student has gone on."""
    load("snapshot")
    taken = train(teacher_model_kind="snapshot", teacher_sync_steps=3, max_steps=4)
    at_three = train(teacher_model_kind="snapshot", teacher_sync_steps=3, max_steps=3)
    torch.testing.assert_close(taken["teacher_logits"], at_three["teacher_logits"])
    pieces = {name: values for name, _, values in at_three["shadow"]}
    assert pieces
    for name, values in pieces.items():
        torch.testing.assert_close(values, at_three["weights"][name].flatten())
    assert any(not torch.equal(pieces[name], taken["weights"][name].flatten()) for name in pieces)


def test_a_divergence():
    load("total_variation")
    trainer = make_trainer(distillation_mode="total_variation", distillation_topk=None, max_steps=1)
    student, other = torch.randn(2, 3, 20).log_softmax(-1)
    expected = 0.5 * (student.exp() - other.exp()).abs().sum(-1)
    torch.testing.assert_close(trainer.args.divergence.per_token(student, other, torch.zeros(3).long()), expected)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["loss"] < 1


def test_a_backend():
    load("one_by_one")
    together, alone = train(max_steps=1), train(max_steps=1, rollout_backend="one_by_one")
    assert together["completions"] == alone["completions"]


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_each_starts_as_the_command_says(tmp_path, name):
    (tmp_path / f"{name}.py").write_text(EXAMPLES[name])
    run = [sys.executable, tmp_path / f"{name}.py", *FLAGS[name], "--max_steps", "2", "--output_dir", tmp_path / "run"]
    ended = subprocess.run(list(map(str, run)), capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_all_three_are_found():
    assert EXAMPLES.keys() == {"snapshot", "total_variation", "one_by_one"}
