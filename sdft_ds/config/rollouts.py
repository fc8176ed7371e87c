"""Settings of the rollouts: number of completions, generation batches and sampling."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sdft_ds.config.fields import (
    ANOTHER_RUN,
    COMPARED_AS_ROWS,
    FREE,
    WITH_TEACHER,
    Range,
    at_least,
    positive,
    setting,
    within,
)

ANCHOR_FRACTION = 0.25
# Valid names of rollout_backend; rollouts.sampler.add_backend adds to them.
ROLLOUT_BACKENDS = ["generate", "continuous"]
# Options that only affect sampling; they mean nothing under greedy decoding.
SAMPLING_OPTIONS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
# Options that leave the next-token distribution as it is at its temperature, with these values or with any.
NEUTRAL_VALUES = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
NEUTRAL_OPTIONS = {"max_new_tokens", "do_sample", "temperature", "cache_implementation", "disable_compile"}


def reshapes(options: dict[str, Any]) -> bool:
    """Whether options other than the temperature change the next-token distribution."""
    return any(options[name] != NEUTRAL_VALUES.get(name) for name in options.keys() - NEUTRAL_OPTIONS)


@dataclass
class RolloutSettings:
    num_generations: int = setting(
        8,
        "Completions sampled for each prompt.",
        valid=at_least(1),
        resume=ANOTHER_RUN,
        read_by=WITH_TEACHER,
        otherwise=1,
        card=True,
    )
    num_generations_eval: int | None = setting(
        None, "The same for evaluation. Unset: num_generations.", valid=at_least(1), resume=FREE, read_by=WITH_TEACHER
    )
    generation_batch_size: int | None = setting(
        None,
        "Completions of a generation batch over all ranks; another way to set steps_per_generation.",
        resume=COMPARED_AS_ROWS,
        read_by=WITH_TEACHER,
        derived=True,
    )
    steps_per_generation: int | None = setting(
        None,
        "Micro-batches of one generation batch. Unset: gradient_accumulation_steps.",
        resume=COMPARED_AS_ROWS,
        read_by=WITH_TEACHER,
    )
    num_iterations: int = setting(
        1,
        "Times each generation batch is used.",
        valid=at_least(1),
        resume=ANOTHER_RUN,
        read_by=WITH_TEACHER,
        card=True,
    )
    max_completion_length: int = setting(
        256, "Most tokens of a completion.", valid=at_least(1), resume=FREE, card=True
    )
    teacher_rollout_fraction: float = setting(
        0.0,
        "Share of the rollouts from the teacher's prompt at the first step, falling to 0 at the last.",
        valid=within(0, 1),
        resume=FREE,
        read_by=WITH_TEACHER,
    )
    anchor_fraction: float | None = setting(
        None,
        "Share of the prompts that are anchors, where there are any (command line: --anchor_path). Unset: 0.25.",
        valid=Range(lambda value: 0 < value < 1, "in (0, 1)"),
        resume=ANOTHER_RUN,
    )
    temperature: float = setting(
        1.0,
        "Sampling temperature; it divides the logits of the loss as well.",
        valid=positive(' (for greedy rollouts: generation_kwargs {"do_sample": false})'),
        resume=FREE,
        card=True,
    )
    top_p: float = setting(1.0, "Nucleus sampling.", resume=FREE, card=True)
    top_k: int = setting(0, "Top-k sampling; 0: off.", resume=FREE, card=True)
    min_p: float | None = setting(None, "Smallest probability, relative to the most likely token's.", resume=FREE)
    repetition_penalty: float = setting(1.0, "Repetition penalty; 1: off.", resume=FREE)
    cache_implementation: str | None = setting(
        None,
        "KV cache of transformers' generate. Unset: this project's own loop. static: transformers' loop, which "
        "compiles the decode step on a GPU.",
        resume=FREE,
    )
    rollout_backend: str = setting(
        "generate",
        "generate: rows together, with draws that depend on no batch or rank; continuous: transformers' continuous "
        "batching, whose draws do.",
        choices=ROLLOUT_BACKENDS,
        resume=FREE,
    )
    generation_kwargs: dict[str, Any] | str | None = setting(
        None, "More fields (JSON) of transformers' GenerationConfig.", resume=FREE
    )
    rollout_batch_tokens: int | None = setting(
        None,
        "Most tokens, prompts, longest completions and padding, that are generated at once on each rank. Unset: what "
        "half of the free memory of the GPU has room for; on a CPU 8 GiB.",
        valid=positive(),
        resume=FREE,
    )
    ds3_gather_for_generation: bool = setting(
        True,
        "ZeRO-3: gather the weights once for each rollout; False: layer by layer, slower, for what does not fit.",
        resume=FREE,
    )

    @property
    def anchor_share(self) -> Fraction:
        """anchor_fraction as an exact number, so that all ranks and resumes agree on which prompts are anchors."""
        fraction = ANCHOR_FRACTION if self.anchor_fraction is None else self.anchor_fraction
        return Fraction(fraction).limit_denominator(1000)

    @property
    def generate_every(self) -> int:
        """Micro-batches trained on per generation batch, repeated uses included."""
        return self.steps_per_generation * self.num_iterations

    @property
    def outlives_step(self) -> bool:
        """Whether a generation batch is used in several optimizer steps, so that its rollouts become off-policy."""
        return self.generate_every > self.gradient_accumulation_steps

    @property
    def reordered_batches(self) -> int:
        """Micro-batches of one optimizer step among which rows may be reordered to reduce padding: all of one
        generation batch; with bnpo no reordering, because its loss is defined by the micro-batch."""
        return 1 if self.loss_type == "bnpo" else min(self.steps_per_generation, self.gradient_accumulation_steps)

    @property
    def generation_options(self) -> dict[str, Any]:
        """The fields of transformers' GenerationConfig specified by these settings."""
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

    def keep_rows(self, rows_of_step: int, generation_batch_size: int) -> None:
        """Set gradient accumulation and steps_per_generation so that an optimizer step and a generation batch have as
        many rows, over all ranks, as in a checkpoint of another world size. Raises ValueError if rows do not divide.
        """
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

    def _resolve_generation_batch(self) -> None:
        """Resolve steps_per_generation and generation_batch_size from each other, and check divisibility."""
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
