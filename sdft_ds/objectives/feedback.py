"""Feedback: what functions of the user's say about the completions of a generation batch, before the teacher scores
them: privileged contexts and rewards.

    contexts   one call for the generation batch, on rank 0, with the completions of all ranks in the order of their
               row numbers, so that all completions of a prompt are side by side
    rewards    one call on each rank, with its own completions

A function that fails ends the run on all ranks, with one line that names the row.
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from sdft_ds.data.batch import Rollout
from sdft_ds.data.rows import Example, Message, Prompt, RowError, checked_context, optional_context
from sdft_ds.data.schedule import Slot
from sdft_ds.distributed import ranks

ContextFn = Callable[[list[Prompt], list[Any], list[dict[str, Any]]], Sequence[str | None] | None]
RewardFn = Callable[..., Sequence[float | None]]
Rows = list[tuple[dict[str, Any], Example]]
# Columns that a reward function gets under other names, or not at all.
_OWN_ARGUMENTS = ("prompt", "completion", "completion_ids")


class FeedbackError(ValueError):
    """A function of the user's that raised, or returned what cannot be used."""


@dataclass(frozen=True)
class Answer:
    """A completion and the row that it answers. row: its number in the generation batch; index: of the data set's row;
    columns: the row as stored. reward: None if unknown."""

    row: int
    index: int
    prompt: Prompt
    text: str
    ids: list[int]
    columns: dict[str, Any]
    reward: float | None = None

    @property
    def completion(self) -> str | list[Message]:
        """In the form of the prompt: a text, or a conversation's next turn."""
        return self.text if isinstance(self.prompt, str) else [{"role": "assistant", "content": self.text}]


def answers_of(
    slots: Sequence[Slot], rows: Rows, rollouts: list[Rollout], tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """This rank's completions that count, without those of anchors."""
    return [
        Answer(
            row=rollout.row,
            index=slot.index,
            prompt=example.prompt,
            text=tokenizer.decode(rollout.completion.ids, skip_special_tokens=True),
            ids=rollout.completion.ids,
            columns=columns,
        )
        for slot, (columns, example), rollout in zip(slots, rows, rollouts, strict=True)
        if rollout.counted and not slot.anchor
    ]


def gather(answers: list[Answer]) -> list[Answer]:
    """Those of all ranks, ordered by row number. Collective."""
    found = [answer for part in ranks.all_gather_objects(answers) for answer in part]
    return sorted(found, key=lambda answer: answer.row)


# ---- contexts -------------------------------------------------------------------------------------------------------


def contexts(function: ContextFn, answers: list[Answer]) -> dict[int, str | None]:
    """Row number -> its context, None if the function gave it none. answers: those of all ranks. Collective."""

    def call() -> tuple[list[str | None], str | None]:
        try:
            return _checked_contexts(function, answers), None
        except (FeedbackError, RowError) as error:
            return [], str(error)

    found, problem = ranks.from_rank_0(call)
    if problem is not None:
        raise FeedbackError(problem)
    return {answer.row: context for answer, context in zip(answers, found, strict=True)}


def _checked_contexts(function: ContextFn, answers: list[Answer]) -> list[str | None]:
    what = f"privileged_context_fn {_name(function)}"
    try:
        found = function(
            [answer.prompt for answer in answers],
            [answer.completion for answer in answers],
            [answer.columns for answer in answers],
        )
    except Exception as error:
        raise FeedbackError(f"{what} raised {_one_line(error)} with {_rows(answers)}.") from error
    if found is None:
        return [None] * len(answers)
    if not isinstance(found, list | tuple) or len(found) != len(answers):
        raise FeedbackError(
            f"{what} returned {_shape(found)} for {len(answers)} completions; expected a list with a text or None for "
            "each, or None."
        )
    blank = [context is None or (isinstance(context, str) and not context.strip()) for context in found]
    return [
        None if none else checked_context(context, answer.index, f"{what}'s context")
        for answer, context, none in zip(answers, found, blank, strict=True)
    ]


def stored_context(answer: Answer) -> str | None:
    """The privileged context of the row that was answered, as text, None without one. The rows were validated."""
    return optional_context(answer.columns.get("privileged_context"), answer.index)


# ---- rewards --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rewards:
    """The reward functions of a run. weights: of their sum; errors: "error" or "skip", which leaves the reward of a
    row unknown; seconds: time limit of a call, None for none."""

    functions: Sequence[RewardFn]
    weights: Sequence[float]
    errors: str = "error"
    seconds: float | None = None

    def rewarded(self, answers: list[Answer], state: Any = None) -> list[Answer]:
        """This rank's answers with their rewards: the weighted sum, without what a function leaves out (None).

        Raises FeedbackError on all ranks alike. Collective.
        """
        problems: dict[int, str] = {}
        totals = [0.0] * len(answers)
        for function, weight in zip(self.functions, self.weights, strict=True):
            for i, value in enumerate(self._values(function, answers, state)):
                if isinstance(value, str):
                    problems.setdefault(i, value)
                else:
                    totals[i] += weight * (value or 0.0)
        everyone = [problem for part in ranks.all_gather_objects(list(problems.values())) for problem in part]
        if everyone and self.errors == "error":
            raise FeedbackError(f"{everyone[0]} Or leave the rewards of such rows out: reward_errors='skip'.")
        return [replace(each, reward=None if i in problems else totals[i]) for i, each in enumerate(answers)]

    def _values(self, function: RewardFn, answers: list[Answer], state: Any) -> list[float | None | str]:
        """A function's reward of each answer, or the problem. One that fails with several rows is called with each
        of them, to find out with which."""
        if not answers:
            return []
        name = _name(function)
        try:
            found = self._call(function, answers, state)
        except TimeoutError:
            problem = f"The reward {name} took longer than reward_timeout={self.seconds:g} s with {_rows(answers)}."
            return [problem] * len(answers)
        except Exception as error:
            if len(answers) > 1:
                return [value for answer in answers for value in self._values(function, [answer], state)]
            return [f"The reward {name} raised {_one_line(error)} with {_rows(answers)}."]
        if not _are_values(found, len(answers)):
            problem = f"The reward {name} returned {_shape(found)} for {len(answers)} completions of {_rows(answers)}."
            return [f"{problem} Expected a list with a number or None for each."] * len(answers)
        return [
            value if (value := _number(each)) is not None or each is None
            else f"The reward {name} returned {each!r} with {_rows([answer])}; expected a finite number or None."
            for answer, each in zip(answers, found, strict=True)
        ]  # fmt: skip

    def _call(self, function: RewardFn, answers: list[Answer], state: Any) -> Any:
        names = dict.fromkeys(name for answer in answers for name in answer.columns if name not in _OWN_ARGUMENTS)
        arguments = {name: [answer.columns.get(name) for answer in answers] for name in names} | {
            "prompts": [answer.prompt for answer in answers],
            "completions": [answer.completion for answer in answers],
            "completion_ids": [answer.ids for answer in answers],
            "trainer_state": state,
        }
        return _within(self.seconds, lambda: function(**arguments))


def _within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """The call's result; raises TimeoutError after so many seconds. The call itself cannot be stopped: it goes on in
    its thread, which the end of the process does not wait for."""
    if seconds is None:
        return call()
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError
    result, error = outcome[0]
    if isinstance(error, TimeoutError):  # a time limit of the function's own is an error like any other
        raise RuntimeError(_one_line(error)) from error
    if error is not None:
        raise error
    return result


def _are_values(found: Any, number: int) -> bool:
    """Whether these are so many values in an order: a list, a tuple, an array or tensor of one dimension."""
    if isinstance(found, str | bytes | dict | set) or not hasattr(found, "__getitem__"):
        return False
    try:
        return len(found) == number
    except TypeError:  # an array or tensor without dimensions
        return False


def _number(value: Any) -> float | None:
    """A finite number, also one of numpy's or a tensor's; None if it is anything else."""
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except Exception:  # whatever an object of the user's raises
        return None
    return number if math.isfinite(number) else None


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _rows(answers: Iterable[Answer], most: int = 8) -> str:
    indices = list(dict.fromkeys(answer.index for answer in answers))
    more = f" and {len(indices) - most} more" if len(indices) > most else ""
    return f"row{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices[:most]))}{more}"


def _shape(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, list | tuple) else f"a {type(value).__name__}"
