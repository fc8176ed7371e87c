"""Completions of the model in training, from its current weights, under every ZeRO stage."""

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
    """engine: returns what wraps the model for training at the moment. gather: see ds3_gather_for_generation."""

    sampler: Sampler
    model: nn.Module
    engine: Callable[[], nn.Module]
    accelerator: Accelerator
    gather: bool

    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        """A completion of each prompt (token ids) from the student's current weights.

        keys: one for each prompt; the same key draws the same numbers, whatever the batch and the rank. The run's
        sampling settings apply; options override them, do_sample=False for example. Every rank calls it.
        """
        weights = zero.generation_weights(self.engine(), self.gather)
        with self.accelerator.autocast():
            return self.sampler.sample(causal_lm_of(self.model), prompts, keys, weights, **options)
