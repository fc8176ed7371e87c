"""Some completions of a step, token by token: what was said, how far the teacher is from it, what both hold likely.

Written to OUTPUT_DIR/completions/step-N.parquet, in the columns of report.run_folder.Completion, and as a table to the
trackers that have tables. Taken from the training forward itself, on the first rank.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import torch
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_trackio_available, is_wandb_available

from sdft_ds.config import SDFTConfig
from sdft_ds.inspection import Side, TwoSides
from sdft_ds.paired_batch import Rollout
from sdft_ds.report.run_folder import Completion
from sdft_ds.scoring import Scored
from sdft_ds.whole_files import written_aside

SHOWN = ("prompt", "teacher_prompt", "completion", "divergence_mean", "length", "truncated")


class CompletionLog(TrainerCallback):
    """Every `log_completions` steps, and at the first, the first `log_completions_rows` completions."""

    def __init__(self, args: SDFTConfig, tokenizer: PreTrainedTokenizerBase, first_rank: bool):
        self.every = args.log_completions if first_rank else 0
        self.rows = args.log_completions_rows
        self.tokenizer = tokenizer
        self.taken: list[Completion] = []

    def wanted(self, step: int, scored: Scored) -> list[int]:
        """The rows of a micro-batch of optimizer step `step` (from 1) that are to be taken."""
        if not self.every or (step % self.every and step != 1):
            return []
        counted = [r for r, rollout in enumerate(scored.batch.rollouts) if rollout.counted and not rollout.empty]
        return counted[: self.rows - len(self.taken)]

    def tokens_of(self, rows: list[int], scored: Scored) -> Tensor:
        """The numbers of the loss tokens of these rows."""
        rows_N = scored.batch.rows_N
        return torch.isin(rows_N, torch.tensor(rows, dtype=rows_N.dtype, device=rows_N.device)).nonzero().flatten()

    def take(self, step: int, rows: list[int], scored: Scored, divergence_M: Tensor, seen: TwoSides) -> None:
        """Keep the rows; of each token of theirs, in order, the divergence and what both sides thought."""
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
        with written_aside(Path(args.output_dir, "completions", f"step-{state.global_step}.parquet")) as aside:
            parquet.write_table(pyarrow.Table.from_pylist(taken), aside)
        rows = [[each[name] for name in SHOWN] for each in taken]
        _to_trackers(args.report_to, rows, state.global_step)
        if args.print_completions:
            print_table(rows, state.global_step)


def completion_of(
    rollout: Rollout, divergence_M: Tensor, seen: TwoSides, tokenizer: PreTrainedTokenizerBase, step: int
) -> Completion:
    """A rollout as it is shown; M are its loss tokens, the last ones of the completion."""
    ids, divergence = rollout.completion.ids, divergence_M.tolist()
    before = len(ids) - len(divergence)

    def likeliest(side: Side) -> list[list[dict[str, Any]]]:
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
    """The text of each token, special ones too; joined they are the text of all.

    A character that several tokens make up stands at the last of them, and the others are empty.
    """
    texts, start, read = [], 0, 0  # what is decoded begins one token before the one that is read
    for end in range(1, len(ids) + 1):
        before, now = (tokenizer.decode(ids[start:until], skip_special_tokens=False) for until in (read, end))
        whole = end == len(ids) or not now.endswith("\ufffd")
        texts.append(now[len(before) :] if whole else "")
        if whole:
            start, read = read, end
    return texts


def _to_trackers(report_to: list[str], rows: list[list[Any]], step: int) -> None:
    """As transformers logs: the tracker counts for itself, and drops what names a step that its count has passed."""
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
