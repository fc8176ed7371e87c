"""What a run has learned and forgotten, in sentences, and what to change where it has learned nothing.

A pure function of what the run logged and of its settings; it says no more than these show. Printed at the end of a
run, and at the top of its page.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sdft_ds.metrics.collapse import EMPTY, MOST_KL, REPEATED
from sdft_ds.metrics.run_folder import Run

DISTANCE, LOSS, TOKENS = "sdft/distillation_loss", "loss", "completions/loss_tokens"
CLIPPED, LENGTH, ANCHORS = "completions/clipped_ratio", "completions/mean_length", "anchors/distillation_loss"
REWARD, SUCCESS = "rewards/mean", "rewards/success_share"
RETENTION = "retention"
SAME = 0.1  # a distance that changes by a smaller share has not changed
LEAST_DISTANCE = 0.01  # nats/token: a teacher this close to the student at the start has nothing to teach
KEPT_KL = 0.3  # nats/token from the start: runs that keep their answers stay below it (metrics/collapse.py)
MANY = 0.5  # of the completions
# Ten and 24 facts were learned in 20 to 25 passes over the rows, and a third to a half of them in 7: docs/learning.md.
FEW_PASSES, PASSES = 10, 20


@dataclass(frozen=True)
class Verdict:
    """found: what is known of the run; advice: what to change, or how to know more."""

    found: tuple[str, ...]
    advice: tuple[str, ...] = ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """All of it for a terminal, the advice behind arrows."""
        return (*self.found, *(f"→ {sentence}" for sentence in self.advice))


@dataclass(frozen=True)
class _Answers:
    """The accuracy in one task before the first step and when it was last asked. at: that step, if more followed."""

    task: str
    rows: int
    before: float
    after: float
    at: int | None = None

    @property
    def change(self) -> int:
        """1 or -1 if more answers are right, or fewer; 0 if the difference is a single answer or 5 % of them."""
        answers = (self.after - self.before) * self.rows
        return 0 if abs(answers) < max(1.5, 0.05 * self.rows) else 1 if answers > 0 else -1

    def __str__(self) -> str:
        when = "" if self.at is None else f", last asked at step {self.at}"
        return f"{self.task} {self.before:.2f} → {self.after:.2f} ({self.rows} questions{when})"


def verdict(run: Run) -> Verdict:
    """The verdict on a run folder's contents, whatever of them is there."""
    answers = _answers(run)
    if not run.series(LOSS)[1] and not run.series(DISTANCE)[1]:
        unknown = "No step was logged." if answers else "No step was logged, so it is not known what was learned."
        return Verdict(
            (*_of_tasks(answers), *_of_retention(run, answers), unknown),
            ("Log more often: lower logging_steps.",) if run.about else (),
        )
    tokens = run.series(TOKENS)[1]
    if tokens and not sum(tokens):
        return Verdict(
            ("Nothing was learned: no completion had a token that counts in the loss.",), (_no_tokens(run),)
        )
    learned = _learned(run, answers)
    found = [*_of_tasks(answers), *_of_rewards(run), *_of_distance(run), *_of_retention(run, answers)]
    advice = [*(_causes(run, answers) if learned is False else ()), *_hold(run, answers), *_ask(run, answers)]
    return Verdict(tuple(found), tuple(advice))


def _learned(run: Run, answers: list[_Answers]) -> bool | None:
    """Whether the run has learned; None if it was not asked, and the distance to the teacher tells nothing."""
    asked = [each for each in answers if each.task != RETENTION]
    if asked:
        return any(each.change > 0 for each in asked) or all(each.after >= 0.95 for each in asked)
    if rewards := run.series(REWARD)[1]:
        return None if _end(rewards) > _end(rewards[::-1]) else False
    first, last = _distance(run)
    return None if last <= (1 - SAME) * first or len(run.series(_metric(run))[1]) == 1 else False


# ---- what is known --------------------------------------------------------------------------------------------------


def _of_tasks(answers: list[_Answers]) -> Iterator[str]:
    asked = [each for each in answers if each.task != RETENTION]
    for change, words in ((1, "Learned"), (-1, "Forgotten"), (0, "Unchanged")):
        if some := [str(each) for each in asked if each.change == change]:
            yield f"{words}: right answers in {', '.join(some)}."


def _of_rewards(run: Run) -> Iterator[str]:
    if values := run.series(REWARD)[1]:
        first, last = _end(values[::-1]), _end(values)
        words = "rose from" if last > first else "fell from" if last < first else "stayed: from"
        shares = run.series(SUCCESS)[1]
        share = f"; {_end(shares):.0%} of the prompts had a successful completion at last" if shares else ""
        yield f"The mean reward of its completions {words} {first:.3g} to {last:.3g}{share}."


def _of_distance(run: Run) -> Iterator[str]:
    if _is_estimate(run):
        return
    first, last = _distance(run)
    name, unit = _names(run)
    if not math.isfinite(last):
        yield f"{name} is not a finite number at last."
    elif len(run.series(_metric(run))[1]) == 1:
        yield f"{name} was {last:.3g}{unit} in the only log line."
    elif last > (1 + SAME) * first:
        yield f"{name} rose from {first:.3g} to {last:.3g}{unit}."
    else:
        fell = "fell from" if last <= (1 - SAME) * first else "did not fall: from"
        yield f"{name} {fell} {first:.3g} to {last:.3g}{unit}."


def _of_retention(run: Run, answers: list[_Answers]) -> Iterator[str]:
    kl = _last(run, RETENTION, "kl_to_start")
    if kl is not None:
        right = next((each for each in answers if each.task == RETENTION), None)
        lost = kl > MOST_KL or (right is not None and right.change < 0)
        words = "Forgotten" if lost else "Kept" if kl <= KEPT_KL else "Moved away from the start"
        text = f"{words}: the retention set is {kl:.3g} nats per token from the start"
        yield text + (f", right answers {right.before:.2f} → {right.after:.2f}." if right else ".")
    steps, values = run.series(ANCHORS)
    if values:
        when = "is" if steps[-1] == run.log[-1]["step"] else f"was, at step {steps[-1]},"
        yield f"On the anchors, which it trains on, it {when} {_end(values):.3g} nats per token from the start."


# ---- what to change -------------------------------------------------------------------------------------------------


def _causes(run: Run, answers: list[_Answers]) -> Iterator[str]:
    """Likely causes of a run that has not learned, each with its remedy."""
    config = run.about.get("config", {})
    first, last = _distance(run)
    steps, passes = run.log[-1]["step"], run.log[-1].get("epoch") or math.inf
    rewarded, estimate = bool(run.series(REWARD)[1]), _is_estimate(run)
    found = False
    for known, text in (
        (_at_the_end(run, CLIPPED) >= MANY, f"{_at_the_end(run, CLIPPED):.0%} of the completions were cut off at "
         f"max_completion_length={config.get('max_completion_length')}: raise it."),
        (_at_the_end(run, REPEATED) >= MANY or _at_the_end(run, EMPTY) >= MANY, "The completions repeat themselves or "
         "are empty: the run has collapsed. Lower learning_rate, and take a base teacher."),
        (rewarded and not sum(run.series(SUCCESS)[1]), _NO_SUCCESS),
        (_metric(run) == DISTANCE and not estimate and first < LEAST_DISTANCE, f"The teacher was only {first:.2g} "
         "nats per token from the student from the start: its context is missing or changes nothing. python -m "
         "sdft_ds.preview --score shows what it gains by it."),
        (sum(run.series("prompts/teacher_cut")[1]) > 0, "Contexts were cut: raise max_teacher_prompt_length."),
        (sum(run.series("steps/nonfinite")[1]) > 0, f"{sum(run.series('steps/nonfinite')[1]):.0f} steps were skipped, "
         "because their gradient was not finite: lower learning_rate."),
        ((config.get("warmup_steps") or 0) > steps / 2, "The learning rate was still rising, or had only just risen, "
         f"when the run ended: warmup_steps={config.get('warmup_steps')} of {steps}."),
        (passes < FEW_PASSES and not rewarded, f"Each row was seen {passes:.2g} times; facts take about {PASSES}: "
         "raise max_steps or num_train_epochs."),
        (not last <= (1 + SAME) * first and not estimate, f"The run moves away from its target: lower learning_rate "
         f"({config.get('learning_rate')})."),
    ):  # fmt: skip
        if known:
            found = True
            yield text
    if answers and last <= (1 - SAME) * first and not estimate:
        yield (
            "The student follows its teacher, but answers no better: python -m sdft_ds.preview --score, with the same "
            "questions, shows whether the teacher answers them right."
        )
    elif not found:
        yield f"Raise learning_rate ({config.get('learning_rate')}), or train longer."


_NO_SUCCESS = (
    "No completion was successful (success_reward_threshold), so there was nothing to learn from: take easier "
    "questions, more num_generations, a higher temperature, or feedback (include_environment_feedback)."
)


def _no_tokens(run: Run) -> str:
    if run.series(REWARD)[1] and not sum(run.series(SUCCESS)[1]):
        return _NO_SUCCESS
    config, skipped = run.about.get("config", {}), run.about.get("config", {}).get("num_loss_tokens_to_skip") or 0
    if _at_the_end(run, EMPTY) >= MANY:
        return "The completions are empty: look at the prompts with python -m sdft_ds.preview."
    if config.get("mask_truncated_completions") and _at_the_end(run, CLIPPED) >= MANY:
        return (
            f"All completions were cut off at max_completion_length={config.get('max_completion_length')}, and "
            "mask_truncated_completions leaves them out: raise the one, or unset the other."
        )
    if skipped >= _at_the_end(run, LENGTH):
        return (
            f"num_loss_tokens_to_skip={skipped} leaves out all of the completions, of {_at_the_end(run, LENGTH):.3g} "
            "tokens on average: lower it."
        )
    return "Look at the prompts and the loss tokens with python -m sdft_ds.preview --score."


def _hold(run: Run, answers: list[_Answers]) -> Iterator[str]:
    moved = (_last(run, RETENTION, "kl_to_start") or 0.0) > KEPT_KL or _at_the_end(run, ANCHORS) > MOST_KL
    lost = moved or any(each.change < 0 for each in answers)
    if lost and not run.series(ANCHORS)[1]:
        yield "To forget less: anchors hold the model to what it was at the start (anchor_path, or anchor_dataset)."
    elif lost:
        yield "To forget less: lower learning_rate."


def _ask(run: Run, answers: list[_Answers]) -> Iterator[str]:
    if not any(each.task != RETENTION for each in answers):
        yield (
            "Whether its answers are right was not asked: eval_tasks asks questions of yours before and after "
            "(docs/evaluation.md)."
        )
    if _last(run, RETENTION, "kl_to_start") is None and not any(each.before >= MANY for each in answers):
        yield "What it has forgotten was not measured: retention_file compares it with the start."


# ---- what was logged ------------------------------------------------------------------------------------------------


def _metric(run: Run) -> str:
    return DISTANCE if run.series(DISTANCE)[1] else LOSS


def _is_estimate(run: Run) -> bool:
    """Whether the loss is an estimate at the sampled tokens, or holds a policy loss: no distance, of either sign."""
    config, values = run.about.get("config", {}), run.series(_metric(run))[1]
    of_sampled = config.get("distillation_mode") == "sampled_token" or min(values, default=0.0) < 0
    return of_sampled or bool(run.series("policy/loss")[1])


def _names(run: Run) -> tuple[str, str]:
    if _metric(run) == DISTANCE:
        return "The distance to the teacher", " nats per token"
    return "The loss", ""


def _distance(run: Run) -> tuple[float, float]:
    """At first and at last."""
    values = run.series(_metric(run))[1]
    return _end(values[::-1]), _end(values)


def _end(values: list[float]) -> float:
    """The mean of the last tenth."""
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def _at_the_end(run: Run, metric: str) -> float:
    values = run.series(metric)[1]
    return _end(values) if values else 0.0


def _answers(run: Run) -> list[_Answers]:
    """The tasks that were asked before the first step and after it."""
    found, end = [], max((line["step"] for line in (run.log or run.evaluations)), default=0)
    for task in dict.fromkeys(line["task"] for line in run.evaluations):
        by_step = {line["step"]: line for line in run.evaluations if line["task"] == task and "accuracy" in line}
        if 0 in by_step and (last := max(by_step)) > 0:
            before, after = by_step[0]["accuracy"], by_step[last]["accuracy"]
            found.append(_Answers(task, by_step[0]["rows"], before, after, last if last < end else None))
    return found


def _last(run: Run, task: str, measure: str) -> Any:
    """The measure after the last step; None if it was not measured."""
    lines = [line for line in run.evaluations if line["task"] == task and measure in line and line["step"] > 0]
    return max(lines, key=lambda line: line["step"])[measure] if lines else None
