"""Can this teacher teach? Compares the model's answers with and without the privileged context, before training."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.data.batch import Completion, Rollout
from sdft_ds.data.prompts import PromptPair, RenderedPrompt
from sdft_ds.data.rows import Example, example_from_row
from sdft_ds.distributed import ranks
from sdft_ds.evaluation.task_evaluation import EvalModel, TaskEvaluator
from sdft_ds.evaluation.tasks import Task
from sdft_ds.trainer import SDFTTrainer

# Nats per token below which a context does not help. On SmolLM2-135M contexts that say the answer gain 1.5 to 1.9, and
# others -0.3 to 0.1.
LEAST_GAIN = 0.1
SHOWN = 80  # characters of an answer


@dataclass(frozen=True)
class TaskAccuracy:
    """Of the rows of a task that have a context: the student's and the teacher's accuracy."""

    rows: int
    student: float
    teacher: float


@dataclass(frozen=True)
class TeacherCheck:
    """Of some rows, the greedy answers of teacher and student, without and with the context.

    same: rows whose two answers are equal. gain: how much likelier the teacher's answers are with the context than
    without, nats per token, the mean over rows. golden: how much likelier the golden response of each row is with its
    context than without, and than with the context of another row, whichever is less: any context makes an answer that
    says something likelier to a model that would decline. Empty without golden responses. tasks: by name, those with
    a context in any row. answers: by row, the texts of the student's and of the teacher's.
    """

    rows: int
    same: int
    gain: float
    golden: dict[int, float]
    tasks: dict[str, TaskAccuracy] = field(default_factory=dict)
    answers: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The findings and the verdict, in words."""
        said = [
            f"Teacher check, {self.rows} rows: with the context the model's greedy answer is another one in "
            f"{self.rows - self.same} of them, and {_likelier(self.gain)} than without."
        ]
        if self.golden:
            mean = sum(self.golden.values()) / len(self.golden)
            said.append(f"By its own context a golden response gets {_likelier(mean)}.")
        said += [
            f"Task {name}, {task.rows} rows with a context: {task.student:.2f} of them are answered right without it, "
            f"{task.teacher:.2f} with it."
            for name, task in self.tasks.items()
        ]
        return [*said, self.verdict]

    @property
    def example(self) -> str:
        """The two answers of a row, one where they differ if there is any."""
        index, (own, told) = next(
            (each for each in self.answers.items() if each[1][0] != each[1][1]), next(iter(self.answers.items()))
        )
        return f"Row {index} is answered {_shown(own)} without its context, and {_shown(told)} with it."

    @property
    def verdict(self) -> str:
        return " ".join([self._of_rows(), *self._of_tasks()])

    def _of_rows(self) -> str:
        if self.gain < LEAST_GAIN or self.same == self.rows:
            return (
                "This teacher has nothing to teach: it answers as the student does. Look at the rows' contexts and at "
                "teacher_prompt_template."
            )
        silent = [index for index, gain in self.golden.items() if gain < LEAST_GAIN]
        if self.golden and len(silent) == len(self.golden):
            return (
                "This teacher does not teach the golden responses: the context makes none likelier. It changes "
                "the answers, but not towards them."
            )
        if silent:
            named = ", ".join(map(str, silent[:10])) + (" and more" if len(silent) > 10 else "")
            return f"This teacher can teach, but not from the context of row {named}: it does not help."
        if self.golden:
            return "This teacher can teach: the context makes the golden responses likelier."
        if self._of_tasks():
            return "This teacher answers otherwise with the context."
        return (
            "This teacher answers otherwise with the context; whether better, only you can see: read the answers, or "
            "give the rows a golden response."
        )

    def _of_tasks(self) -> list[str]:
        """A sentence on the tasks that the context helps with, and on those that it does not; none on a task that the
        student does not need it for."""
        taught = [name for name, task in self.tasks.items() if task.teacher > task.student]
        untaught = [name for name, task in self.tasks.items() if task.teacher <= task.student < 1.0]
        said = []
        if taught:
            said.append(f"It answers {', '.join(taught)} better with the context than without, and can teach that.")
        if untaught:
            said.append(f"It answers {', '.join(untaught)} no better with the context, and cannot teach that.")
        return said


def _likelier(gain: float) -> str:
    return f"{abs(gain):.2g} nats per token {'likelier' if gain >= 0 else 'less likely'}"


def _shown(text: str) -> str:
    """A text in quotation marks, in one line, cut to SHOWN characters."""
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")


class CheckTeacher(TrainerCallback):
    """Says before the first step of a new run whether the teacher can teach, by the first `count` rows. On every rank,
    with the same rows. No random number is drawn and no weight changed."""

    def __init__(self, trainer: SDFTTrainer, count: int):
        self.trainer = trainer
        self.count = count

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step > 0:
            return
        dataset = self.trainer.train_dataset
        rows = {index: dataset[index] for index in range(min(self.count, len(dataset)))}
        ranks.tell(f"Looking at the teacher's answers to {len(rows)} rows before the first step.")
        found = check(self.trainer, rows, golden={})
        ranks.tell(" ".join([*found.lines, found.example]))


def check(
    trainer: SDFTTrainer, rows: dict[int, dict[str, Any]], golden: dict[int, str], tasks: Sequence[Task] = ()
) -> TeacherCheck:
    """rows: by index; golden: response of the rows that have one. Trains nothing."""
    prompts, tokenizer = trainer.prompts, trainer.prompts.tokenizer
    examples = {index: example_from_row(row, index) for index, row in rows.items()}
    pairs = {index: prompts.build(example, index) for index, example in examples.items()}
    with trainer.prepared(), torch.no_grad():
        trainer.check_head()
        asked = {side: [getattr(pair, side) for pair in pairs.values()] for side in ("student", "teacher")}
        answers = {side: _answers(trainer, side, each) for side, each in asked.items()}
        gains = _differences(
            _log_probs(trainer, "teacher", asked["teacher"], answers["teacher"]),
            _log_probs(trainer, "student", asked["student"], answers["teacher"]),
        )
        responses = {index: tokenizer(golden[index], add_special_tokens=False)["input_ids"] for index in golden}
        responses = {index: ids for index, ids in responses.items() if ids}
        said = list(responses.values())
        told = _log_probs(trainer, "teacher", [pairs[index].teacher for index in responses], said)
        untold = _log_probs(trainer, "student", [pairs[index].student for index in responses], said)
        others = _with_the_next_context(trainer, {index: examples[index] for index in responses})
        told_else = _log_probs(trainer, "teacher", others, said)
        found = map(min, _differences(told, untold), _differences(told, told_else))
        texts = {side: tokenizer.batch_decode(each, skip_special_tokens=True) for side, each in answers.items()}
        return TeacherCheck(
            rows=len(pairs),
            same=sum(a == b for a, b in zip(*answers.values(), strict=True)),
            gain=sum(gains) / len(gains),
            golden=dict(zip(responses, found, strict=True)),
            tasks=_accuracies(trainer, tasks),
            answers=dict(zip(pairs, zip(texts["student"], texts["teacher"], strict=True), strict=True)),
        )


def _with_the_next_context(trainer: SDFTTrainer, examples: dict[int, Example]) -> list[RenderedPrompt]:
    """Each row's teacher prompt with the context of the next row that has another one; the student's prompt where no
    row does, or the row has a teacher prompt of its own."""
    found, listed = [], list(examples.values())
    for at, (index, example) in enumerate(examples.items()):
        following = (each for each in (*listed[at + 1 :], *listed[:at]) if each.teacher_prompt is None)
        contexts = (each.privileged_context for each in following)
        other = next((text for text in contexts if text != example.privileged_context), None)
        if other is None or example.teacher_prompt is not None:
            found.append(trainer.prompts.build(example, index).student)
        else:
            found.append(trainer.prompts.build(replace(example, privileged_context=other), index).teacher)
    return found


def _weights(trainer: SDFTTrainer, side: str) -> AbstractContextManager[None]:
    """Context in which the model is a side's. A teacher with weights of its own still has the student's."""
    teacher = trainer.teacher
    return nullcontext() if side == "student" or teacher.has_state else teacher.weights(trainer.model_wrapped)


def _answers(trainer: SDFTTrainer, side: str, prompts: list[RenderedPrompt]) -> list[list[int]]:
    """A side's greedy answers."""
    keys = [f"the teacher check/{i}" for i in range(len(prompts))]  # for messages
    with _weights(trainer, side):
        made = trainer.rollouts.generate([each.ids for each in prompts], keys, do_sample=False)
    return [completion.ids for completion in made]


def _log_probs(
    trainer: SDFTTrainer, side: str, prompts: list[RenderedPrompt], answers: list[list[int]]
) -> list[float]:
    """A side's log-probability of each answer, per token, in nats."""
    if not prompts:
        return []
    rollouts = [
        Rollout(i, PromptPair(prompt, prompt), Completion(ids, truncated=False))
        for i, (prompt, ids) in enumerate(zip(prompts, answers, strict=True))
    ]
    with _weights(trainer, side):
        found = trainer.objective.scorer(trainer.args.device).student_log_probs(rollouts)
    return [values.mean().item() for values in found]


def _differences(first: list[float], second: list[float]) -> list[float]:
    return [a - b for a, b in zip(first, second, strict=True)]


def _accuracies(trainer: SDFTTrainer, tasks: Sequence[Task]) -> dict[str, TaskAccuracy]:
    """Both sides' accuracy on the rows that have a context, for the tasks that have such rows."""
    asked = [task.with_contexts() for task in tasks if any(row.in_context is not None for row in task.rows)]
    found = {}
    for side in ("student", "teacher"):
        with _weights(trainer, side):
            found[side] = TaskEvaluator(asked, EvalModel.of(trainer), in_context=side == "teacher").evaluate()
    return {
        student.task.name: TaskAccuracy(
            len(student.task.rows), student.figures["accuracy"], teacher.figures["accuracy"]
        )
        for student, teacher in zip(found["student"], found["teacher"], strict=True)
    }
