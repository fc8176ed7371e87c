"""Selects the tokens at which the student's forward reports both distributions, for metrics and logged completions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.batch import MicroBatch
from sdft_ds.loss.diagnostics import evenly_spaced
from sdft_ds.metrics.completions import CompletionLog
from sdft_ds.metrics.meters import Meters
from sdft_ds.model.completion_forward import DistillationLoss
from sdft_ds.teacher.scoring import ScoredBatch


@dataclass(frozen=True)
class Picked:
    """at_M: the inspected loss tokens, or None. The first `sampled` are for the metrics; the others are all tokens of
    `rows`, logged after optimizer step `step`."""

    at_M: Tensor | None
    sampled: int
    rows: list[int]
    step: int


class Inspector:
    """Inspects an evenly spaced sample of each micro-batch's loss tokens, and full completions for the log. Training
    only."""

    def __init__(self, args: SDFTConfig, completion_log: CompletionLog):
        self.args = args
        self.completion_log = completion_log

    def pick(self, scored: ScoredBatch, step: int | None) -> Picked:
        """The tokens that the request is to report. step: None in an evaluation, where nothing is inspected."""
        if step is None:
            return Picked(None, 0, [], 0)
        at_M = self._sample(scored.batch)
        sampled = len(at_M)
        rows = self.completion_log.wanted(step, scored)
        if rows:  # finding their tokens synchronizes with the device
            at_M = torch.cat([at_M, self.completion_log.tokens_of(rows, scored)])
        return Picked(at_M if len(at_M) else None, sampled, rows, step)

    def _sample(self, batch: MicroBatch) -> Tensor:
        """Loss tokens, without those of anchors."""
        if batch.others_M is None:
            return evenly_spaced(len(batch.tokens_N), self.args.inspect_tokens, self.args.device)
        return batch.others_M[evenly_spaced(len(batch.others_M), self.args.inspect_tokens, self.args.device)]

    def record(self, picked: Picked, request: DistillationLoss, scored: ScoredBatch, meters: Meters) -> None:
        """Add what the forward reported to the metrics, and keep the rows to log."""
        meters.add_divergences(request.per_token_N, scored.batch.offsets_N, scored.batch.anchor_N)
        if request.seen is None:
            return
        sample_M, logged_M = picked.at_M[: picked.sampled], picked.at_M[picked.sampled :]
        if picked.rows:
            seen = request.seen[picked.sampled :]
            self.completion_log.take(picked.step, picked.rows, scored, request.per_token_N[logged_M], seen)
        old_M = None if scored.old_log_probs_N is None else scored.old_log_probs_N[sample_M]
        meters.add_diagnostics(request.seen[: picked.sampled], old_M, self.args.distillation_is_clip)
