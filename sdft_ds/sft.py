"""The baseline: supervised fine-tuning of the same rows in the same order, with the same batches, normalisation,
checkpoints and reports. The completion is the demonstration instead of a rollout, the loss its cross entropy, and
there is no teacher."""

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from sdft_ds.aggregation import Shares
from sdft_ds.chunked_loss import LossTerms
from sdft_ds.completion_head import DistillationLoss
from sdft_ds.config import SDFTConfig
from sdft_ds.divergence import CrossEntropy
from sdft_ds.generation_batch import GenerationBatches
from sdft_ds.metrics import Meters
from sdft_ds.paired_batch import Completion, Rollout, by_length
from sdft_ds.rows import Prompt, RowError, example_from_row
from sdft_ds.schedule import Slot
from sdft_ds.scoring import Scored
from sdft_ds.trainer import SDFTTrainer

# Settings of the teacher, the divergence and the generations -> what they are here.
UNREAD: dict[str, Any] = {
    name: SDFTConfig.__dataclass_fields__[name].default
    for name in (
        "teacher_model_kind", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "teacher_update_rate",
        "teacher_sync_steps", "teacher_shadow_device", "teacher_states_device", "save_teacher", "scoring_batch_tokens",
        "generate_from_teacher", "distillation_alpha", "distillation_mode", "distillation_topk",
        "full_logit_distillation", "distillation_add_tail", "distillation_is_clip", "num_loss_tokens_to_skip",
        "num_generations", "num_generations_eval", "num_iterations", "steps_per_generation", "generation_batch_size",
    )
} | {"teacher_model_kind": "live", "num_generations": 1}  # fmt: skip


@dataclass
class SFTConfig(SDFTConfig):
    """An SDFTConfig of a run without teacher: takes the same settings, and warns of those that it does not read."""

    method = "sft"

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        given = [name for name, fixed in UNREAD.items() if getattr(self, name) not in (fixed, fields[name].default)]
        if given:
            warnings.warn(
                f"Supervised fine-tuning has no teacher, divergence or generations, and does not read "
                f"{', '.join(given)}.",
                stacklevel=3,
            )
        for name, fixed in UNREAD.items():
            setattr(self, name, fixed)
        super().__post_init__()


class Demonstrations(GenerationBatches):
    """Micro-batches whose completions are demonstrations: a row's `golden_response`, or where it has none its
    privileged context, with the token that ends an answer; cut to max_completion_length, as a rollout is."""

    def make(
        self, dataset: Dataset, slots: tuple[Slot, ...], batch_size: int, key: str, meters: Meters,
        batches_per_step: int = 1, **of_a_teacher: Any,
    ) -> list[Scored]:  # fmt: skip
        self.check_head()
        rollouts = [self._demonstration(dataset[slot.index], slot) for slot in slots]
        meters.add("prompts/student_cut", self.prompts.counts.pop("student_prompts_cut", 0))
        meters.count_completions(rollouts)
        batches = [self.pair(rows) for rows in by_length(rollouts, batch_size, batches_per_step)]
        for batch in batches:
            meters.count_positions(batch)
        return [Scored(batch, teacher_hidden_ND=None, teacher_head=None) for batch in batches]

    def _demonstration(self, row: dict[str, Any], slot: Slot) -> Rollout:
        example = example_from_row(row, slot.index)
        text = row.get("golden_response") or example.privileged_context
        if not isinstance(text, str) or not text:
            found = type(text).__name__ if text else "nothing"
            raise RowError(slot.index, "golden_response", f"found {found}; needed is text.")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self._end_of(example.prompt)]
        longest = self.args.max_completion_length
        completion = Completion(ids[:longest], truncated=len(ids) > longest)
        return Rollout(slot.row, self.prompts.build(example, slot.index), completion, slot.counted)

    def _end_of(self, prompt: Prompt) -> int:
        """The token that ends an answer to this prompt."""
        return self._end_of_text if isinstance(prompt, str) else self._end_of_turn

    @property
    def _end_of_text(self) -> int:
        eos = self.tokenizer.eos_token_id
        return self.sampler.eos_token_ids[0] if eos is None else eos

    @cached_property
    def _end_of_turn(self) -> int:
        """Where a model has several end tokens, the one that its chat template puts after an assistant's turn."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, **self.prompts.chat_template_kwargs)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [token for token in ids if token in self.sampler.eos_token_ids]
        return ends[-1] if ends else self._end_of_text


class SFTTrainer(SDFTTrainer):
    """SDFTTrainer, on demonstrations. Takes the same arguments, but for `args`: an SFTConfig."""

    batches_from = Demonstrations

    def __init__(
        self, model: str | PreTrainedModel | nn.Module, args: SFTConfig | None = None, *arguments: Any, **options: Any
    ):
        args = args or SFTConfig()
        if not isinstance(args, SFTConfig):
            raise TypeError(f"SFTTrainer needs an SFTConfig, which takes the settings of the {type(args).__name__}.")
        super().__init__(model, args, *arguments, **options)

    def loss_request(self, scored: Scored, share: Shares) -> DistillationLoss:
        """The cross entropy of one micro-batch's demonstrations."""
        return DistillationLoss(
            positions_N=scored.batch.student.positions_N,
            terms=LossTerms(CrossEntropy(), None, None, scored.batch.tokens_N, share.weights_N),
            scale=share.scale,
            chunk_tokens=self.args.loss_chunk_tokens,
        )

    def look_at(self, request: DistillationLoss, scored: Scored) -> list[int]:
        """At nothing: there is one side only."""
        return []

    def record(self, request: DistillationLoss, scored: Scored, rows: list[int], meters: Meters) -> None:
        meters.add("completions/loss_tokens", len(scored.batch.tokens_N))

    def save_own_state(self, folder: str) -> None:
        """Nothing: demonstrations are read again."""

    def load_own_state(self, folder: str, same_ranks: bool) -> None:
        """Nothing was saved."""


# method -> its trainer
TRAINERS = {"sdft": SDFTTrainer, "sft": SFTTrainer}
