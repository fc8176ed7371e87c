"""SDFTConfig: all settings of a run. Each is declared in the config module of its topic.

Names and defaults are those of TRL's experimental SDFT, so that a script migrates by changing its import.
"""

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import TrainingArguments

from sdft_ds.config import inherited, validate
from sdft_ds.config.divergence import DivergenceSettings
from sdft_ds.config.fields import default, unread_by
from sdft_ds.config.model import ModelSettings
from sdft_ds.config.prompts import PromptSettings
from sdft_ds.config.rewards import RewardSettings
from sdft_ds.config.rollouts import RolloutSettings
from sdft_ds.config.run import RunSettings
from sdft_ds.config.teacher import TeacherSettings
from sdft_ds.config.trl_compat import TrlCompatSettings
from sdft_ds.config.vllm import VllmSettings
from sdft_ds.distributed import launch


# Dataclass fields are ordered from the last base to the first.
@dataclass
class SDFTConfig(
    TrlCompatSettings,
    RewardSettings,
    VllmSettings,
    RolloutSettings,
    PromptSettings,
    TeacherSettings,
    DivergenceSettings,
    ModelSettings,
    RunSettings,
    TrainingArguments,
):
    """Settings of SDFTTrainer: those of transformers.TrainingArguments and of the other modules in this package.

    Raises ValueError, naming the field and the fix, for invalid values and combinations.

    Creating one initializes what transformers and accelerate initialize with their settings, including the process
    group (on a CPU DeepSpeed's before them), with ddp_timeout as timeout of all groups; it sets RANK and related
    variables if DeepSpeed is used and no launcher has set them. For the process it hides the libraries' warnings of
    each other's deprecated names, switches off cuDNN's attention, and on a GPU sets how torch allocates memory and,
    unless `tf32` is given, multiplies in fp32.
    """

    method: ClassVar[str] = "sdft"
    lacks: ClassVar[str] = "Self-distilled fine-tuning has no rewards"  # for a warning of settings it does not read

    _argument_group_name = "training and self-distillation"
    _OWN_DICT_FIELDS = [
        "model_init_kwargs",
        "generation_kwargs",
        "chat_template_kwargs",
        "teacher_chat_template_kwargs",
    ]
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + _OWN_DICT_FIELDS

    def __post_init__(self) -> None:
        self._leave_unread()
        inherited.refuse_lone_processes()
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        self.use_cpu = self.use_cpu or launch.no_accelerator()
        launch.hide_deprecations()
        launch.avoid_cudnn_attention()
        if not self.use_cpu:  # vLLM in this process has an allocator of its own, which does not work with them
            launch.expand_segments(not (self.use_vllm and self.vllm_mode == "colocate"))
        with launch.naming_the_port():
            launch.start_process_group(self.deepspeed, self.use_cpu, self.ddp_timeout)
        for name in self._OWN_DICT_FIELDS:
            setattr(self, name, validate.json_object(name, getattr(self, name)))
        self.report_to = self.report_to or "none"
        if self.greater_is_better is None and validate.lower_is_better(self.metric_for_best_model):
            self.greater_is_better = False  # transformers infers it for losses only
        given, self.deepspeed = self.deepspeed, launch.complete_configuration(self.deepspeed)
        with launch.naming_the_port():
            super().__post_init__()
        self.deepspeed = given
        if not self.use_cpu and self.tf32 is None:
            # What is still in fp32 then: adapters under ZeRO-3, and what models compute from half-precision values,
            # which TF32 holds exactly. Code from elsewhere may also multiply positions, which it does not.
            launch.multiply_in_tf32((self.bf16 or self.fp16) and not self.trust_remote_code)
        if self._n_gpu > 1:
            warnings.warn(
                f"This process was started alone and trains on the first of {self._n_gpu} GPUs. For all of them start "
                f"one process for each: torchrun --nproc_per_node {self._n_gpu} YOUR_SCRIPT ...",
                stacklevel=3,
            )
        self.hf_deepspeed_config = launch.configuration_in_effect(self)
        inherited.refuse_settings(self)
        validate.refuse_unused(self)
        validate.check_values(self)
        self._resolve_support()
        self._resolve_teacher()
        self._resolve_generation_batch()
        validate.refuse_contradictions(self)
        inherited.refuse_in_deepspeed(self)
        validate.warn_of_ineffective(self)
        validate.warn_of_starved_gradient(self)

    def _leave_unread(self) -> None:
        """Set the settings that the method does not read, with a warning if they were given."""
        unread = unread_by(type(self), self.method)
        given = [name for name, fixed in unread.items() if getattr(self, name) not in (fixed, default(self, name))]
        if given:
            warnings.warn(f"{self.lacks}, and does not read {', '.join(given)}.", stacklevel=4)
        for name, fixed in unread.items():
            setattr(self, name, fixed)

    def __getstate__(self) -> dict[str, Any]:
        """Excludes the token, because transformers pickles the arguments into every folder that it saves."""
        return {**self.__dict__, "hub_token": None}

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that matrix products are computed in."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: at most one. For a single process transformers would use all visible GPUs with
        nn.DataParallel, which cannot run a request for a loss."""
        return min(super().n_gpu, 1)
