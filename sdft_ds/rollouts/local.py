"""Rollouts in the training process, with the training weights themselves, under every ZeRO stage."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from sdft_ds.data.batch import Completion
from sdft_ds.distributed import zero
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.rollouts.engine import RolloutEngine, Sampling
from sdft_ds.rollouts.sampler import Sampler


class LocalRollouts(RolloutEngine):
    """engine: returns the current training wrapper of the model. gather: see ds3_gather_for_generation. autocast:
    context of the forwards. backend, batch_tokens: see Sampler."""

    def __init__(
        self,
        sampling: Sampling,
        model: nn.Module,
        engine: Callable[[], nn.Module],
        gather: bool = True,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        backend: str = "generate",
        batch_tokens: int | None = None,
    ):
        super().__init__(sampling)
        self.model, self.engine, self.gather, self.autocast = model, engine, gather, autocast
        self.sampler = Sampler(sampling, backend, batch_tokens)

    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        weights = zero.generation_weights(self.engine(), self.gather)
        with self.autocast():
            return self.sampler.sample(causal_lm_of(self.model), prompts, keys, weights, self.on_wait, **options)
