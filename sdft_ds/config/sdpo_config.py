"""SDPOConfig: settings of self-distilled policy optimization. Names and defaults are those of TRL's SDPOConfig."""

from dataclasses import dataclass

from sdft_ds.config.fields import redeclared
from sdft_ds.config.rewards import PolicySettings
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import parse_template

PLACEHOLDERS = {
    "reprompt_template": ("prompt", "solution", "feedback"),
    "solution_template": ("successful_previous_attempt",),
    "feedback_template": ("feedback_raw",),
}


@dataclass
class SDPOConfig(PolicySettings, SDFTConfig):
    """An SDFTConfig for a teacher whose context is made of rewarded completions, or of feedback on the student's own:
    accepts the same settings, some with other defaults."""

    method = "sdpo"
    lacks = "The teacher's prompts are made by reprompt_template; SDPO has no other template"

    distillation_alpha: float = redeclared(SDFTConfig, "distillation_alpha", 1.0)
    distillation_topk: int | None = redeclared(SDFTConfig, "distillation_topk", None)
    teacher_model_kind: str | None = redeclared(SDFTConfig, "teacher_model_kind", "ema")

    def __post_init__(self) -> None:
        if self.scale_rewards is False:  # TRL's older spelling
            self.scale_rewards = "none"
        super().__post_init__()
        for name, placeholders in PLACEHOLDERS.items():
            parse_template(getattr(self, name), name, placeholders)
        if self.distillation_weight > 1.0:
            raise ValueError(f"distillation_weight must be in [0, 1], not {self.distillation_weight}.")
        if self.distillation_weight > 0.0 and not (
            self.use_successful_as_teacher or self.include_environment_feedback
        ):
            raise ValueError(
                "use_successful_as_teacher and include_environment_feedback are both False, so the teacher would know "
                "no more than the student: set one of them, or distillation_weight=0."
            )
