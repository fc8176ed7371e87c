"""Supervised fine-tuning, the baseline: cross entropy on the demonstrations, with the same rows, order, batches,
normalization, checkpoints and reports as self-distillation.

    collect   a row's golden_response, or else its privileged context -> completion -> micro-batches; anchors are
              replayed: their golden_response is an answer of the model before training
    loss      cross entropy of the completion given the student's prompt, in chunks (loss/)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import Tensor, nn

from sdft_ds.data.batch import Completion, MicroBatch, Rollout, bucket_by_length
from sdft_ds.data.rows import Example, Prompt, demonstration_of
from sdft_ds.data.schedule import Slot
from sdft_ds.data.streams import Stream
from sdft_ds.loss.chunked import LossTerms
from sdft_ds.loss.divergence import CrossEntropy
from sdft_ds.loss.normalization import LossWeights
from sdft_ds.metrics.meters import Meters
from sdft_ds.model.completion_forward import DistillationLoss
from sdft_ds.objectives.protocol import BatchUse, Objective


@dataclass(frozen=True)
class Demonstration:
    """A micro-batch whose completions are demonstrations."""

    batch: MicroBatch


class SupervisedFineTuning(Objective):
    description = "Supervised fine-tuning on demonstrations, as a baseline of self-distilled fine-tuning."

    def collect(
        self, dataset: Dataset | Stream, slots: tuple[Slot, ...], key: str, meters: Meters, use: BatchUse
    ) -> list[Demonstration]:
        rollouts = [self._demonstration(*self.example(dataset, slot), slot) for slot in slots]
        meters.add("prompts/student_cut", self.parts.prompts.counts.pop("student_prompts_cut", 0))
        meters.count_completions(rollouts)
        found = []
        for rows in bucket_by_length(rollouts, use.micro_batch_size, use.batches_per_step):
            batch = self.collate(rows)
            meters.count_positions(batch)
            found.append(Demonstration(batch))
        return found

    def loss(
        self, model: nn.Module, scored: Demonstration, weights: LossWeights, meters: Meters, step: int | None
    ) -> Tensor:
        request = DistillationLoss(
            positions_N=scored.batch.student.positions_N,
            terms=LossTerms(CrossEntropy(), None, None, scored.batch.tokens_N, weights.weights_N),
            scale=weights.scale,
            chunk_tokens=self.args.loss_chunk_tokens,
        )
        loss = model(**scored.batch.student.inputs, request=request)
        meters.add("completions/loss_tokens", len(scored.batch.tokens_N))
        return loss * self.args.distillation_weight

    def _demonstration(self, row: dict[str, Any], example: Example, slot: Slot) -> Rollout:
        """The demonstration with its end token, truncated to max_completion_length like a rollout."""
        text = demonstration_of(row, example, slot.index)
        ids = self.parts.tokenizer(text, add_special_tokens=False)["input_ids"] + [self._end_of(example.prompt)]
        longest = self.args.max_completion_length
        completion = Completion(ids[:longest], truncated=len(ids) > longest)
        return Rollout(slot.row, self.parts.prompts.build(example, slot.index), completion, slot.counted)

    def _end_of(self, prompt: Prompt) -> int:
        """The end token of a completion of this prompt."""
        return self._end_of_text if isinstance(prompt, str) else self._end_of_turn

    @property
    def _stop_tokens(self) -> list[int]:
        return self.parts.rollouts.sampling.eos_token_ids

    @property
    def _end_of_text(self) -> int:
        eos = self.parts.tokenizer.eos_token_id
        return self._stop_tokens[0] if eos is None else eos

    @cached_property
    def _end_of_turn(self) -> int:
        """If a model has several end tokens, the one that its chat template puts after an assistant turn."""
        tokenizer, kwargs = self.parts.tokenizer, self.parts.prompts.chat_template_kwargs
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)
        ends = [
            token for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in self._stop_tokens
        ]
        return ends[-1] if ends else self._end_of_text
