"""Task evaluation: the same questions before, during and after training, to measure learning and forgetting.

Greedy completions are scored row by row; the retention set also gives the KL from the starting model (retention.py).
No random number is drawn and no weight changed, so training is identical with and without it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.data.batch import Completion
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.distributed import engines, ranks, zero
from sdft_ds.evaluation import retention
from sdft_ds.evaluation.retention import ReferenceContinuation
from sdft_ds.evaluation.tasks import RETENTION, Task, TaskRow
from sdft_ds.files import atomic_write
from sdft_ds.model import completion_forward, prefix_cache
from sdft_ds.model.modes import evaluating
from sdft_ds.model.prefix_cache import longest_row
from sdft_ds.trainer import MethodTrainer

FIGURES = {
    "accuracy": "share of the rows with an answer whose completion is right",
    "mean_length": "tokens of a completion, end-of-sequence token included",
    "clipped_share": "share of completions that hit max_completion_length",
    "kl_to_start": "nats/token, KL(start || now) over the start's own completions, a lower bound; retention set only",
}
FILE = "evaluations.jsonl"

Figures = dict[str, float]


@dataclass(frozen=True)
class EvalModel:
    """The evaluated model. generate: (prompts as token ids, row keys) -> greedy completions. engine: returns the
    current wrapper of the model.

    tokens_per_batch: maximum tokens of a forward that compares rows with the start, padding included. longest: tokens
    of a completion.
    """

    engine: Callable[[], nn.Module]
    generate: Callable[[list[list[int]], list[str]], list[Completion]]
    prompts: PromptBuilder
    tokens_per_batch: int
    longest: int
    device: torch.device

    @classmethod
    def of(cls, trainer: MethodTrainer) -> "EvalModel":
        """The model of a trainer. Prompts of tasks are never truncated."""
        return cls(
            engine=lambda: trainer.model_wrapped,
            generate=lambda prompts, keys: trainer.rollouts.generate(prompts, keys, do_sample=False),
            prompts=trainer.prompts.unlimited(),
            tokens_per_batch=trainer.args.scoring_batch_tokens,
            longest=trainer.args.max_completion_length,
            device=trainer.args.device,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.prompts.tokenizer


@dataclass(frozen=True)
class Result:
    """One task's result. figures: see FIGURES. answers: one record per row."""

    task: Task
    figures: Figures
    answers: list[dict[str, Any]]


@dataclass
class TaskEvaluator:
    """Evaluates a model on tasks. start: the retention set's reference continuations; None before the first pass.

    in_context: ask as the teacher is asked; every row needs a privileged context.
    """

    tasks: list[Task]
    subject: EvalModel
    start: list[ReferenceContinuation] | None = None
    in_context: bool = False
    ids: dict[str, list[list[int]]] = field(init=False)  # of each task's prompts

    def __post_init__(self) -> None:
        """Raises ValueError for a prompt that leaves no room for a completion: prompts are never truncated."""
        self.ids = {task.name: [self._prompt(row) for row in task.rows] for task in self.tasks}
        model = completion_forward.causal_lm_of(engines.model_in(self.subject.engine()))
        longest, what = longest_row(model.config)
        for task in self.tasks:
            for index, (row, prompt) in enumerate(zip(task.rows, self.ids[task.name], strict=True)):
                if longest is not None and len(prompt) + self.subject.longest > longest:
                    raise ValueError(
                        f"Task {task.name}: Row {index if row.number is None else row.number} has {len(prompt)} "
                        f"tokens; with max_completion_length={self.subject.longest} that is over {what}. Leave the "
                        "row out, or lower max_completion_length."
                    )

    def _prompt(self, row: TaskRow) -> list[int]:
        prompts = self.subject.prompts
        if self.in_context:
            return prompts.build(row.in_context, row.number).teacher.ids
        return prompts.render(row.prompt).ids

    def evaluate(self) -> list[Result]:
        """One result per task, the same on every rank. Collective: each rank evaluates its share of the rows.

        The first call records `start` for the retention set, unless it was given.
        """
        return [self._ask(task, self.ids[task.name]) for task in self.tasks]

    def _ask(self, task: Task, prompts: list[list[int]]) -> Result:
        def generate(rows: list[int]) -> list[Completion]:
            return self.subject.generate([prompts[row] for row in rows], [f"tasks/{task.name}/{row}" for row in rows])

        completions = self._on_all_ranks(prompts, generate)
        texts = [self.subject.tokenizer.decode(each.ids, skip_special_tokens=True) for each in completions]
        scores = [row.score(text) for row, text in zip(task.rows, texts, strict=True)]
        marked = [score for score in scores if score is not None]
        figures = {
            "mean_length": sum(len(each.ids) for each in completions) / len(completions),
            "clipped_share": sum(each.truncated for each in completions) / len(completions),
        }
        if marked:
            figures = {"accuracy": sum(marked) / len(marked), **figures}
        if task.name == RETENTION:
            figures["kl_to_start"] = self._kl_to_start(prompts, completions)
        answers = [
            {"prompt": row.prompt, "completion": text, "answer": row.answer, "score": score}
            for row, text, score in zip(task.rows, texts, scores, strict=True)
        ]
        return Result(task, figures, answers)

    def _kl_to_start(self, prompts: list[list[int]], completions: list[Completion]) -> float:
        engine, pad, device = self.subject.engine(), self.subject.tokenizer.pad_token_id, self.subject.device

        def keep(rows: list[int]) -> list[ReferenceContinuation]:
            tokens = [completions[row].ids for row in rows]
            return retention.continuations(forward, [prompts[row] for row in rows], tokens, pad, device)

        def compare(rows: list[int]) -> list[float]:
            start = [self.start[row] for row in rows]
            return retention.divergences(forward, [prompts[row] for row in rows], start, pad, device)

        work = keep if self.start is None else compare
        tokens = [each.ids for each in completions] if self.start is None else [each.tokens for each in self.start]
        with zero.scoring_pass(engine) as forward, evaluating(engine):
            values = self._on_all_ranks(prompts, lambda rows: self._in_batches(work, rows, prompts, tokens))
        if self.start is None:
            self.start = values
            return 0.0
        return retention.mean(values, self.start)

    def _in_batches(
        self,
        work: Callable[[list[int]], list[Any]],
        rows: list[int],
        prompts: list[list[int]],
        tokens: list[list[int]],
    ) -> list[Any]:
        """work(row indices) -> a value per row, by one forward; in batches of at most tokens_per_batch, as many as all
        ranks make."""
        sizes = [len(prompts[row]) + len(tokens[row]) for row in rows]
        batches = prefix_cache.batches_within(self.subject.tokens_per_batch, sizes, [prompts[row] for row in rows])
        found = {}
        for batch in zero.equally_many(self.subject.engine(), batches, self.subject.device):
            found |= zip(batch, work([rows[i] for i in batch]), strict=True)
        return [found[i] for i in range(len(rows))]

    def _on_all_ranks(self, prompts: list[list[int]], work: Callable[[list[int]], list[Any]]) -> list[Any]:
        """work(row indices) -> a value per row, over all rows. Each rank does its share in one call, or repeats the
        last row if it has none."""
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        mine = order[ranks.rank() :: ranks.world_size()] or order[-1:]
        found: dict[int, Any] = {}
        for share in ranks.all_gather_objects(list(zip(mine, work(mine), strict=True))):
            found |= share
        return [found[row] for row in range(len(prompts))]


def check_best_metric(args: TrainingArguments, tasks: list[Task]) -> None:
    """Raises ValueError if metric_for_best_model names a figure that no task has, or if no evaluation compares it."""
    wanted = (args.metric_for_best_model or "").removeprefix("eval_")
    if not wanted.startswith("tasks/"):
        return
    found = [f"tasks/{task.name}/{figure}" for task in tasks for figure in figures_of(task)]
    if wanted not in found:
        there = f"there are {', '.join(found)}" if found else "no tasks are evaluated: set eval_tasks"
        raise ValueError(f"metric_for_best_model={args.metric_for_best_model}: there is no such metric; {there}.")
    if args.eval_strategy == "no":
        raise ValueError(
            f"metric_for_best_model={args.metric_for_best_model} is compared in evaluations, and there are none: set "
            "eval_strategy."
        )


def figures_of(task: Task) -> list[str]:
    """Names of the FIGURES that a task reports."""
    without = [] if any(row.answer is not None for row in task.rows) else ["accuracy"]
    without += [] if task.name == RETENTION else ["kl_to_start"]
    return [name for name in FIGURES if name not in without]


class TaskEvaluation(TrainerCallback):
    """Callback that evaluates the tasks at the start of a run, every `every` steps and at the end; see FIGURES.

    Writes one line per task to OUTPUT_DIR/evaluations.jsonl and the answers to OUTPUT_DIR/evaluations/, logs
    `tasks/NAME/FIGURE`, and prints the first and last figures. A resumed run keeps its earlier figures and `start`.
    An evaluation at the same step reports the figures among its metrics, as `eval_tasks/NAME/FIGURE`; if
    metric_for_best_model is one of them, every evaluation evaluates the tasks. Raises ValueError for a prompt that is
    too long, for `every` below 1, and for a metric_for_best_model that names a figure which no task has.
    """

    def __init__(self, trainer: MethodTrainer, tasks: list[Task], every: int | None = None):
        if every is not None and every < 1:
            raise ValueError(f"eval_tasks_steps must be at least 1, not {every}.")
        args = trainer.args
        check_best_metric(args, tasks)
        self.trainer = trainer
        trainer.task_figures = self.figures_for_evaluation
        self.every = every
        self.step: int | None = None  # of the last evaluation
        self.figures: Figures = {}  # of that evaluation: tasks/NAME/FIGURE
        self.folder = Path(args.output_dir)
        self.examination = TaskEvaluator(tasks, EvalModel.of(trainer))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.step = None
        asked = self.examination.ids.get(RETENTION)
        if state.global_step == 0:
            self.examination.start = None
            self._evaluate(state, control)
            if asked is not None and state.is_world_process_zero:
                retention.save(self.folder, asked, self.examination.start)
        elif asked is not None:
            self.examination.start = retention.load(self.folder, asked)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        due = self.every is not None and state.global_step % self.every == 0
        if due and not self.trainer.preemption.agreed:
            self._evaluate(state, control)

    def figures_for_evaluation(self) -> Figures:
        """tasks/NAME/FIGURE at the current step; evaluated now if metric_for_best_model needs them, {} if unknown."""
        state = self.trainer.state
        decide = (self.trainer.args.metric_for_best_model or "").removeprefix("eval_").startswith("tasks/")
        if decide and self.trainer.is_in_train and self.step != state.global_step:
            self._evaluate(state, self.trainer.control)
        return self.figures if self.step == state.global_step else {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.preemption.agreed:
            return
        if self.step != state.global_step or args.load_best_model_at_end:  # which may have loaded another model
            self._evaluate(state, control)
        if state.is_world_process_zero:
            lines = read_figures(self.folder)
            lines = [each for each in lines if each["task"] in self.examination.ids]
            first, last = ([each for each in lines if each["step"] == step] for step in (0, state.global_step))
            print_table({"before": first, "after": last})

    def _evaluate(self, state: TrainerState, control: TrainerControl) -> None:
        asked = ", ".join(f"{len(task.rows)} of {task.name}" for task in self.examination.tasks)
        ranks.tell(f"Asking questions at step {state.global_step}: {asked}.")
        results = self.examination.evaluate()
        if state.is_world_process_zero:
            for result in results:
                name = f"{result.task.name}-step-{state.global_step}.jsonl"
                _write(self.folder / "evaluations" / name, result.answers)
            write_figures(self.folder, state.global_step, [record(result) for result in results])
        self.step = state.global_step
        self.figures = {f"tasks/{each.task.name}/{name}": v for each in results for name, v in each.figures.items()}
        due = control.should_log  # our log() resets it, and the step's own line would be lost
        self.trainer.log(dict(self.figures))
        control.should_log = due


def read_figures(folder: Path) -> list[dict[str, Any]]:
    """The lines of FILE."""
    path = folder / FILE
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()] if path.exists() else []


def write_figures(folder: Path, step: int, records: list[dict[str, Any]]) -> None:
    """Adds the records of a step to FILE. A run that starts over or resumes replaces the same tasks' lines of this
    step, and all lines of later ones."""
    tasks = {each["task"] for each in records}
    kept = [
        each
        for each in read_figures(folder)
        if each["step"] < step or (each["step"] == step and each["task"] not in tasks)
    ]
    _write(folder / FILE, kept + [{"step": step, **each} for each in records])


def record(result: Result) -> dict[str, Any]:
    """A result as one line of FILE: everything but the answers."""
    return {"task": result.task.name, "rows": len(result.task.rows), **result.figures}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes JSON Lines atomically."""
    with atomic_write(path) as aside:
        aside.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), "utf-8")


def print_table(columns: dict[str, list[dict[str, Any]]]) -> None:
    """Prints each task's accuracy and the retention set's KL. columns: name -> lines of FILE; – where missing."""
    table = Table("", *columns, title="Learning and forgetting")
    found = {(name, each["task"]): each for name, lines in columns.items() for each in lines}
    for task in dict.fromkeys(task for _, task in found):
        for figure, label, digits in (("accuracy", "accuracy", ".3f"), ("kl_to_start", "KL, nats/token", ".3g")):
            values = [found.get((name, task), {}).get(figure) for name in columns]
            if values != [None] * len(values):
                shown = ["–" if value is None else format(value, digits) for value in values]
                table.add_row(f"{task}: {label}", *shown)
    Console().print(table)
