"""Rows of a data set -> scored micro-batches: prompts, rollouts, pairing and the teacher's pass, once per generation
batch and before any forward of the student's step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sdft_ds import completion_head, zero
from sdft_ds.config import SDFTConfig
from sdft_ds.head import tensors_of as head_tensors
from sdft_ds.metrics import Meters
from sdft_ds.packing import Packing
from sdft_ds.paired_batch import Completion, PairedBatch, Rollout, by_length, pad_left, pad_right, pair
from sdft_ds.prompts import PromptBuilder
from sdft_ds.rollouts import Sampler
from sdft_ds.rows import example_from_row
from sdft_ds.schedule import Slot
from sdft_ds.scoring import Scored, Scorer
from sdft_ds.teacher import Teacher


@dataclass
class GenerationBatches:
    """Makes generation batches from the current weights.

    engine: gives what wraps the model for training at the moment. dispatch: calls an event on the run's callbacks,
    with the arguments that its second argument makes.
    """

    args: SDFTConfig
    accelerator: Accelerator
    model: nn.Module
    engine: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    sampler: Sampler
    teacher: Teacher
    packing: Packing
    dispatch: Callable[..., None]
    head_checked: bool = False

    def make(
        self,
        dataset: Dataset,
        slots: tuple[Slot, ...],
        batch_size: int,
        key: str,
        meters: Meters,
        head_changes: bool,
        batches_per_step: int = 1,
        keep_on: torch.device | None = None,
    ) -> list[Scored]:
        """Scored micro-batches of `batch_size` rows each. Every rank calls it with as many slots.

        key: names the batch in its rows' randomness. head_changes, keep_on: see Scorer. batches_per_step: see
        by_length.
        """
        self.check_head()
        args, pad = self.args, self.tokenizer.pad_token_id
        with meters.phase("rollout"):
            rollouts = self._roll_out(dataset, slots, key, meters)
        with meters.phase("teacher"):
            scorer = Scorer(
                engine=self.engine(),
                teacher=self.teacher,
                loss_mask=args.loss_mask,
                pad_token_id=pad,
                dtype=self._compute_dtype(),
                keep_on=keep_on or args.device,
                temperature=args.temperature,
                tokens_per_batch=args.scoring_batch_tokens,
                packing=self.packing,
            )
            old = self._old_log_probs(scorer, rollouts)
            states = scorer.score(rollouts, head_changes)
        number = {rollout.row: i for i, rollout in enumerate(rollouts)}
        scored = []
        for rows in by_length(rollouts, batch_size, batches_per_step):
            batch = self.pair(rows)
            at = [number[rollout.row] for rollout in rows]
            first = [args.loss_mask.first_token(rollout) for rollout in rows]
            old_N = torch.cat([old[i][start:] for i, start in zip(at, first, strict=True)]) if old else None
            scored.append(Scored(batch, torch.cat([states.hidden[i] for i in at]), states.head, old_N))
            meters.count_positions(batch)
        return scored

    def pair(self, rollouts: list[Rollout]) -> PairedBatch:
        """The micro-batch of the given rollouts."""
        pad_token_id = self.tokenizer.pad_token_id
        return pair(rollouts, self.args.loss_mask, pad_token_id, self.args.device, self.packing.lines_of)

    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        """A completion of each prompt (token ids) from the student's current weights.

        The run's sampling settings apply; options override them, do_sample=False for example. Every rank calls it.
        """
        weights = zero.generation_weights(self.engine(), self.args.ds3_gather_for_generation)
        with self.accelerator.autocast():
            return self.sampler.sample(completion_head.causal_lm_of(self.model), prompts, keys, weights, **options)

    def _roll_out(self, dataset: Dataset, slots: tuple[Slot, ...], key: str, meters: Meters) -> list[Rollout]:
        pairs = [self.prompts.build(example_from_row(dataset[slot.index], slot.index), slot.index) for slot in slots]
        for side in ("student", "teacher"):
            meters.add(f"prompts/{side}_cut", self.prompts.counts.pop(f"{side}_prompts_cut", 0))
        chosen = [pair.teacher if self.args.generate_from_teacher else pair.student for pair in pairs]
        self.dispatch(
            "on_generation_prompts_selected",
            lambda: {
                "generation_prompts": [rendered.prompt for rendered in chosen],
                "generation_prompt_text": [rendered.text for rendered in chosen],
            },
        )
        completions = self.generate([rendered.ids for rendered in chosen], [f"{key}/{slot.row}" for slot in slots])
        rollouts = [
            Rollout(slot.row, prompts, completion, slot.counted)
            for slot, prompts, completion in zip(slots, pairs, completions, strict=True)
        ]
        meters.count_completions(rollouts)
        return rollouts

    def _old_log_probs(self, scorer: Scorer, rollouts: list[Rollout]) -> list[Tensor] | None:
        """Where a rollout will be older than the weights, the student's log-probabilities of it now; else None."""
        args = self.args
        off_policy = not args.generate_from_teacher and args.gradient_accumulation_steps % args.generate_every != 0
        old = scorer.student_log_probs(rollouts) if off_policy else None
        self.dispatch("on_self_distillation_batch_prepared", lambda: self._padded(rollouts, old))
        return old

    def _padded(self, rollouts: list[Rollout], old: list[Tensor] | None) -> dict[str, Tensor | None]:
        """The rollouts as TRL's callbacks get them: prompts padded on their left, completions on their right."""
        device, pad = self.args.device, self.tokenizer.pad_token_id
        completions = [rollout.completion.ids for rollout in rollouts]
        completion_ids = pad_right(completions, pad, device)
        completion_mask = pad_right([[1] * len(ids) for ids in completions], 0, device)
        teacher_ids, teacher_mask = pad_left([rollout.prompts.teacher.ids for rollout in rollouts], pad, device)
        return {
            "prompt_ids": pad_left([rollout.prompts.student.ids for rollout in rollouts], pad, device)[0],
            "completion_ids": completion_ids,
            "teacher_input_ids": torch.cat([teacher_ids, completion_ids], dim=1),
            "teacher_attention_mask": torch.cat([teacher_mask, completion_mask], dim=1),
            "old_per_token_logps": None if old is None else nn.utils.rnn.pad_sequence(old, batch_first=True),
        }

    def check_head(self) -> None:
        """Once, when the engine stands: is what we take for the model's logits what the model takes for them?"""
        if not self.head_checked:
            head = completion_head.head_of(self.model)
            zero.use_within(head, head_tensors(head).present())
            with zero.scoring_pass(self.engine()) as forward:
                completion_head.check(self.model, forward, self.args.device)
            self.head_checked = True

    def _compute_dtype(self) -> torch.dtype:
        """The dtype in which the head multiplies."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
