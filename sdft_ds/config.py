"""SDFTConfig: every setting of a run, said once, in the help of its field.

Names and defaults are those of TRL's experimental SDFT, so that a script moves over by changing its import.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from transformers import TrainingArguments

from sdft_ds import config_checks, inherited, zero
from sdft_ds.config_checks import EMA_RATES, EMA_STEPS, ROLLOUT_BACKENDS, TEACHER_KINDS, json_object
from sdft_ds.divergence import MODES, Divergence
from sdft_ds.paired_batch import LossMask
from sdft_ds.screening import BadRows


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass that HfArgumentParser makes flags of; metadata: more options of argparse."""
    return field(default=default, metadata={"help": help, **metadata})


def _unused(default: Any) -> Any:
    return setting(default, "Accepted at its default only; see the README.")


@dataclass
class SDFTConfig(TrainingArguments):
    """Settings of SDFTTrainer: those of transformers.TrainingArguments and the fields below.

    Raises ValueError, naming the field and the remedy, for values and combinations that cannot work.
    """

    method: ClassVar[str] = "sdft"

    _argument_group_name = "training and self-distillation"
    _OWN_DICT_FIELDS = ["model_init_kwargs", "generation_kwargs", "chat_template_kwargs"]
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + _OWN_DICT_FIELDS

    # Defaults that differ from transformers'.
    logging_steps: float = setting(10, "Log every N optimizer steps; below 1, a share of all steps.")
    bf16: bool | None = setting(
        None, "Train in bf16: autocast over fp32 weights, or DeepSpeed's bf16 engine. Unset: on, unless fp16 is."
    )
    remove_unused_columns: bool = setting(False, "Drop dataset columns that are not used.")
    report_to: list[str] | None = setting(
        None,
        "Trackers to log to, beside metrics.jsonl: tensorboard, wandb, trackio, mlflow, ...; all: those installed.",
    )

    # Output.
    hub_upload_run_files: bool = setting(
        False,
        "Upload the run's page, logs and completions as well: they hold prompts and privileged contexts.",
    )

    # Model.
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments (JSON) of AutoModelForCausalLM.from_pretrained, where the model is given by name."
    )
    trust_remote_code: bool = setting(
        False, "Run code from the model's repository, to load the model and its tokenizer. Only for authors you trust."
    )
    disable_dropout: bool = setting(True, "Set every dropout of the model to 0.")

    # Divergence.
    distillation_alpha: float = setting(
        0.5, "0: forward KL(teacher||student); 1: reverse KL(student||teacher); between: generalised JSD."
    )
    distillation_mode: str | None = setting(
        None,
        "Support of the divergence, the newer name: the student's top-k, the full vocabulary or the sampled token. "
        "Unset: from distillation_topk and full_logit_distillation.",
        choices=MODES,
    )
    distillation_topk: int | None = setting(
        100, "Size of the student's top-k support. None: see full_logit_distillation."
    )
    full_logit_distillation: bool = setting(
        False, "With distillation_topk None: the full vocabulary instead of the sampled token."
    )
    distillation_add_tail: bool = setting(
        False, "With top-k: keep the remaining mass as one more bucket instead of renormalising."
    )
    distillation_is_clip: float | None = setting(
        2.0, "Largest importance weight, where a rollout is older than the weights. None: no such weight."
    )
    distillation_weight: float = setting(1.0, "Factor of the loss.")
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = setting(
        "dapo",
        "Aggregation over tokens: dapo, mean over all loss tokens of the optimizer step; grpo, mean of each "
        "completion's mean; bnpo, mean over each micro-batch's tokens, then over micro-batches; dr_grpo, sum over "
        "(completions x max_completion_length).",
    )
    num_loss_tokens_to_skip: int = setting(0, "First tokens of each completion to leave out of the loss.")
    mask_truncated_completions: bool = setting(
        False, "Leave completions that hit max_completion_length out of the loss."
    )
    loss_chunk_tokens: int | None = setting(
        None, "Tokens whose logits are in memory at once. Unset: as many as 8 Mi logits hold."
    )

    # Teacher.
    teacher_model_kind: str | None = setting(
        None,
        "The teacher's weights: live, the student's own; base, those at the start (PEFT: adapter off); ema, their "
        "moving average. Unset: base with PEFT, ema with sync_ref_model, otherwise live.",
        choices=TEACHER_KINDS,
    )
    generate_from_teacher: bool = setting(False, "Roll out from the teacher's prompt instead of the student's.")
    teacher_prompt_template: str = setting(
        "{prompt}\n\n{privileged_context}", "What the teacher sees; both placeholders are needed, braces double."
    )
    sync_ref_model: bool = setting(False, "An EMA teacher; the older way to say teacher_model_kind ema.")
    ref_model_mixup_alpha: float | None = setting(None, "The older name of teacher_update_rate.")
    ref_model_sync_steps: int | None = setting(None, "The older name of teacher_sync_steps.")
    teacher_update_rate: float | None = setting(
        None, "EMA: teacher = (1 - rate) teacher + rate student. Unset: 0.05; with sync_ref_model 0.6."
    )
    teacher_sync_steps: int | None = setting(
        None, "EMA: optimizer steps between two updates. Unset: 1; with sync_ref_model 512."
    )
    teacher_shadow_device: Literal["device", "cpu"] = setting(
        "device",
        "Where a base or EMA teacher's values wait between scoring passes: with the weights, or in host memory.",
    )
    save_teacher: bool = setting(
        False, "At the end save a base or EMA teacher as a model of its own, in output_dir/teacher."
    )
    teacher_states_device: Literal["device", "cpu"] = setting(
        "device", "Where the teacher's hidden states of a generation batch wait for the loss."
    )
    scoring_batch_tokens: int = setting(
        16384, "Most tokens, prompts and padding included, that the teacher's pass computes at once."
    )

    # Prompts.
    max_prompt_length: int | None = setting(512, "Most tokens of a student's prompt. None: no limit.")
    max_teacher_prompt_length: int | None = setting(
        None, "Most tokens of a teacher's prompt. Unset: the model's context minus max_completion_length."
    )
    truncation: Literal["truncate", "drop", "error"] = setting(
        "truncate",
        "A prompt over its limit: cut the user's text (never the template), counted and warned about; drop the row; "
        "or stop with an error.",
    )
    bad_rows: Literal["error", "skip"] = setting(
        "error", "A row whose contents cannot be used: stop with an error, or leave it out, counted and warned about."
    )
    max_bad_rows: int = setting(
        100, "Most rows that bad_rows=skip leaves out of a data set, or of a pass of a stream."
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, "Keyword arguments (JSON) of the chat template, for example to switch thinking off."
    )
    padding_free: bool | None = setting(
        None,
        "Compute the student's rows one after the other instead of padding them to the longest. Unset: with flash "
        "attention, and elsewhere where it costs less.",
    )
    shuffle_dataset: bool = setting(True, "Shuffle the training rows anew in every epoch.")

    # Faults.
    log_completions: int = setting(
        50, "Write completions with each token's divergence, at the first step and every so many; 0: never."
    )
    log_completions_rows: int = setting(4, "How many completions are written then.")
    print_completions: bool = setting(False, "Print them in the terminal as well.")
    inspect_tokens: int = setting(
        16, "Tokens of each micro-batch at which entropies, agreement and top-k mass are measured; 0: none."
    )
    logging_nan_inf_filter: bool = setting(False, "Hide losses that are not finite from the log.")
    max_nonfinite_steps: int = setting(
        5, "Optimizer steps in a row whose gradient is not finite, each of them left out, after which the run ends."
    )
    preemption_exit_code: int = setting(
        99, "Exit code after a SIGTERM or SIGUSR1 was obeyed: saved, and marked by the file PREEMPTED in output_dir."
    )
    preemption_deadline_seconds: float = setting(
        300.0, "Seconds from such a signal after which the process ends, saved or not."
    )

    # Rollouts.
    num_generations: int = setting(8, "Completions sampled for each prompt.")
    num_generations_eval: int | None = setting(None, "The same for evaluation. Unset: num_generations.")
    generation_batch_size: int | None = setting(
        None, "Completions of a generation batch over all ranks; the other way to say steps_per_generation."
    )
    steps_per_generation: int | None = setting(
        None, "Micro-batches of one generation batch. Unset: gradient_accumulation_steps."
    )
    num_iterations: int = setting(1, "Times each generation batch is used.")
    max_completion_length: int = setting(256, "Most tokens of a completion.")
    temperature: float = setting(1.0, "Sampling temperature; it divides the logits of the loss as well.")
    top_p: float = setting(1.0, "Nucleus sampling.")
    top_k: int = setting(0, "Top-k sampling; 0: off.")
    min_p: float | None = setting(None, "Smallest probability, relative to the likeliest token's.")
    repetition_penalty: float = setting(1.0, "Repetition penalty; 1: off.")
    cache_implementation: str | None = setting(
        None,
        "KV cache of transformers' generate. Unset: this project's own loop. static: transformers' loop, which "
        "compiles the decode step on a GPU.",
    )
    rollout_backend: str = setting(
        "generate",
        "generate: rows together, with draws that depend on no batch or rank; continuous: transformers' continuous "
        "batching, whose draws do.",
        choices=ROLLOUT_BACKENDS,
    )
    generation_kwargs: dict[str, Any] | str | None = setting(
        None, "More fields (JSON) of transformers' GenerationConfig."
    )
    rollout_batch_tokens: int | None = setting(
        None,
        "Most tokens, prompts, longest completions and padding, that are generated at once on each rank. Unset: what "
        "half of the free memory of the GPU has room for; on a CPU 8 GiB.",
    )
    ds3_gather_for_generation: bool = setting(
        True, "ZeRO-3: gather the weights once for each rollout; False: layer by layer, slower, for what does not fit."
    )
    use_vllm: bool = setting(False, "Not supported; True is refused.")
    use_teacher_server: bool = setting(False, "Not supported; True is refused.")

    # Inherited by the interface, not used.
    beta: float = _unused(0.0)
    epsilon: float = _unused(0.2)
    epsilon_high: float | None = _unused(None)
    importance_sampling_level: str = _unused("token")
    reward_weights: list[float] | None = _unused(None)
    scale_rewards: str = _unused("group")
    top_entropy_quantile: float = _unused(1.0)
    diagnostics_warning_interval: int = _unused(10)
    diagnostics_flat_tolerance: float = _unused(1e-8)
    vllm_mode: str = _unused("colocate")
    vllm_model_impl: str = _unused("vllm")
    vllm_enable_sleep_mode: bool = _unused(False)
    vllm_server_base_url: str | None = _unused(None)
    vllm_server_host: str = _unused("0.0.0.0")
    vllm_server_port: int = _unused(8000)
    vllm_group_port: int = _unused(51216)
    vllm_server_timeout: float = _unused(240.0)
    vllm_tensor_parallel_size: int = _unused(1)
    vllm_gpu_memory_utilization: float = _unused(0.3)
    vllm_max_model_length: int | None = _unused(None)

    def __post_init__(self) -> None:
        inherited.refuse_lone_processes()
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True
        self.use_cpu = self.use_cpu or zero.no_accelerator()
        with zero.naming_the_port():
            zero.start_process_group(self.deepspeed, self.use_cpu, self.ddp_timeout)
        for name in self._OWN_DICT_FIELDS:
            setattr(self, name, json_object(name, getattr(self, name)))
        self.report_to = self.report_to or "none"
        if self.greater_is_better is None and config_checks.lower_is_better(self.metric_for_best_model):
            self.greater_is_better = False  # transformers knows it of a loss only
        given, self.deepspeed = self.deepspeed, zero.complete_configuration(self.deepspeed)
        with zero.naming_the_port():
            super().__post_init__()
        self.deepspeed = given
        if self._n_gpu > 1:
            warnings.warn(
                f"This process was started alone and trains on the first of {self._n_gpu} GPUs. For all of them start "
                f"one process for each: torchrun --nproc_per_node {self._n_gpu} YOUR_SCRIPT ...",
                stacklevel=3,
            )
        self.hf_deepspeed_config = zero.configuration_in_effect(self)
        inherited.refuse_settings(self)
        config_checks.refuse_unused(self)
        config_checks.check_ranges(self)
        self._resolve_support()
        self._resolve_teacher()
        self._resolve_generation_batch()
        config_checks.refuse_contradictions(self)
        inherited.refuse_in_deepspeed(self)
        config_checks.warn_of_ineffective(self)
        config_checks.warn_of_starved_gradient(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the token: transformers pickles the arguments as they are, into every folder that it saves."""
        return {**self.__dict__, "hub_token": None}

    def keep_rows(self, rows_of_step: int, generation_batch_size: int) -> None:
        """Accumulate and generate so that an optimizer step and a generation batch have as many rows, over all ranks,
        as those of a checkpoint that another number of ranks made. Raises ValueError where none divides them."""
        rows = self.per_device_train_batch_size * self.world_size
        if rows_of_step % rows:
            raise ValueError(
                f"The checkpoint's optimizer steps have {rows_of_step} rows, which {self.world_size} ranks x "
                f"per_device_train_batch_size={self.per_device_train_batch_size} do not divide. Lower "
                "per_device_train_batch_size, or take another number of ranks."
            )
        self.gradient_accumulation_steps = rows_of_step // rows
        self.generation_batch_size, self.steps_per_generation = generation_batch_size, None
        self._resolve_generation_batch()

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one, where transformers would spread a process that was started alone over all it
        sees by nn.DataParallel, which cannot run a request for a loss."""
        return min(super().n_gpu, 1)

    @property
    def reordered_batches(self) -> int:
        """Micro-batches of one optimizer step among which rows may change places to cut padding: all that come from
        one generation batch; none with bnpo, whose loss is defined by the micro-batch."""
        return 1 if self.loss_type == "bnpo" else min(self.steps_per_generation, self.gradient_accumulation_steps)

    @property
    def generate_every(self) -> int:
        """Micro-batches that one generation batch serves."""
        return self.steps_per_generation * self.num_iterations

    @property
    def divergence(self) -> Divergence:
        """The divergence that these settings describe."""
        return MODES[self.distillation_mode](
            mode=self.distillation_mode,
            alpha=self.distillation_alpha,
            topk=self.distillation_topk,
            add_tail=self.distillation_add_tail,
            temperature=self.temperature,
        )

    @property
    def bad_rows_policy(self) -> BadRows:
        """What to do with rows that cannot be used."""
        return BadRows(self.bad_rows, self.max_bad_rows)

    @property
    def loss_mask(self) -> LossMask:
        """Which tokens of a completion these settings leave out of the loss."""
        return LossMask(self.num_loss_tokens_to_skip, self.mask_truncated_completions)

    @property
    def generation_options(self) -> dict[str, Any]:
        """The fields of transformers' GenerationConfig that these settings describe."""
        return {
            "max_new_tokens": self.max_completion_length,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "cache_implementation": self.cache_implementation,
            "disable_compile": self.cache_implementation is None,
            **(self.generation_kwargs or {}),
        }

    def _resolve_support(self) -> None:
        """One truth from two generations of names: distillation_mode, and the top-k that goes with it."""
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
                "there is no tail without a top-k."
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

    def _resolve_teacher(self) -> None:
        """One truth from two generations of names; two that disagree are an error. The kind may stay unset (None):
        only the trainer knows whether the model is a PEFT model."""
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

    def _resolve_generation_batch(self) -> None:
        """steps_per_generation and generation_batch_size from each other, and what they must divide."""
        rows = self.per_device_train_batch_size * self.world_size
        if self.generation_batch_size is not None:
            if self.generation_batch_size % rows:
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} must be a multiple of the {rows} rows of a "
                    f"micro-batch over all ranks (per_device_train_batch_size={self.per_device_train_batch_size} x "
                    f"{self.world_size} ranks)."
                )
            steps = self.generation_batch_size // rows
            if self.steps_per_generation not in (None, steps):
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size} means steps_per_generation={steps} and "
                    f"contradicts steps_per_generation={self.steps_per_generation}: give one of the two."
                )
            self.steps_per_generation = steps
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        if self.steps_per_generation < 1:
            raise ValueError(f"steps_per_generation must be at least 1, not {self.steps_per_generation}.")
        self.generation_batch_size = rows * self.steps_per_generation

        accumulation = self.gradient_accumulation_steps
        if accumulation % self.generate_every and self.steps_per_generation % accumulation:
            below = max(1, self.steps_per_generation // accumulation * accumulation)
            above = -(-self.steps_per_generation // accumulation) * accumulation
            raise ValueError(
                f"steps_per_generation={self.steps_per_generation} with num_iterations={self.num_iterations} would "
                f"straddle an optimizer step of gradient_accumulation_steps={accumulation}: either "
                f"steps_per_generation x num_iterations divides it, or it divides steps_per_generation. "
                f"Nearest that work: steps_per_generation={below if below % accumulation == 0 else above} or {above}."
            )
        if self.generation_batch_size % self.num_generations:
            raise ValueError(
                f"A generation batch holds {self.generation_batch_size} completions (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} x {self.world_size} ranks x steps_per_generation="
                f"{self.steps_per_generation}), which num_generations={self.num_generations} does not divide. Set "
                f"num_generations to a divisor, or generation_batch_size to a multiple of {self.num_generations}."
            )
        generations_eval = self.num_generations_eval or self.num_generations
        rows_eval = self.per_device_eval_batch_size * self.world_size
        if self.eval_strategy != "no" and rows_eval % generations_eval:
            raise ValueError(
                f"An evaluation batch holds {rows_eval} completions (per_device_eval_batch_size="
                f"{self.per_device_eval_batch_size} x {self.world_size} ranks), which num_generations_eval="
                f"{generations_eval} does not divide."
            )
