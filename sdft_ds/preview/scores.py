"""Rollouts of a few rows by the trainer itself, and how far its student and its teacher are apart on their tokens."""

from typing import Any

import torch

from sdft_ds.aggregation import Shares
from sdft_ds.completion_head import DistillationLoss
from sdft_ds.completion_log import completion_of
from sdft_ds.module_state import evaluating
from sdft_ds.report.run_folder import Completion
from sdft_ds.schedule import Slot
from sdft_ds.scoring import Scored
from sdft_ds.trainer import SDFTTrainer


def scores(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]]) -> dict[int, Completion]:
    """One completion for each {number: row}, with the divergence of its loss tokens. Trains nothing."""
    with trainer.prepared():
        return _scores(trainer, rows)


def _scores(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]]) -> dict[int, Completion]:
    slots = tuple(Slot(index, row) for row, index in enumerate(rows))
    batches = trainer.generation_batches.make(
        rows, slots, trainer.args.per_device_train_batch_size, "preview", trainer.meters["eval"], head_changes=False
    )
    found = {}
    for scored in batches:
        loss = _seen(trainer, scored)
        for i, rollout in enumerate(scored.batch.rollouts):
            at = (scored.batch.rows_N == i).nonzero().flatten()
            part = slice(int(at[0]), int(at[-1]) + 1) if len(at) else slice(0, 0)
            tokenizer = trainer.generation_batches.tokenizer
            found[slots[rollout.row].index] = completion_of(
                rollout, loss.per_token_N[part], loss.seen[part], tokenizer, step=0
            )
    return found


def _seen(trainer: SDFTTrainer, scored: Scored) -> DistillationLoss:
    """The student's forward over a micro-batch, which looks at every loss token."""
    weights_N = torch.ones(len(scored.batch.tokens_N), device=trainer.args.device)
    loss = trainer.loss_request(scored, Shares(weights_N, scale=torch.ones((), device=trainer.args.device)))
    loss.inspect_M = torch.arange(len(weights_N), device=trainer.args.device)
    with torch.no_grad(), evaluating(trainer.model), trainer.compute_loss_context_manager():
        trainer.model_wrapped(**scored.batch.student.inputs, request=loss)
    return loss
