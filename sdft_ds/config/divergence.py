"""Settings of the loss: divergence, loss mask, and aggregation over tokens."""

from dataclasses import dataclass
from typing import Literal

from sdft_ds.config.fields import (
    FREE,
    WITH_TEACHER,
    at_least,
    positive,
    setting,
    within,
)
from sdft_ds.data.batch import LossMask
from sdft_ds.loss.divergence import MODES, Divergence


@dataclass
class DivergenceSettings:
    distillation_alpha: float = setting(
        0.5,
        "0: forward KL(teacher||student); 1: reverse KL(student||teacher); between: generalised JSD.",
        valid=within(0, 1),
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    distillation_mode: str | None = setting(
        None,
        "Support of the divergence (newer name): the student's top-k, the full vocabulary or the sampled token. "
        "Unset: from distillation_topk and full_logit_distillation.",
        choices=MODES,
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    distillation_topk: int | None = setting(
        100,
        "Size of the student's top-k support. None: see full_logit_distillation.",
        valid=positive(),
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    full_logit_distillation: bool = setting(
        False,
        "With distillation_topk None: the full vocabulary instead of the sampled token.",
        only_with=("distillation_topk=None",),
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    distillation_support: Literal["student", "teacher", "union"] = setting(
        "student",
        "With top-k: whose k most likely tokens are compared. On the student's alone, a token that only the teacher "
        "considers likely (a new fact) gets no gradient of its own; union: both sides', up to 2 k.",
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    distillation_add_tail: bool = setting(
        False,
        "With top-k: keep the remaining mass as one more bucket instead of renormalising.",
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    distillation_is_clip: float | None = setting(
        2.0,
        "Largest importance weight, where a rollout is older than the weights. None: no such weight.",
        valid=positive(),
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    teacher_temperature: float = setting(
        1.0,
        "Divides the teacher's logits, besides temperature: below 1 the student learns a sharper distribution than "
        "the teacher's own. Anchors are held to the start as it is.",
        valid=positive(),
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    distillation_weight: float = setting(
        1.0,
        "Factor applied to the loss. SDPO: share of the distillation loss; the rest is the policy loss.",
        valid=at_least(0),
        resume=FREE,
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = setting(
        "dapo",
        "Aggregation over tokens: dapo, mean over all loss tokens of the optimizer step; grpo, mean of each "
        "completion's mean; bnpo, mean over each micro-batch's tokens, then over micro-batches; dr_grpo, sum over "
        "(completions x max_completion_length).",
        resume=FREE,
        card=True,
    )
    num_loss_tokens_to_skip: int = setting(
        0,
        "First tokens of each completion to exclude from the loss.",
        valid=at_least(0),
        resume=FREE,
        read_by=WITH_TEACHER,
        card=True,
    )
    mask_truncated_completions: bool = setting(
        False, "Exclude completions that hit max_completion_length from the loss.", resume=FREE
    )
    loss_chunk_tokens: int | None = setting(
        None,
        "Tokens whose logits are in memory at once. Unset: as many as make 64 Mi logits on a GPU, 8 Mi on a CPU.",
        valid=positive(),
        resume=FREE,
    )

    @property
    def divergence(self) -> Divergence:
        """The divergence specified by these settings."""
        return MODES[self.distillation_mode](
            mode=self.distillation_mode,
            alpha=self.distillation_alpha,
            topk=self.distillation_topk,
            add_tail=self.distillation_add_tail,
            support=self.distillation_support,
            temperature=self.temperature,
        )

    @property
    def loss_mask(self) -> LossMask:
        """The loss mask: which tokens of a completion are excluded from the loss."""
        return LossMask(self.num_loss_tokens_to_skip, self.mask_truncated_completions)

    def _resolve_support(self) -> None:
        """Resolve distillation_mode and distillation_topk from the older and the newer names."""
        if self.distillation_mode is None:
            if self.distillation_topk is not None:
                self.distillation_mode = "topk_logits"
            else:
                self.distillation_mode = "full_logits" if self.full_logit_distillation else "sampled_token"
        elif self.distillation_mode == "topk_logits" and self.distillation_topk is None:
            raise ValueError("distillation_mode='topk_logits' needs distillation_topk, which is None.")
        elif self.distillation_mode == "sampled_token" and self.full_logit_distillation:
            raise ValueError("distillation_mode='sampled_token' contradicts full_logit_distillation=True.")
        if self.distillation_mode == "sampled_token" and self.distillation_alpha != 1.0:
            raise ValueError(
                f"The sampled token estimates the reverse KL only: set distillation_alpha=1 (now "
                f"{self.distillation_alpha}), or choose distillation_mode topk_logits or full_logits."
            )
        if self.distillation_add_tail and self.distillation_mode != "topk_logits":
            raise ValueError(
                f"distillation_add_tail=True has no effect with distillation_mode={self.distillation_mode!r}: "
                "only a top-k has a tail."
            )
        if self.distillation_support != "student" and self.distillation_mode != "topk_logits":
            raise ValueError(
                f"distillation_support={self.distillation_support!r} has no effect with distillation_mode="
                f"{self.distillation_mode!r}: only a top-k has a support."
            )
        if self.distillation_mode != "topk_logits":
            default = type(self).__dataclass_fields__["distillation_topk"].default
            if self.distillation_topk not in (None, default):
                raise ValueError(
                    f"distillation_topk={self.distillation_topk} contradicts "
                    f"distillation_mode={self.distillation_mode!r}."
                )
            self.distillation_topk = None
            self.full_logit_distillation = self.distillation_mode == "full_logits"
