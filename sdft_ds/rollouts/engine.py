"""Contract of a rollout engine: prompts -> completions from the student's current weights.

One module per engine: local.py (in this process, with the training weights), vllm_colocated.py and vllm_server.py
(vLLM, with weights of its own that `publish` updates).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sdft_ds.config.rollouts import SAMPLING_OPTIONS, reshapes
from sdft_ds.data.batch import Completion


@dataclass(frozen=True)
class SampledTokens:
    """Tokens of one completion, as sampled: possibly with tokens after the first end token.

    log_probs: of each token, under the model's distribution at the sampling temperature; None if unknown. processed:
    after top-p and the like.
    """

    ids: list[int]
    log_probs: list[float] | None = None
    processed: bool = False


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    options: fields of transformers' GenerationConfig. Unset fields take transformers' global defaults, never those of
    the model's own generation_config: a sampling setting that the user did not choose would change what is learned.
    eos_token_ids: each ends a completion. seed: the run's.
    """

    options: dict[str, Any]
    eos_token_ids: list[int]
    pad_token_id: int
    seed: int

    def of_call(self, **overrides: Any) -> dict[str, Any]:
        """The options of one call; without those that mean nothing if it is greedy."""
        options = {**self.options, **overrides}
        if options["do_sample"]:
            return options
        return {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}

    def seed_key(self, key: str) -> str:
        """The key of a row's random numbers: a function of the run's seed and the row's key alone."""
        return f"{self.seed}/{key}"

    def completion(self, sampled: SampledTokens, options: dict[str, Any]) -> Completion:
        """Truncate after the first end token, which is kept: it is part of the completion."""
        end = next((i + 1 for i, token in enumerate(sampled.ids) if token in self.eos_token_ids), None)
        ids, log_probs = sampled.ids[:end], sampled.log_probs
        if log_probs is not None:
            log_probs = log_probs[: len(ids)] if self.knows_log_probs(options, sampled.processed) else None
        return Completion(ids, end is None, log_probs)

    def knows_log_probs(self, options: dict[str, Any], processed: bool) -> bool:
        """Whether a sampler's log-probabilities are those of the model at the loss temperature. processed: see
        SampledTokens."""
        # Greedy ones are at temperature 1.
        at_loss_temperature = options.get("temperature", 1.0) == self.options.get("temperature", 1.0)
        return at_loss_temperature and not (processed and reshapes(options))


class RolloutEngine(ABC):
    """Samples completions. All ranks call all methods in the same order.

    on_wait: called when this rank is done and starts to wait for the others: a separate phase for the watchdog.
    """

    has_own_weights = False  # and publishes the student's to them

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self.on_wait: Callable[[], None] = lambda: None

    @property
    def knows_log_probs(self) -> bool:
        """Whether the completions of a training rollout have the sampler's log-probabilities."""
        return False

    def begin(self, prompts: list[list[int]], keys: list[str]) -> Callable[[], list[Completion]]:
        """Begin a training rollout from the weights as they are now; the returned function waits for its end. Engines
        of the training process itself are done when this returns."""
        completions = self.generate(prompts, keys)
        return lambda: completions

    @abstractmethod
    def generate(self, prompts: list[list[int]], keys: list[str], **options: Any) -> list[Completion]:
        """One completion per prompt (token ids) from the student's current weights.

        keys: one per prompt; the same key gives the same random numbers in any batch and on any rank. options override
        the run's sampling settings, do_sample=False for example. Raises NonFiniteLogits on all ranks.
        """

    def weights_changed(self) -> None:
        """The student's weights are no longer those of the last call."""

    def publish(self) -> None:
        """Copy the student's weights to the engine's own, if it has any."""

    def close(self) -> None:
        """Free what the engine holds. It is not used afterwards."""

    def abandon(self) -> None:
        """Remove what would outlive this process: called after an error, on the ranks that had it. No collectives."""
