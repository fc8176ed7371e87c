"""What a run leaves beside its weights, by real runs of a tiny model, read back as the report reads it."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sdft_ds.metrics import completions, run_folder
from sdft_ds.metrics.meters import METRICS
from tests.helpers.trainers import make_trainer, train

RUN = {"max_steps": 4, "log_completions": 2, "log_completions_rows": 3, "num_generations": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(None, output_dir=str(folder), per_device_train_batch_size=4, **RUN)
    trainer.train()
    return trainer, run_folder.read(folder)


def test_the_log_is_that_of_the_trainer(run):
    trainer, read = run
    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["loss"] for line in read.log if "loss" in line] == [line["loss"] for line in history]
    assert {"divergence/p90", "entropy/teacher", "agreement/argmax", "divergence/position_4_16"} <= read.log[0].keys()
    assert all(line["time"] > 1.7e9 for line in read.log)


def test_completions_agree_with_the_metrics(run):
    """All rows of a step were kept, so their tokens' divergences are those that the step's metrics are made of."""
    trainer, read = run
    assert sorted(read.completions) == [1, 2, 4]
    assert {rows for _, rows in read.completions.values()} == {3}
    made = make_trainer(None, output_dir=str(read.folder / "all"), per_device_train_batch_size=4,
                        **{**RUN, "log_completions_rows": 8})  # fmt: skip
    made.train()
    again = run_folder.read(read.folder / "all")
    for step in again.completions:
        kept = again.completions_of(step, 100)
        log = next(line for line in again.log if line["step"] == step)
        divergences = [value for each in kept for value in each.divergence if value is not None]
        assert len(divergences) == log["completions/loss_tokens"]
        assert sum(divergences) / len(divergences) == pytest.approx(log["sdft/distillation_loss"], rel=1e-5)
        for each in kept:
            assert len(each.tokens) == len(each.divergence) == len(each.student_top) == each.length
            assert each.prompt != each.teacher_prompt
            assert all(len(top) == 5 and sum(t["p"] for t in top) <= 1 + 1e-6 for top in each.student_top)


def test_a_tracker_that_counts_steps_itself_keeps_the_table(monkeypatch):
    """As wandb does: every log without a step is one, and what names a step that has passed is dropped."""

    class Counting(ModuleType):
        Table, kept = staticmethod(lambda columns, data: data), []

        def log(self, data, step=None):
            if step is None or step >= len(self.kept):
                self.kept.append(data)

    monkeypatch.setitem(sys.modules, "wandb", Counting("wandb"))
    monkeypatch.setattr(completions, "is_wandb_available", lambda: True)
    wandb = sys.modules["wandb"]
    for line in ("loss", "eval_loss", "tasks/new/accuracy"):  # three of transformers' lines at each of two steps
        wandb.log({line: 1.0})
        wandb.log({line: 0.5})
    completions._to_trackers(["wandb"], [["a row"]], step=2)
    assert wandb.kept[-1] == {"completions": [["a row"]], "train/global_step": 2}


def test_run_json_and_the_page(run):
    trainer, read = run
    assert read.about["method"] == "sdft" and read.about["config"]["num_generations"] == 1
    assert read.about["finished"] > read.about["started"] and "torch" in read.about["versions"]
    assert read.about["environment"]["world_size"] == 1
    assert "<html" in (read.folder / "report.html").read_text()


def test_looking_changes_nothing(tmp_path):
    losses = []
    for settings in ({"inspect_tokens": 0, "log_completions": 0}, {"inspect_tokens": 16, "log_completions": 1}):
        trainer = make_trainer(None, output_dir=str(tmp_path / str(len(losses))), max_steps=3, **settings)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]
    assert not (tmp_path / "0" / "completions").exists()
    assert "entropy/student" not in json.loads((tmp_path / "0" / "metrics.jsonl").read_text().splitlines()[0])


def test_a_report_that_fails_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sdft_ds.report.write", lambda folder: 1 / 0)
    trainer = make_trainer(None, output_dir=str(tmp_path), max_steps=1)
    with pytest.warns(UserWarning, match="report was not written: ZeroDivisionError"):
        trainer.train()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_see_what_one_sees(two_ranks, tmp_path, stage):
    """The metrics of the first step: every rank looks at all of its tokens."""
    settings = {"max_steps": 1, "inspect_tokens": 1000, "num_generations": 1}
    trainer = make_trainer(None, output_dir=str(tmp_path), per_device_train_batch_size=4, **settings)
    trainer.train()
    one = next(line for line in trainer.state.log_history if "loss" in line)
    two = two_ranks.run(train, stage, per_device_train_batch_size=2, **settings)[0]["logs"][0]
    for name in one:
        if name.startswith(("divergence", "entropy", "agreement", "topk", "completions", "sdft")):
            torch.testing.assert_close(torch.tensor(two[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-6)


def test_the_readme_tells_of_every_metric_as_the_table_does():
    readme = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for name, metric in METRICS.items():
        meaning = metric.meaning.replace("|", "&#124;")
        assert f"| `{name}` | {metric.unit} | {metric.reduction} | {meaning} |" in readme
