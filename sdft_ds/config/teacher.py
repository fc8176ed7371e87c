"""Settings of the teacher: weights, prompt and scoring pass."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from sdft_ds.config.fields import (
    ANOTHER_RUN,
    FREE,
    WITH_TEACHER,
    at_least,
    setting,
    within,
)

# Valid names of teacher_model_kind; teacher.add_kind adds to them.
TEACHER_KINDS = ["live", "base", "ema"]
# Defaults of an EMA teacher in (TRL 1.5.1, TRL 1.16), requested by sync_ref_model and teacher_model_kind respectively.
EMA_RATES = (0.6, 0.05)
EMA_STEPS = (512, 1)


@dataclass
class TeacherSettings:
    teacher_model_kind: str | None = setting(
        None,
        "The teacher's weights: live, the student's own; base, those at the start (PEFT: adapter off); ema, their "
        "moving average. Unset: base with PEFT, ema with sync_ref_model, otherwise live.",
        choices=TEACHER_KINDS,
        resume=ANOTHER_RUN,
        read_by=WITH_TEACHER,
        otherwise="live",
        card=True,
    )
    generate_from_teacher: bool = setting(
        False, "Roll out from the teacher's prompt instead of the student's.", resume=ANOTHER_RUN, read_by=WITH_TEACHER
    )
    teacher_prompt_template: str = setting(
        "{prompt}\n\n{privileged_context}",
        "The teacher's prompt; both placeholders are needed, literal braces are doubled.",
        resume=FREE,
        read_by=("sdft", "sft"),
        card=True,
    )
    teacher_chat_template_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Over chat_template_kwargs (JSON) in the teacher's prompt, for example to let only the teacher think.",
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    sync_ref_model: bool = setting(
        False, "An EMA teacher; the older name of teacher_model_kind ema.", resume=FREE, read_by=WITH_TEACHER
    )
    ref_model_mixup_alpha: float | None = setting(
        None, "The older name of teacher_update_rate.", valid=within(0, 1), resume=FREE, read_by=WITH_TEACHER
    )
    ref_model_sync_steps: int | None = setting(
        None, "The older name of teacher_sync_steps.", valid=at_least(1), resume=FREE, read_by=WITH_TEACHER
    )
    teacher_update_rate: float | None = setting(
        None,
        "EMA: teacher = (1 - rate) teacher + rate student. Unset: 0.05; with sync_ref_model 0.6.",
        valid=within(0, 1),
        resume=FREE,
        read_by=WITH_TEACHER,
        card="ema",
    )
    teacher_sync_steps: int | None = setting(
        None,
        "EMA: optimizer steps between two updates. Unset: 1; with sync_ref_model 512.",
        valid=at_least(1),
        resume=FREE,
        read_by=WITH_TEACHER,
        card="ema",
    )
    teacher_shadow_device: Literal["device", "cpu"] = setting(
        "device",
        "Where a base or EMA teacher's weights are kept between scoring passes: on the device, or in host memory.",
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    save_teacher: bool = setting(
        False,
        "At the end save a base or EMA teacher as a model of its own, in output_dir/teacher.",
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    teacher_states_device: Literal["device", "cpu"] = setting(
        "device",
        "Where the teacher's hidden states of a generation batch are kept until the loss.",
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    scoring_batch_tokens: int = setting(
        16384,
        "Maximum tokens of a forward that only scores: of the scoring pass, and for the retention set's KL. Prompts "
        "and padding included.",
        valid=at_least(1),
        resume=FREE,
    )

    @property
    def teacher_states_on(self) -> torch.device:
        """Device that holds the teacher's hidden states until the loss."""
        return torch.device("cpu") if self.teacher_states_device == "cpu" else self.device

    def _resolve_teacher(self) -> None:
        """Resolve the older and the newer names; contradicting values are an error. The kind may stay unset (None),
        because only the trainer knows whether the model is a PEFT model."""
        named = self.teacher_model_kind not in (None, "live", "base") and not self.sync_ref_model
        for new, old, older_default, newer_default in (
            ("teacher_update_rate", "ref_model_mixup_alpha", *EMA_RATES),
            ("teacher_sync_steps", "ref_model_sync_steps", *EMA_STEPS),
        ):
            given = {name: getattr(self, name) for name in (new, old) if getattr(self, name) is not None}
            if len({*given.values()}) > 1:
                raise ValueError(f"{new}={given[new]} contradicts {old}={given[old]}: they are one setting.")
            value = next(iter(given.values()), newer_default if named else older_default)
            setattr(self, new, value)
            setattr(self, old, value)
        if self.sync_ref_model and self.teacher_model_kind not in (None, "ema"):
            raise ValueError(
                f"sync_ref_model=True means an EMA teacher and contradicts "
                f"teacher_model_kind={self.teacher_model_kind!r}."
            )
        if self.sync_ref_model:
            self.teacher_model_kind = "ema"
