import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from sdft_ds import SDFTConfig, SDFTTrainer, report
from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.demo.run import RECIPE
from sdft_ds.demo.world import questions, train_rows
from sdft_ds.evaluation import retention
from sdft_ds.evaluation.task_evaluation import FIGURES, TaskEvaluation
from sdft_ds.evaluation.tasks import Task, TaskRow
from tests.distributed.scenarios import task_evaluation
from tests.helpers.trainers import make_trainer


def lines(folder, task=None):
    found = [json.loads(text) for text in Path(folder, "evaluations.jsonl").read_text().splitlines()]
    return [line for line in found if task in (None, line["task"])]


def demo(folder, steps):
    """The demo's training, asked before, in the middle and after."""
    args = {**RECIPE, "output_dir": str(folder), "per_device_eval_batch_size": 64, "disable_tqdm": True,
            "max_steps": steps, "logging_steps": steps // 4}  # fmt: skip
    trainer = SDFTTrainer(
        model=str(MODEL_DIR),
        args=SDFTConfig(**args),
        train_dataset=Dataset.from_list(train_rows()),
        processing_class=AutoTokenizer.from_pretrained(MODEL_DIR),
    )

    def rows(group):
        return [TaskRow(each.messages, each.answer, "exact") for each in questions() if each.group == group]

    tasks = [Task("new", rows("new_held_out")), Task("retention", rows("old"))]
    trainer.add_callback(TaskEvaluation(trainer, tasks, every=steps // 2))
    trainer.train()
    return trainer.state.log_history


@pytest.mark.full
def test_what_the_demo_learns_and_keeps(tmp_path):
    demo(tmp_path, 120)
    new, old = lines(tmp_path, "new"), lines(tmp_path, "retention")
    assert [line["step"] for line in new] == [line["step"] for line in old] == [0, 60, 120]
    assert new[0]["accuracy"] == 0.0 and new[-1]["accuracy"] >= 0.95
    assert old[0]["accuracy"] == 1.0 and old[-1]["accuracy"] >= 0.97
    assert old[0]["kl_to_start"] == 0.0 < old[1]["kl_to_start"] and 0 < old[2]["kl_to_start"] < 0.5
    assert new[0]["rows"] == 64 and new[0]["clipped_share"] == 0.0 and 3 < new[0]["mean_length"] < 10
    assert set(old[0]) == {"step", "task", "rows", *FIGURES} and "kl_to_start" not in new[0]


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A few steps of it: the folder, and what was logged."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, demo(folder, 8)


def test_the_page_at_the_end_shows_them(begun):
    folder, _ = begun
    left = (folder / "report.html").read_text()
    report.write(folder)
    assert left == (folder / "report.html").read_text()


def test_the_answers_are_kept_with_their_scores(begun):
    folder, _ = begun
    rows = [json.loads(text) for text in (folder / "evaluations" / "new-step-8.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and set(rows[0]) == {"prompt", "completion", "answer", "score"}
    assert sum(row["score"] for row in rows) / 64 == lines(folder, "new")[-1]["accuracy"]
    assert all(row["score"] == (row["completion"] == row["answer"]) for row in rows)


def test_the_figures_are_logged_and_no_other_line_is_lost(begun):
    folder, history = begun
    logged = [log for log in history if "tasks/new/accuracy" in log]
    assert [log["step"] for log in logged] == [0, 4, 8]
    assert logged[-1]["tasks/retention/kl_to_start"] == lines(folder, "retention")[-1]["kl_to_start"]
    assert [log["step"] for log in history if "loss" in log] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        *(
            pytest.param(s, marks=pytest.mark.full)
            for s in ({"lora": "head saved"}, {"rollout_backend": "continuous"})
        ),
    ],
)
def test_training_is_bit_by_bit_that_without_questions(tmp_path, settings):
    asked = task_evaluation.examined(None, str(tmp_path / "asked"), every=1, **settings)
    plain = task_evaluation.examined(None, str(tmp_path / "plain"), tasks=False, **settings)
    for what in ("losses", "completions", "weights", "random"):
        assert asked[what] == plain[what], what


def trainer_with_questions(folder, tasks=None, **settings):
    trainer = make_trainer(output_dir=str(folder), save_strategy="steps", save_steps=2, **{"max_steps": 4, **settings})
    trainer.add_callback(TaskEvaluation(trainer, tasks or task_evaluation.questions()))
    return trainer


def test_a_resumed_run_keeps_the_figures_and_the_start_that_it_has(tmp_path):
    trainer_with_questions(tmp_path / "whole").train()
    trainer_with_questions(tmp_path / "parts", max_steps=2).train()
    before, start = lines(tmp_path / "parts")[:2], tmp_path / "parts/evaluations/retention.safetensors"
    written = start.read_bytes(), start.stat().st_mtime_ns
    resumed = trainer_with_questions(tmp_path / "parts")
    resumed.train(resume_from_checkpoint=True)
    assert (start.read_bytes(), start.stat().st_mtime_ns) == written
    kept = lines(tmp_path / "parts")
    assert kept[:2] == before and [line["step"] for line in kept] == [0, 0, 2, 2, 4, 4]
    assert kept[:2] + kept[4:] == lines(tmp_path / "whole")
    assert not any("tasks/vowels/accuracy" in log and log["step"] == 0 for log in resumed.state.log_history[6:])


def test_a_run_that_starts_anew_in_the_folder_replaces_what_is_there(tmp_path):
    trainer_with_questions(tmp_path).train()
    first = lines(tmp_path)
    trainer_with_questions(tmp_path, max_steps=2).train()
    assert [line["step"] for line in lines(tmp_path)] == [0, 0, 2, 2] and lines(tmp_path)[:2] == first[:2]


def test_a_resume_refuses_a_retention_set_without_its_start(tmp_path):
    trainer_with_questions(tmp_path, max_steps=2).train()
    other = [Task("retention", task_evaluation.questions()[0].rows[:3])]
    with pytest.raises(ValueError, match="was made for other prompts"):
        trainer_with_questions(tmp_path, other).train(resume_from_checkpoint=True)
    (tmp_path / "evaluations/retention.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="retention_file"):
        trainer_with_questions(tmp_path).train(resume_from_checkpoint=True)


def test_a_run_that_is_told_to_leave_asks_nothing_more(tmp_path):
    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                (tmp_path / "STOP").touch()

    trainer = trainer_with_questions(tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(SystemExit):
        trainer.train()
    assert {line["step"] for line in lines(tmp_path)} == {0}


def test_the_best_checkpoint_is_the_one_with_the_best_figure_of_a_task(tmp_path):
    """Each evaluation asks the tasks, though nothing else would have it do so, and tells their figures."""
    trainer = trainer_with_questions(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_tasks/retention/kl_to_start", per_device_eval_batch_size=2, num_generations_eval=1,
    )  # fmt: skip
    trainer.eval_dataset = {"a": trainer.eval_dataset.select([0, 1]), "b": trainer.eval_dataset.select([2, 3])}
    asked = trainer.callback_handler.callbacks[-1].examination
    taken, take = [], asked.evaluate
    asked.evaluate = lambda: taken.append(trainer.state.global_step) or take()
    trainer.train()
    assert taken == [0, 2, 4, 4]  # the last time of the best model, which was put back
    history = trainer.state.log_history
    moved = {line["step"]: line["eval_tasks/retention/kl_to_start"] for line in history if "eval_b_loss" in line}
    assert 0 < moved[2] < moved[4]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert trainer.state.best_metric == moved[2] == lines(tmp_path, "retention")[-1]["kl_to_start"]
    assert trainer.evaluate()["eval_tasks/retention/kl_to_start"] == moved[2]
    assert not [name for name in trainer.evaluate(metric_key_prefix="mine") if "tasks" in name]


def asked_and_compared(folder, monkeypatch, tokens):
    """The last KL from the start, how many rows each call of a run generated for questions, and the shapes of the
    forwards that compare."""
    trainer = trainer_with_questions(folder, max_steps=2, scoring_batch_tokens=tokens, per_device_eval_batch_size=2)
    asked, shapes, generate, view = [], [], trainer.rollouts.generate, retention._view

    def generating(prompts, keys, **options):
        asked.extend([len(prompts)] if options else [])
        return generate(prompts, keys, **options)

    def comparing(*args):
        made = view(*args)
        shapes.append(made[0].input_ids_LT.shape)
        return made

    monkeypatch.setattr(retention, "_view", comparing)
    trainer.rollouts.generate = generating
    trainer.train()
    monkeypatch.undo()
    return lines(folder, "retention")[-1]["kl_to_start"], asked, shapes


def test_questions_are_asked_together_and_compared_with_the_start_in_forwards_that_fit(tmp_path, monkeypatch):
    whole, asked, shapes = asked_and_compared(tmp_path / "whole", monkeypatch, 16384)
    assert asked == [5, 6, 5, 6] and len(shapes) == 2  # before training and after it
    parts, asked, shapes = asked_and_compared(tmp_path / "parts", monkeypatch, 120)
    assert asked == [5, 6, 5, 6] and len(shapes) > 2 and all(shape.numel() <= 120 for shape in shapes)
    assert parts == pytest.approx(whole, rel=1e-5) and parts > 0


def test_without_answers_there_is_no_accuracy(tmp_path):
    rows = [TaskRow("Tell a story.", None, "exact"), TaskRow("And another.", None, "exact")]
    trainer_with_questions(tmp_path, [Task("retention", rows)], max_steps=2).train()
    before, after = lines(tmp_path)
    assert "accuracy" not in before and before["kl_to_start"] == 0.0 < after["kl_to_start"]


def test_refusals(tmp_path):
    long = [Task("long", [TaskRow("short", "a", "exact"), TaskRow("x" * 505, "a", "exact")])]
    with pytest.raises(ValueError, match="Task long: Row 1 has 505 tokens; .* context of 512"):
        trainer_with_questions(tmp_path, long)
    fits = [Task("fits", [TaskRow("x" * 504, "a", "exact")])]
    trainer = trainer_with_questions(tmp_path, fits)
    with pytest.raises(ValueError, match="eval_tasks_steps must be at least 1"):
        TaskEvaluation(trainer, fits, every=0)
    for metric, words in (
        ("eval_tasks/new/accuracy", "no such metric; there are tasks/fits/accuracy, tasks/fits/mean_length"),
        ("tasks/fits/accuracy", "compared in evaluations, and there are none: set eval_strategy"),
    ):
        trainer.args.metric_for_best_model = metric
        with pytest.raises(ValueError, match=words):
            TaskEvaluation(trainer, fits)
