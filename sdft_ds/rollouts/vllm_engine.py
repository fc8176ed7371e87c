"""What both engines of vLLM share: requests, limits, and when weights are published. Does not import vllm."""

import hashlib
import math
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sdft_ds.config.vllm import TESTED_VLLM, VLLM_OPTIONS
from sdft_ds.data.batch import Completion
from sdft_ds.distributed import ranks
from sdft_ds.model import export
from sdft_ds.rollouts import weight_sums
from sdft_ds.rollouts.engine import RolloutEngine, SampledTokens, Sampling
from sdft_ds.rollouts.sampler import refuse_non_finite
from sdft_ds.rollouts.weight_sums import Sums


def check_version(version: str, where: str) -> None:
    """Raises ValueError for a vLLM that is too old, and warns of one that was not tested."""
    found = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if found < tuple(map(int, TESTED_VLLM.split(".")[:2])):
        raise ValueError(
            f"{where} is vLLM {version}, which is too old: install {TESTED_VLLM}, see launch/vllm_environment.sh."
        )
    if not version.startswith(TESTED_VLLM):
        warnings.warn(f"{where} is vLLM {version}; {TESTED_VLLM} is the one that was tested.", stacklevel=2)


class VllmRollouts(RolloutEngine):
    """device: of this rank. longest: most tokens of prompt and completion; None until the engine is there."""

    has_own_weights = True

    def __init__(self, sampling: Sampling, model: nn.Module, device: torch.device):
        super().__init__(sampling)
        export.refuse_unmergeable(model)
        self.model, self.device = model, device
        # On a CPU vLLM keeps a repacked copy of the head's weights, and reloading a tied embedding does not renew it:
        # there the model is served with a head of its own, whose weights are pushed as well.
        self.serves_tied_head = export.is_tied(model) and device.type != "cpu"
        self.longest: int | None = None
        self.is_stale = True
        self.pushes = 0
        self.last: _Rollout | None = None

    @abstractmethod
    def start(self) -> None:
        """Create, or connect to, the engine, and set `longest`. Called once, by all ranks, before the first push."""

    @abstractmethod
    def submit(self, prompts: list[list[int]], parameters: list[dict[str, Any]]) -> Callable[[], list[SampledTokens]]:
        """Ask for one completion per prompt, with vLLM's sampling parameters of each; the returned function waits for
        them. Both are called by all ranks."""

    @property
    def knows_log_probs(self) -> bool:
        return self.sampling.knows_log_probs(self.sampling.of_call(), self.log_probs_mode == "processed_logprobs")

    def weights_changed(self) -> None:
        self.is_stale = True

    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        return self._begin(prompts, keys, self.sampling.of_call(**options)).wait()

    def begin(self, prompts: list[list[int]], keys: list[str]) -> Callable[[], list[Completion]]:
        return self._begin(prompts, keys, self.sampling.of_call()).wait

    def _begin(self, prompts: list[list[int]], keys: list[str], options: dict[str, Any]) -> "_Rollout":
        if self.longest is None:
            self.start()
        self._refuse_too_long(prompts, options["max_new_tokens"])
        if self.is_stale:
            if self.last is not None:
                self.last.wait()  # with the weights that it began with
            self.publish()
            self.is_stale = False
        self.last = _Rollout(self, keys, options, self.submit(prompts, [self.parameters(options, k) for k in keys]))
        return self.last

    def parameters(self, options: dict[str, Any], key: str) -> dict[str, Any]:
        """vLLM's sampling parameters of one row. Its seed is a function of the run's seed and the row's key alone."""
        seed = int.from_bytes(hashlib.blake2b(self.sampling.seed_key(key).encode(), digest_size=8).digest()) >> 1
        given = {VLLM_OPTIONS[name]: value for name, value in options.items() if name in VLLM_OPTIONS}
        greedy = {} if options["do_sample"] else {"temperature": 0.0}
        known = {name: value for name, value in given.items() if value is not None}
        # The run's end tokens alone, not those of the served model's files.
        ends = {"stop_token_ids": self.sampling.eos_token_ids, "ignore_eos": True}
        return {**known, **greedy, **ends, "seed": seed, "logprobs": 0}

    @property
    def log_probs_mode(self) -> str:
        """Which log-probabilities vLLM returns. At temperature 1 those of the model itself, else after all of the
        sampling options."""
        return "raw_logprobs" if self.sampling.options.get("temperature", 1.0) == 1.0 else "processed_logprobs"

    def sampled(self, ids: list[int], log_probs: list[float]) -> SampledTokens:
        return SampledTokens(ids, log_probs, processed=self.log_probs_mode == "processed_logprobs")

    def check_sums(self, ours: Sums, theirs: Sums) -> None:
        """Raises RuntimeError if the engine's weights are not those that were pushed."""
        if wrong := weight_sums.differing(ours, theirs):
            raise RuntimeError(
                f"vLLM's weights are not those that were pushed (layers {', '.join(wrong[:8])}): is the same model "
                "served, and does no other run push to it?"
            )

    def _refuse_too_long(self, prompts: list[list[int]], room: int) -> None:
        """Raises ValueError on every rank if any rank has a prompt that does not fit."""
        most = int(ranks.all_reduce_max(max(map(len, prompts), default=0), self.device))
        if most + room > self.longest:
            raise ValueError(
                f"A prompt of {most} tokens and max_completion_length={room} exceed vLLM's maximal length of "
                f"{self.longest} tokens: lower max_prompt_length or max_completion_length, or raise "
                "vllm_max_model_length (server: --max-model-len)."
            )


class _Rollout:
    """A rollout that has begun."""

    def __init__(
        self,
        engine: VllmRollouts,
        keys: list[str],
        options: dict[str, Any],
        sampled: Callable[[], list[SampledTokens]],
    ):
        self.engine, self.keys, self.options, self.sampled = engine, keys, options, sampled

    def wait(self) -> list[Completion]:
        """Its completions. Raises NonFiniteLogits on all ranks if vLLM sampled from NaN or infinite logits."""
        return self._completions

    @cached_property
    def _completions(self) -> list[Completion]:
        engine, sampled = self.engine, self.sampled()
        engine.on_wait()
        finite = [all(map(math.isfinite, each.log_probs)) for each in sampled]
        refuse_non_finite([key for key, ok in zip(self.keys, finite, strict=True) if not ok], engine.device)
        return [engine.sampling.completion(each, self.options) for each in sampled]
