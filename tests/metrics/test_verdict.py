from pathlib import Path

import pytest

from sdft_ds.metrics.run_folder import Run
from sdft_ds.metrics.verdict import verdict

CONFIG = {"max_completion_length": 16, "learning_rate": 1e-4, "warmup_steps": 0}
ASKED = [("new", 0, 0.0), ("new", 9, 0.9), ("old", 0, 0.9), ("old", 9, 0.9)]
NOT_ASKED = "Whether its answers are right was not asked"
NOT_MEASURED = "What it has forgotten was not measured"
FELL = "The distance to the teacher fell from 1 to 0.5 nats per token."
FLAT = "The distance to the teacher did not fall: from 1 to 1 nats per token."


def run(asked=(), distances=(1.0, 0.5), log=None, config=None, retention=(), rows=20, **metrics):
    """Three log lines of a run of nine steps; retention: (accuracy, KL) before and after."""
    lines = [
        {"step": 3 * (i + 1), "epoch": 30.0, "loss": 1.0, "sdft/distillation_loss": value,
         "completions/loss_tokens": 10.0, "completions/mean_length": 8.0, **metrics}
        for i, value in enumerate((distances[0], sum(distances) / 2, distances[1]))
    ]  # fmt: skip
    evaluations = [{"task": task, "step": step, "rows": rows, "accuracy": right} for task, step, right in asked]
    evaluations += [
        {"task": "retention", "step": step, "rows": rows, "kl_to_start": kl}
        | ({} if right is None else {"accuracy": right})
        for step, (right, kl) in zip((0, 9), retention, strict=False)
    ]  # fmt: skip
    return Run(Path("run"), lines if log is None else log, evaluations, {"config": CONFIG | (config or {})}, {}, [])


CASES = {
    # what is known, and what is advised: the beginnings of the sentences, all of them
    "nothing asked": (run(), [FELL], [NOT_ASKED, NOT_MEASURED]),
    "anchors that came last before the end": (
        run(ASKED, log=[{**run().log[0], "anchors/distillation_loss": 0.5}, *run().log[1:]]),
        ["Learned: right answers in new", "Unchanged: right answers in old", FELL,
         "On the anchors, which it trains on, it was, at step 3, 0.5 nats per token"],
        [],
    ),
    "learned and kept": (
        run(ASKED),
        ["Learned: right answers in new 0.00 → 0.90 (20 questions).", "Unchanged: right answers in old", FELL],
        [],
    ),
    "learned and forgotten": (
        run([*ASKED[:3], ("old", 9, 0.5)]),
        ["Learned: right answers in new", "Forgotten: right answers in old 0.90 → 0.50 (20 questions).", FELL],
        ["To forget less: anchors"],
    ),
    "one answer more is nothing": (
        run([("new", 0, 0.0), ("new", 9, 0.25)], rows=4),
        ["Unchanged: right answers in new 0.00 → 0.25 (4 questions).", FELL],
        ["The student follows its teacher, but answers no better", NOT_MEASURED],
    ),
    "asked before more steps": (
        run([("new", 0, 0.0), ("new", 6, 0.9)]),
        ["Learned: right answers in new 0.00 → 0.90 (20 questions, last asked at step 6).", FELL],
        [NOT_MEASURED],
    ),
    "known before": (run([("new", 0, 1.0), ("new", 9, 1.0)]), ["Unchanged: right answers in new 1.00", FELL], []),
    "retention kept": (
        run(retention=[(0.9, 0.0), (0.9, 0.1)]),
        [FELL, "Kept: the retention set is 0.1 nats per token from the start, right answers 0.90 → 0.90."],
        [NOT_ASKED],
    ),
    "retention without answers": (
        run(retention=[(None, 0.0), (None, 0.5)]),
        [FELL, "Moved away from the start: the retention set is 0.5 nats per token from the start."],
        ["To forget less: anchors", NOT_ASKED],
    ),
    "retention forgotten in spite of anchors": (
        run(retention=[(0.9, 0.0), (0.2, 0.1)], **{"anchors/distillation_loss": 0.05}),
        [FELL, "Forgotten: the retention set", "On the anchors, which it trains on, it is 0.05 nats per token"],
        ["To forget less: lower learning_rate", NOT_ASKED],
    ),
    "cut off": (
        run(distances=(1.0, 1.0), **{"completions/clipped_ratio": 0.75}),
        [FLAT],
        ["75% of the completions were cut off at max_completion_length=16: raise it.", NOT_ASKED, NOT_MEASURED],
    ),
    "cut off, and learned": (run(ASKED, **{"completions/clipped_ratio": 0.75}), ["Learned", "Unchanged", FELL], []),
    "a teacher that gains nothing": (
        run(distances=(0.004, 0.004)),
        ["The distance to the teacher did not fall"],
        ["The teacher was only 0.004 nats per token from the student from the start", NOT_ASKED, NOT_MEASURED],
    ),
    "few passes": (
        run(distances=(1.0, 1.0), epoch=1.5),
        [FLAT],
        ["Each row was seen 1.5 times; facts take about 20: raise max_steps", NOT_ASKED, NOT_MEASURED],
    ),
    "warming up": (
        run(distances=(1.0, 1.0), config={"warmup_steps": 5}),
        [FLAT],
        ["The learning rate was still rising", NOT_ASKED, NOT_MEASURED],
    ),
    "flat": (run(distances=(1.0, 1.0)), [FLAT], ["Raise learning_rate (0.0001)", NOT_ASKED, NOT_MEASURED]),
    "rewarded more often, by an estimate that is no distance": (
        run(distances=(-0.15, -0.06), epoch=0.75, log=[
            {"step": 3 * i, "epoch": 0.75, "loss": -0.1, "sdft/distillation_loss": -0.15 / i, "rewards/mean": 0.2 * i,
             "rewards/success_share": 0.3 * i, "completions/loss_tokens": 10.0} for i in (1, 2, 3)
        ]),
        ["The mean reward of its completions rose from 0.2 to 0.6; 90% of the prompts had a successful completion"],
        [NOT_ASKED, NOT_MEASURED],
    ),
    "never rewarded": (
        run(**{"completions/loss_tokens": 0.0, "rewards/mean": 0.0, "rewards/success_share": 0.0}),
        ["Nothing was learned"],
        ["No completion was successful"],
    ),
    "asked, but no step logged": (
        run(ASKED, log=[]),
        ["Learned: right answers in new", "Unchanged", "No step was logged."],
        ["Log more often"],
    ),
    "moves away": (
        run(distances=(1.0, 2.0)),
        ["The distance to the teacher rose from 1 to 2"],
        ["The run moves away from its target: lower learning_rate", NOT_ASKED, NOT_MEASURED],
    ),
    "collapsed": (
        run([("new", 0, 0.0), ("new", 9, 0.0)], **{"completions/repeated_ratio": 0.9}),
        ["Unchanged: right answers in new", FELL],
        ["The completions repeat themselves", "The student follows its teacher", NOT_MEASURED],
    ),
    "contexts cut, steps skipped": (
        run(distances=(1.0, 1.0), **{"prompts/teacher_cut": 2.0, "steps/nonfinite": 1.0}),
        [FLAT],
        ["Contexts were cut", "3 steps were skipped", NOT_ASKED, NOT_MEASURED],
    ),
    "not a number": (
        run(distances=(1.0, float("nan"))),
        ["The distance to the teacher is not a finite number at last."],
        ["The run moves away", NOT_ASKED, NOT_MEASURED],
    ),
    "one log line": (
        run(log=[{"step": 4, "loss": 1.0, "sdft/distillation_loss": 1.0}]),
        ["The distance to the teacher was 1 nats per token in the only log line."],
        [NOT_ASKED, NOT_MEASURED],
    ),
    "supervised": (
        run(log=[{"step": 4, "loss": 2.0}, {"step": 8, "loss": 0.5}]),
        ["The loss fell from 2 to 0.5."],
        [NOT_ASKED, NOT_MEASURED],
    ),
    "no log line": (run(log=[]), ["No step was logged"], ["Log more often: lower logging_steps."]),
    "no loss tokens, empty": (
        run(**{"completions/loss_tokens": 0.0, "completions/empty_ratio": 1.0}),
        ["Nothing was learned: no completion had a token that counts in the loss."],
        ["The completions are empty"],
    ),
    "no loss tokens, all masked": (
        run(config={"mask_truncated_completions": True},
            **{"completions/loss_tokens": 0.0, "completions/clipped_ratio": 1.0}),
        ["Nothing was learned"],
        ["All completions were cut off at max_completion_length=16, and mask_truncated_completions leaves them out"],
    ),
    "no loss tokens, all skipped": (
        run(config={"num_loss_tokens_to_skip": 8}, **{"completions/loss_tokens": 0.0}),
        ["Nothing was learned"],
        ["num_loss_tokens_to_skip=8 leaves out all of the completions, of 8 tokens on average: lower it."],
    ),
}  # fmt: skip


@pytest.mark.parametrize("of, found, advice", CASES.values(), ids=CASES.keys())
def test_the_verdict(of, found, advice):
    said = verdict(of)
    for sentences, beginnings in ((said.found, found), (said.advice, advice)):
        assert len(sentences) == len(beginnings), sentences
        for sentence, beginning in zip(sentences, beginnings, strict=True):
            assert sentence.startswith(beginning)


def test_the_distance_is_that_of_the_first_and_last_tenth_of_the_log():
    """A single step of a small batch says little."""
    log = [{"step": i, "loss": 0.0, "sdft/distillation_loss": 2.0 - i / 100 + (i % 2)} for i in range(100)]
    assert verdict(run(log=log)).found == ("The distance to the teacher fell from 2.45 to 1.55 nats per token.",)
