"""Rollouts of a few rows by the trainer itself, and how far its student and its teacher are apart on their tokens."""

from typing import Any

import torch
from torch import Tensor

from sdft_ds.aggregation import Shares
from sdft_ds.completion_head import LikeliestTokens
from sdft_ds.module_state import evaluating
from sdft_ds.paired_batch import Rollout
from sdft_ds.preview.pieces import token_texts
from sdft_ds.report.run_folder import Completion
from sdft_ds.schedule import Slot
from sdft_ds.scoring import Scored
from sdft_ds.trainer import SDFTTrainer

LIKELIEST = 5


def scores(trainer: SDFTTrainer, rows: dict[int, dict[str, Any]]) -> dict[int, Completion]:
    """One completion for each {number: row}, with the divergence of its loss tokens. Trains nothing."""
    slots = tuple(Slot(index, row) for row, index in enumerate(rows))
    batches = trainer.generation_batches.make(
        rows, slots, trainer.args.per_device_train_batch_size, "preview", trainer.meters["eval"], head_changes=False
    )
    found = {}
    for scored in batches:
        divergence_N, top_2NK, ids_2NK = _of_loss_tokens(trainer, scored)
        for i, rollout in enumerate(scored.batch.rollouts):
            mine_N = scored.batch.rows_N == i
            found[slots[rollout.row].index] = _completion(
                trainer,
                rollout,
                divergence_N[mine_N].tolist(),
                top_2NK[:, mine_N].tolist(),
                ids_2NK[:, mine_N].tolist(),
            )
    return found


def _of_loss_tokens(trainer: SDFTTrainer, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [N], probabilities and ids of the likeliest tokens of student and teacher [2, N, K])."""
    weights_N = torch.ones(len(scored.batch.tokens_N), device=trainer.args.device)
    loss = trainer.loss_request(scored, Shares(weights_N, scale=torch.ones((), device=trainer.args.device)))
    likeliest = LikeliestTokens(
        loss.positions_N, loss.terms.teacher_hidden_ND, scored.teacher_head, LIKELIEST, trainer.args.temperature
    )
    with torch.no_grad(), evaluating(trainer.model), trainer.compute_loss_context_manager():
        trainer.model_wrapped(**scored.batch.student.inputs, request=loss)
        top_2NK = trainer.model_wrapped(**scored.batch.student.inputs, request=likeliest)
    return loss.per_token_N, top_2NK, likeliest.ids


def _completion(
    trainer: SDFTTrainer, rollout: Rollout, divergence: list[float], top: list[list], ids: list[list]
) -> Completion:
    tokenizer, completion = trainer.generation_batches.tokenizer, rollout.completion
    skipped = len(completion.ids) - len(divergence)

    def likeliest(side: int) -> list[list[dict[str, Any]]]:
        texts = [[tokenizer.decode([token]) for token in of_token] for of_token in ids[side]]
        return [[]] * skipped + [
            [{"token": text, "p": p} for text, p in zip(*of_token, strict=True)]
            for of_token in zip(texts, top[side], strict=True)
        ]

    tokens = token_texts(tokenizer, completion.ids)
    return Completion(
        step=0,
        prompt=rollout.prompts.student.text,
        teacher_prompt=rollout.prompts.teacher.text,
        completion="".join(tokens),
        length=len(completion.ids),
        truncated=completion.truncated,
        divergence_mean=sum(divergence) / len(divergence) if divergence else None,
        tokens=tokens,
        divergence=[None] * skipped + divergence,
        student_top=likeliest(0),
        teacher_top=likeliest(1),
    )
