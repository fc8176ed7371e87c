import warnings

import pytest
from transformers import TrainerControl, TrainerState

from sdft_ds import SDFTConfig
from sdft_ds.demo import run as demo
from sdft_ds.demo.world import questions
from sdft_ds.evaluation.task_evaluation import TaskEvaluation
from sdft_ds.evaluation.tasks import Task, TaskRow
from sdft_ds.metrics.collapse import CollapseGuard
from sdft_ds.metrics.meters import _repeated

FINE = {
    "loss": 0.3, "completions/mean_length": 10.0, "completions/clipped_ratio": 0.9, "completions/empty_ratio": 0.1,
    "completions/repeated_ratio": 0.1, "entropy/student": 0.4,
}  # fmt: skip


def told(*logs, fine=FINE, before=(), held=False, **settings):
    """(the warning, the control) after the log lines, each of them `fine` but for the given values. before: the lines
    of the part of the run that is resumed."""
    args = SDFTConfig(output_dir="unused", report_to="none", **settings)
    guard, control, history = CollapseGuard(held), TrainerControl(), [{**fine, **line} for line in before]
    guard.on_train_begin(args, TrainerState(), control)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, changed in enumerate(logs, 1):
            history.append({**fine, **changed})
            guard.on_log(args, TrainerState(global_step=10 * step, log_history=history), control, logs=history[-1])
    assert len(caught) <= 1
    return str(caught[0].message) if caught else None, control


@pytest.mark.parametrize(
    "sign, words",
    [
        ({"completions/repeated_ratio": 0.8}, "0.8 of the completions' 4-grams repeat"),
        ({"completions/empty_ratio": 0.7}, "0.7 of the completions end at once"),
        ({"entropy/student": 0.0}, "is the student's entropy"),
        ({"completions/mean_length": 41.0}, "grown from 10 to 41 tokens"),
    ],
)
def test_each_sign_is_told_once_at_its_second_log_line(sign, words):
    message, control = told({}, sign, sign, sign, teacher_model_kind="live")
    assert "by step 30" in message and words in message and "a live teacher follows" in message
    assert "learning_rate=5e-05" in message and "stop_on_collapse=True would end it" in message
    assert not control.should_training_stop and told({}, sign, {}, sign)[0] is None


def test_what_is_in_its_range_is_not_told():
    assert told({}, {}, {})[0] is None
    longer = {"completions/mean_length": 41.0, "completions/clipped_ratio": 0.2}  # they end by themselves
    assert told({}, longer, longer)[0] is None
    sparse = {"loss": 0.1, "completions/mean_length": 10.0}  # without the sampled diagnostics
    assert told({}, {}, {}, fine=sparse)[0] is None


def test_a_model_that_was_as_sure_from_the_start_has_not_collapsed():
    sure = {"entropy/student": 4e-4}
    assert told(sure, sure, sure)[0] is None
    assert "is the student's entropy" in told(sure, {}, {"entropy/student": 1e-5}, {"entropy/student": 1e-5})[0]


def test_after_a_resume_lengths_are_still_compared_with_the_first():
    longer = {"completions/mean_length": 41.0}
    assert "grown from 10 to 41 tokens" in told(longer, longer, before=[{}, longer])[0]


def test_the_run_is_saved_and_ended_when_asked_for():
    sign = {"completions/repeated_ratio": 0.8}
    message, control = told({}, sign, sign, stop_on_collapse=True, teacher_model_kind="base")
    assert control.should_save and control.should_training_stop
    assert "it was saved, and the run ends here" in message and "the teacher stands still" in message


RETENTION = {"tasks/retention/accuracy": 0.8, "tasks/retention/kl_to_start": 0.0}


def test_the_retention_set_leaving_its_range_is_told_once():
    half, less = {"tasks/retention/accuracy": 0.4}, {"tasks/retention/accuracy": 0.39}
    assert told({}, half, half, fine=RETENTION)[0] is None
    message, control = told({}, less, less, fine=RETENTION, teacher_model_kind="base", learning_rate=1e-3)
    assert "forgotten the retention set by step 20: 0.39 of its answers are right, at the start 0.80" in message
    assert "learning_rate=0.001 may be too high. Anchors hold a model to its start" in message
    assert "stop_on_collapse=True would end it" in message and not control.should_training_stop
    assert "Anchors" not in told({}, less, fine=RETENTION, held=True)[0]
    assert "at the start 0.80" in told(less, before=[{}], fine=RETENTION)[0]
    without_answers = {"tasks/retention/kl_to_start": 0.0}
    message, control = told({}, {"tasks/retention/kl_to_start": 1.2}, fine=without_answers, stop_on_collapse=True)
    assert "its KL from the start is 1.2 nats/token" in message and "it was saved, and the run ends here" in message
    assert control.should_save and control.should_training_stop


def test_repeated_n_grams():
    assert _repeated([1, 2, 3]) == 0.0 and _repeated(list(range(20))) == 0.0
    assert _repeated([7] * 11) == pytest.approx(1 - 1 / 8)


def test_a_live_teacher_at_a_high_rate_on_the_demo(tmp_path, monkeypatch):
    """The loss of such a run is 0: only what is sampled shows it."""
    monkeypatch.setenv(demo.BASELINE, "1")
    settings = {"output_dir": str(tmp_path), "teacher_model_kind": "live", "learning_rate": 1e-2, "logging_steps": 5}
    args = SDFTConfig(**{**demo.RECIPE, **settings, "stop_on_collapse": True, "disable_tqdm": True})
    trainer = demo.trainer(args, None, ["none"])
    monkeypatch.setattr(demo.Lessons, "accuracies", lambda lessons: dict.fromkeys(demo.MEANING, 0.0))
    with pytest.warns(UserWarning, match="The run has collapsed by step"):
        trainer.train()
    assert trainer.state.global_step < 60 and (tmp_path / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_a_run_that_forgets_is_ended_at_the_evaluation_that_shows_it(tmp_path, monkeypatch):
    """The demo's recipe at thirty times its rate, without anchors, asked about old facts."""
    settings = {"output_dir": str(tmp_path), "learning_rate": 1e-2, "max_steps": 20, "stop_on_collapse": True}
    args = SDFTConfig(**{**demo.RECIPE, **settings, "disable_tqdm": True, "per_device_eval_batch_size": 12})
    trainer = demo.trainer(args, None, ["none"])
    monkeypatch.setenv(demo.BASELINE, "1")
    monkeypatch.setattr(demo.Lessons, "accuracies", lambda lessons: dict.fromkeys(demo.MEANING, 0.0))
    old = [TaskRow(each.messages, each.answer, "exact") for each in questions() if each.group == "old"][:12]
    trainer.add_callback(TaskEvaluation(trainer, [Task("retention", old)], every=5))
    with pytest.warns(UserWarning, match="The run has forgotten the retention set by step .*, at the start 1.00"):
        trainer.train()
    step = trainer.state.global_step
    assert step < 20 and step % 5 == 0 and (tmp_path / f"checkpoint-{step}").is_dir()
