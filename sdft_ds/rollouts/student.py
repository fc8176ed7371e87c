"""Student rollouts: completions from the current weights of the model being trained, under every ZeRO stage."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn

from sdft_ds.data.batch import Completion
from sdft_ds.distributed import zero
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.rollouts.sampler import Sampler


@dataclass
class StudentRollouts:
    """engine: returns the current training wrapper of the model. gather: see ds3_gather_for_generation."""

    sampler: Sampler
    model: nn.Module
    engine: Callable[[], nn.Module]
    accelerator: Accelerator
    gather: bool

    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        """One completion per prompt (token ids) from the student's current weights.

        keys: one per prompt; the same key gives the same random numbers in any batch and on any rank. options override
        the run's sampling settings, do_sample=False for example. Called by every rank.
        """
        weights = zero.generation_weights(self.engine(), self.gather)
        with self.accelerator.autocast():
            return self.sampler.sample(causal_lm_of(self.model), prompts, keys, weights, **options)
