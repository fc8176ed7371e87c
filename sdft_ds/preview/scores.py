"""Rolls out the rows of a preview with the trainer and scores them: divergence of student and teacher per token, and
whether the teacher can teach."""

from collections.abc import Sequence
from typing import Any

import torch

from sdft_ds.data.schedule import Slot
from sdft_ds.evaluation.tasks import Task
from sdft_ds.loss.normalization import LossWeights
from sdft_ds.metrics.completions import completion_of
from sdft_ds.metrics.run_folder import Completion
from sdft_ds.model.completion_forward import DistillationLoss
from sdft_ds.model.modes import evaluating
from sdft_ds.objectives.protocol import BatchUse
from sdft_ds.preview.preview import Preview
from sdft_ds.preview.teacher_check import check
from sdft_ds.preview.wording import described
from sdft_ds.teacher.scoring import ScoredBatch
from sdft_ds.trainer import SDFTTrainer


def add_scores(view: Preview, trainer: SDFTTrainer, tasks: Sequence[Task] = ()) -> None:
    """Adds to the preview the answers of the rows that are shown and the teacher check. Trains nothing."""
    examples = {index: vars(shown.look.example) for index, shown in view.used.items()}
    for index, completion in scores(trainer, examples).items():
        view.used[index].scored = completion
    golden = {index: text for index, text in view.golden.items() if index in examples}
    view.verdict = check(trainer, examples, golden, tasks).lines
    view.facts += [f"teacher {trainer.args.teacher_model_kind}", described(trainer.args.divergence)]


def scores(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]]) -> dict[int, Completion]:
    """One completion per {index: row}, with the divergence of its loss tokens. Trains nothing."""
    with trainer.prepared():
        return _scores(trainer, rows)


def _scores(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]]) -> dict[int, Completion]:
    slots = tuple(Slot(index, row) for row, index in enumerate(rows))
    trainer.check_head()
    use = BatchUse(trainer.args.per_device_train_batch_size, keep_on=trainer.args.device)
    batches = trainer.objective.collect(rows, slots, "preview", trainer.meters["eval"], use)
    found = {}
    for scored in batches:
        loss = _seen(trainer, scored)
        for i, rollout in enumerate(scored.batch.rollouts):
            at = (scored.batch.rows_N == i).nonzero().flatten()
            part = slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
            tokenizer = trainer.prompts.tokenizer
            found[slots[rollout.row].index] = completion_of(
                rollout, loss.per_token_N[part], loss.seen[part], tokenizer, step=0
            )
    return found


def _seen(trainer: SDFTTrainer, scored: ScoredBatch) -> DistillationLoss:
    """The student's forward over a micro-batch, with diagnostics at every loss token."""
    device, tokens = trainer.args.device, len(scored.batch.tokens_N)
    weights = LossWeights(torch.ones(tokens, device=device), scale=torch.ones((), device=device))
    loss = trainer.objective.loss_request(scored, weights, inspect_M=torch.arange(tokens, device=device))
    with torch.no_grad(), evaluating(trainer.model), trainer.compute_loss_context_manager():
        trainer.model_wrapped(**scored.batch.student.inputs, request=loss)
    return loss
