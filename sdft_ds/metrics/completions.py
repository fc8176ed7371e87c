"""Logs sampled completions token by token: text, divergence, and the top-5 tokens of student and teacher.

Written to OUTPUT_DIR/completions/step-N.parquet, with the columns of metrics.run_folder.Completion, and as a table to
trackers that support tables. Recorded during the training forward, on rank 0.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_trackio_available, is_wandb_available

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.batch import Completion as Generated
from sdft_ds.data.batch import Rollout
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import example_from_row
from sdft_ds.files import atomic_write
from sdft_ds.loss.diagnostics import DistributionStats, TokenDiagnostics
from sdft_ds.metrics.run_folder import Completion
from sdft_ds.teacher.scoring import ScoredBatch

SHOWN = ("prompt", "teacher_prompt", "completion", "divergence_mean", "length", "truncated")


class CompletionLog(TrainerCallback):
    """Logs the first `log_completions_rows` completions at step 1 and every `log_completions` steps."""

    def __init__(self, args: SDFTConfig, tokenizer: PreTrainedTokenizerBase, first_rank: bool):
        self.every = args.log_completions if first_rank else 0
        self.rows = args.log_completions_rows
        self.tokenizer = tokenizer
        self.taken: list[Completion] = []

    def wanted(self, step: int, scored: ScoredBatch) -> list[int]:
        """The rows to log from a micro-batch of optimizer step `step` (from 1)."""
        if not self.every or (step % self.every and step != 1):
            return []
        counted = [
            r
            for r, rollout in enumerate(scored.batch.rollouts)
            if rollout.counted and rollout.in_loss and not rollout.empty and not rollout.prompts.anchor
        ]
        return counted[: self.rows - len(self.taken)]

    def tokens_of(self, rows: list[int], scored: ScoredBatch) -> Tensor:
        """The indices of these rows' loss tokens."""
        rows_N = scored.batch.rows_N
        return torch.isin(rows_N, torch.tensor(rows, dtype=rows_N.dtype, device=rows_N.device)).nonzero().flatten()

    def take(
        self, step: int, rows: list[int], scored: ScoredBatch, divergence_M: Tensor, seen: TokenDiagnostics
    ) -> None:
        """Keep the rows. divergence_M, seen: divergence and diagnostics of each of their loss tokens, in order."""
        start = 0
        for r in rows:
            count = int((scored.batch.rows_N == r).sum())
            part = slice(start, start + count)
            start += count
            rollout = scored.batch.rollouts[r]
            self.taken.append(completion_of(rollout, divergence_M[part], seen[part], self.tokenizer, step))

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.taken:
            return
        taken, self.taken = [asdict(each) for each in self.taken], []
        with atomic_write(Path(args.output_dir, "completions", f"step-{state.global_step}.parquet")) as aside:
            parquet.write_table(pyarrow.Table.from_pylist(taken), aside)
        rows = [[each[name] for name in SHOWN] for each in taken]
        _to_trackers(args.report_to, rows, state.global_step)
        if args.print_completions:
            print_table(rows, state.global_step)


def completion_of(
    rollout: Rollout, divergence_M: Tensor, seen: TokenDiagnostics, tokenizer: PreTrainedTokenizerBase, step: int
) -> Completion:
    """A rollout as it is logged; M: its loss tokens, the last ones of the completion."""
    ids, divergence = rollout.completion.ids, divergence_M.tolist()
    before = len(ids) - len(divergence)

    def likeliest(side: DistributionStats) -> list[list[dict[str, Any]]]:
        return [[]] * before + [
            [{"token": tokenizer.decode([token]), "p": p} for token, p in zip(tokens, ps, strict=True)]
            for tokens, ps in zip(side.likeliest_M5.tolist(), side.probabilities_M5.tolist(), strict=True)
        ]

    return Completion(
        step=step,
        prompt=rollout.prompts.student.text,
        teacher_prompt=rollout.prompts.teacher.text,
        completion=tokenizer.decode(ids),
        length=len(ids),
        truncated=rollout.completion.truncated,
        divergence_mean=sum(divergence) / len(divergence) if divergence else None,
        tokens=token_texts(tokenizer, ids),
        divergence=[None] * before + divergence,
        student_top=likeliest(seen.student),
        teacher_top=likeliest(seen.teacher),
    )


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """The text of each token, including special tokens; concatenated they are the full text.

    A character that spans several tokens is assigned to the last of them, and the others are empty.
    """
    texts, start, read = [], 0, 0  # decoding starts one token before the current one
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[start:until], skip_special_tokens=False) for until in (read, end))
        whole = end == len(ids) or not now.endswith("\ufffd")
        texts.append(now[len(before) :] if whole else "")
        if whole:
            start, read = read, end
    return texts


def _to_trackers(report_to: list[str], rows: list[list[Any]], step: int) -> None:
    """Without a step, like transformers: trackers count steps themselves and drop entries for steps already past."""
    if "wandb" in report_to and is_wandb_available():
        import wandb

        wandb.log({"completions": wandb.Table(columns=list(SHOWN), data=rows), "train/global_step": step})
    if "trackio" in report_to and is_trackio_available():
        import pandas
        import trackio

        table = trackio.Table(dataframe=pandas.DataFrame(rows, columns=SHOWN))
        trackio.log({"completions": table, "train/global_step": step})


def print_table(rows: list[list[Any]], step: int) -> None:
    columns = ("prompt", "teacher's prompt", "completion", "nats/token", "tokens")
    table = Table(*columns, title=f"Completions of step {step}", show_lines=True)
    for prompt, teacher_prompt, completion, divergence, length, truncated in rows:
        shown = "–" if divergence is None else f"{divergence:.3g}"
        tokens = f"{length}{' (cut off)' if truncated else ''}"
        table.add_row(prompt[-300:], teacher_prompt[-300:], completion[:300], shown, tokens)
    Console().print(table, markup=False)


class ShowCompletions(TrainerCallback):
    """Prints the student's greedy completions of the first `count` rows of a data set after every evaluation.

    generate: that of the trainer's `rollouts`; prompts: the trainer's. All ranks generate.
    """

    def __init__(self, generate: Callable[..., list[Generated]], prompts: PromptBuilder, dataset: Dataset, count: int):
        self.generate = generate
        self.prompts = prompts
        rows = range(min(count, len(dataset)))
        self.examples = [example_from_row(dataset[i], i, prompts.context_optional) for i in rows]

    def on_evaluate(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        prompts = [self.prompts.build(example, i).student for i, example in enumerate(self.examples)]
        keys = [f"shown/{i}" for i in range(len(prompts))]
        completions = self.generate([prompt.ids for prompt in prompts], keys, do_sample=False)
        if state.is_world_process_zero:
            table = Table("prompt", "completion", title=f"Completions at step {state.global_step}", show_lines=True)
            for prompt, completion in zip(prompts, completions, strict=True):
                table.add_row(_end(prompt.text), _end(self.prompts.tokenizer.decode(completion.ids)))
            Console().print(table, markup=False)


def _end(text: str, most: int = 300) -> str:
    return text if len(text) <= most else "…" + text[-most:]
