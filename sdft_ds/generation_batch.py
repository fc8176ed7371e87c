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
from sdft_ds.metrics import Meters
from sdft_ds.paired_batch import Completion, LossMask, PairedBatch, Rollout, pad_left, pad_right, pair
from sdft_ds.prompts import PromptBuilder
from sdft_ds.rollouts import Sampler
from sdft_ds.rows import example_from_row
from sdft_ds.schedule import Slot
from sdft_ds.scoring import Scored, Scorer
from sdft_ds.teacher import Teacher


@dataclass
class GenerationBatches:
    """Makes generation batches from the current weights.

    engine: gives what wraps the model for training at the moment. dispatch: calls an event on the run's callbacks.
    """

    args: SDFTConfig
    accelerator: Accelerator
    model: nn.Module
    engine: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    sampler: Sampler
    teacher: Teacher
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
        keep_on: torch.device | None = None,
    ) -> list[Scored]:
        """Scored micro-batches of `batch_size` rows each. Every rank calls it with as many slots.

        key: names the batch in its rows' randomness. head_changes, keep_on: see Scorer.
        """
        self._check_head()
        with meters.phase("rollout"):
            rollouts = self._roll_out(dataset, slots, key, meters)
        loss_mask = LossMask(self.args.num_loss_tokens_to_skip, self.args.mask_truncated_completions)
        batches = [
            pair(rollouts[start : start + batch_size], loss_mask, self.tokenizer.pad_token_id, self.args.device)
            for start in range(0, len(rollouts), batch_size)
        ]
        with meters.phase("teacher"):
            scorer = Scorer(
                self.engine(),
                self.teacher,
                self._compute_dtype(),
                keep_on or self.args.device,
                self.args.temperature,
            )
            old = self._old_log_probs(scorer, batches)
            return scorer.score(batches, head_changes, old)

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
            generation_prompts=[rendered.prompt for rendered in chosen],
            generation_prompt_text=[rendered.text for rendered in chosen],
        )
        completions = self.generate([rendered.ids for rendered in chosen], [f"{key}/{slot.row}" for slot in slots])
        rollouts = [
            Rollout(slot.row, prompts, completion, slot.counted)
            for slot, prompts, completion in zip(slots, pairs, completions, strict=True)
        ]
        meters.count_completions(rollouts)
        return rollouts

    def _old_log_probs(self, scorer: Scorer, batches: list[PairedBatch]) -> list[Tensor | None]:
        """Where a rollout will be older than the weights, the student's log-probabilities of it now; else None."""
        args, pad = self.args, self.tokenizer.pad_token_id
        off_policy = not args.generate_from_teacher and args.gradient_accumulation_steps % args.generate_every != 0
        by_batch = [scorer.student_log_probs(batch, pad) if off_policy else None for batch in batches]
        rollouts = [rollout for batch in batches for rollout in batch.rollouts]
        completion_ids = pad_right([rollout.completion.ids for rollout in rollouts], pad, args.device)
        whole = None
        if off_policy:
            width = completion_ids.shape[1]
            whole = torch.cat([nn.functional.pad(old, (0, width - old.shape[1])) for old in by_batch])
        self.dispatch(
            "on_self_distillation_batch_prepared",
            prompt_ids=pad_left([rollout.prompts.student.ids for rollout in rollouts], pad, args.device)[0],
            completion_ids=completion_ids,
            old_per_token_logps=whole,
        )
        return by_batch

    def _check_head(self) -> None:
        """Once, when the engine stands: is what we take for the model's logits what the model takes for them?"""
        if not self.head_checked:
            with zero.scoring_pass(self.engine()):
                completion_head.check(self.model, self.engine(), self.args.device)
            self.head_checked = True

    def _compute_dtype(self) -> torch.dtype:
        """The dtype in which the head multiplies."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision, torch.float32)
