"""Scoring pass: the teacher's hidden states for a generation batch, without grad, before the student's forwards.

Shapes: R rows, U unique prompts, C completion positions, N loss tokens, D hidden. Only hidden states are kept, [n, D]
in the compute dtype for the n loss tokens of each rollout, never logits; the loss projects them with the teacher's
head, which is copied if its values will differ from the student's by then.

The pass forms its own batches, independent of the student's: rows of similar length, up to a token budget. A prompt
shared by several completions is computed once, and its KV cache is copied to each of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sdft_ds.data.batch import LossMask, MicroBatch, PackedInputs, Rollout, pack_rows, pad_left, pad_right
from sdft_ds.distributed import zero
from sdft_ds.loss.chunked import HeadValues
from sdft_ds.model import prefix_cache
from sdft_ds.model.completion_forward import HiddenStates, TokenLogProbs, causal_lm_of, head_of
from sdft_ds.model.lm_head import tensors_of as head_tensors
from sdft_ds.model.modes import evaluating
from sdft_ds.model.packing import Packing
from sdft_ds.teacher import Teacher


@dataclass(frozen=True)
class TeacherStates:
    """hidden[i]: hidden states at the loss tokens of rollout i, [n, D]. head: None: the student's at use time."""

    hidden: list[Tensor]
    head: HeadValues | None


@dataclass(frozen=True)
class ScoredBatch:
    """A micro-batch with the hidden states of the teacher, if there is one, and old log-probabilities if needed.

    sampler_log_probs_N: the sampler's log-probabilities, None if unknown; weights_version: of the weights that it had.
    """

    batch: MicroBatch
    teacher_hidden_ND: Tensor | None
    teacher_head: HeadValues | None
    old_log_probs_N: Tensor | None = None
    sampler_log_probs_N: Tensor | None = None
    weights_version: int | None = None


@dataclass(frozen=True)
class Scorer:
    """dtype: compute dtype, in which the head multiplies. keep_on: device that stores hidden states until the loss.

    temperature: of the old log-probabilities. tokens_per_batch: the token budget, including padding. start: scores
    anchors in the teacher's place; its head is the student's.
    """

    engine: nn.Module
    teacher: Teacher
    loss_mask: LossMask
    pad_token_id: int
    dtype: torch.dtype
    keep_on: torch.device
    temperature: float
    tokens_per_batch: int
    packing: Packing
    start: Teacher | None = None

    @torch.no_grad()
    def score(self, rollouts: list[Rollout], head_changes: bool) -> TeacherStates:
        """The teacher's hidden states of all rollouts, in one weight swap. Called by all ranks together.

        head_changes: the batch outlives an optimizer step, so a trained student head will have been updated before the
        batch is used last.
        """
        head = head_of(self.teacher.model)
        student_head = head_tensors(head)
        trained = any(tensor.requires_grad for tensor in student_head.present())
        with (
            zero.scoring_pass(self.engine) as forward,
            evaluating(self.engine),
            self.teacher.weights(self.engine),
        ):
            anchors = [i for i, each in enumerate(rollouts) if each.prompts.anchor] if self.start is not None else []
            others = [i for i, each in enumerate(rollouts) if self.start is None or not each.prompts.anchor]
            hidden = self._hidden_states(forward, rollouts, others)
            if self.start is not None:
                with self.start.weights(self.engine):
                    hidden |= self._hidden_states(forward, rollouts, anchors)
            teacher_head = head_tensors(head)
            other = not teacher_head.is_that_of(student_head)
            values = None
            # Whether to copy the head. If not, the loss uses the student's tensors with their values at that time.
            #
            #     head trained               no   yes   yes
            #     batch outlives a step      any  no    yes
            #     live                       no   no    yes   the step will have updated the student's head
            #     ema, base as a shadow      no   yes   yes   the same tensors, but swapping back changes their values
            #     base, adapters disabled    no   yes   yes   `other`: the student's head is a LoRA layer or a copy
            #
            # A LoRA layer, also with a frozen adapter, makes `other` true; copied() then only drops the adapter.
            if other or (trained and (self.teacher.head_differs or head_changes)):
                zero.drop_prefetched(self.engine)
                values = teacher_head.copied(student_head)
                weight, bias = (
                    None if tensor is None else tensor.to(self.dtype) for tensor in (values.weight_VD, values.bias_V)
                )
                values = replace(values, weight_VD=weight, bias_V=bias)
        return TeacherStates([hidden[i] for i in range(len(rollouts))], values)

    @torch.no_grad()
    def student_log_probs(self, rollouts: list[Rollout]) -> list[Tensor]:
        """The student's current log-probability of every token of each completion."""
        found: list[Tensor] = [torch.empty(0)] * len(rollouts)
        rows = [rollout.prompts.student.ids + rollout.completion.ids for rollout in rollouts]
        with zero.scoring_pass(self.engine) as forward, evaluating(self.engine):
            for batch in self._batches([len(row) for row in rows], rows):
                counts = [len(rollouts[i].completion.ids) for i in batch]
                view = self._view([rows[i] for i in batch], counts)
                tokens = torch.tensor([token for i in batch for token in rollouts[i].completion.ids])
                request = TokenLogProbs(view.positions_N, tokens.to(self._device), self.temperature)
                log_probs = forward(**view.inputs, request=request).float()
                for i, values in zip(batch, log_probs.split(counts), strict=True):
                    found[i] = values
        return found

    def _view(self, rows: list[list[int]], counts: list[int]) -> PackedInputs:
        return pack_rows(rows, counts, self.packing.bins_of(list(map(len, rows))), self.pad_token_id, self._device)

    @property
    def _device(self) -> torch.device:
        return self.teacher.args.device

    def _hidden_states(self, forward: nn.Module, rollouts: list[Rollout], at: list[int]) -> dict[int, Tensor]:
        """Those of the rollouts with indices `at`. A rank with none of them computes another one, because every rank
        must run a forward."""
        rollouts = [rollouts[i] for i in at or [0]]
        kept: list[Tensor] = [torch.empty(0)] * len(rollouts)
        prompts = [rollout.prompts.teacher.ids for rollout in rollouts]
        # Decided by settings, not by which prompts a rank's rows share: all ranks must run the same forwards.
        shares = self.teacher.args.num_generations > 1 and prefix_cache.supports_prefixes(
            causal_lm_of(self.teacher.model)
        )
        states_of = self._after_shared_prompts if shares else self._of_whole_rows
        for batch in self._batches([len(r.prompts.teacher.ids) + len(r.completion.ids) for r in rollouts], prompts):
            states = states_of(forward, [rollouts[i] for i in batch])
            for i, states_ND in zip(batch, states, strict=True):
                kept[i] = states_ND.to(self.dtype).to(self.keep_on)
        return dict(zip(at, kept, strict=False))

    def _batches(self, lengths: list[int], prompts: list[list[int]]) -> list[list[int]]:
        """Row indices, in batches within the budget, as many as all ranks make."""
        batches = prefix_cache.batches_within(self.tokens_per_batch, lengths, prompts)
        return zero.equally_many(self.engine, batches, self._device)

    def _of_whole_rows(self, forward: nn.Module, rollouts: list[Rollout]) -> tuple[Tensor, ...]:
        rows = [rollout.prompts.teacher.ids + rollout.completion.ids for rollout in rollouts]
        counts = [self.loss_mask.count(rollout) for rollout in rollouts]
        view = self._view(rows, counts)
        return forward(**view.inputs, request=HiddenStates(view.positions_N)).split(counts)

    def _after_shared_prompts(self, forward: nn.Module, rollouts: list[Rollout]) -> list[Tensor]:
        """Two forwards: one over the unique prompts, whose last state predicts the first token, and one over all but
        the last token of each completion, with the prompts' KV cache."""
        prompts = [rollout.prompts.teacher.ids for rollout in rollouts]
        first, prompt_of_row = prefix_cache.distinct(prompts)
        input_ids_UT, mask_UT = pad_left([prompts[r] for r in first], self.pad_token_id, self._device)
        cache = prefix_cache.empty_cache(causal_lm_of(self.teacher.model))
        width = input_ids_UT.shape[1]
        padded = prefix_cache.are_padded(list(map(len, prompts)), width)
        ends_U = torch.arange(1, len(first) + 1, device=self._device) * width - 1
        last_UD = forward(
            **prefix_cache.prompt_inputs(input_ids_UT, mask_UT, padded),
            request=HiddenStates(ends_U), past_key_values=cache, use_cache=True,
        )  # fmt: skip
        completions = [rollout.completion.ids for rollout in rollouts]
        ids_RC = pad_right([ids[:-1] or ids for ids in completions], self.pad_token_id, self._device)
        rows_R = torch.tensor(prompt_of_row, device=self._device)
        prefix_cache.fan_out(cache, rows_R, room=ids_RC.shape[1])
        states_RCD = forward(
            **prefix_cache.next_inputs(ids_RC, mask_UT[rows_R], 0, padded),
            request=HiddenStates(torch.arange(ids_RC.numel(), device=self._device)),
            past_key_values=cache, use_cache=True,
        ).view(*ids_RC.shape, -1)  # fmt: skip
        found = []
        for r, rollout in enumerate(rollouts):
            whole = torch.cat([last_UD[prompt_of_row[r]].unsqueeze(0), states_RCD[r, : len(completions[r]) - 1]])
            found.append(whole[self.loss_mask.first_token(rollout) :])
        return found
