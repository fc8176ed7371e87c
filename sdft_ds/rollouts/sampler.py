"""Sampler of local rollouts, in batches that fit into memory; registry of backends.

Backends: `generate` (decode.py), `continuous` (continuous.py), and those registered with add_backend. Non-finite
logits raise NonFiniteLogits on all ranks. Patches the model's generation_config during a call.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sdft_ds.config.rollouts import ROLLOUT_BACKENDS
from sdft_ds.data.batch import Completion
from sdft_ds.distributed import ranks
from sdft_ds.model import prefix_cache
from sdft_ds.model.modes import evaluating
from sdft_ds.model.skinny_gemm import skinny_gemm
from sdft_ds.rollouts.continuous import continuous
from sdft_ds.rollouts.decode import generate
from sdft_ds.rollouts.draws import NonFiniteLogits
from sdft_ds.rollouts.engine import SampledTokens, Sampling

# Fields of GenerationConfig that cannot be set, by the reason.
_UNSUPPORTED = {
    "rollouts sample one completion for each row; see num_generations": (
        "num_beams", "num_beam_groups", "num_return_sequences",
    ),
    "rollouts sample token by token from the model alone": (
        "dola_layers", "is_assistant", "penalty_alpha", "prompt_lookup_num_tokens", "streamer",
    ),
    "it works on text, and rollouts are tokens": ("stop_strings", "token_healing"),
    "it is that of the model and its tokenizer": ("eos_token_id", "pad_token_id", "bos_token_id"),
    "rollouts always have a cache": ("use_cache",),
}  # fmt: skip
UNSUPPORTED_OPTIONS = {name: reason for reason, names in _UNSUPPORTED.items() for name in names}
TEXTS = ("cache_implementation",)  # fields that may be a text


# Memory budget for the rows of one call on a CPU: a constant, so that rollouts do not depend on free memory.
CPU_BYTES = 8 << 30


class Sampler:
    """Samples completions.

    backend: a key of BACKENDS. batch_tokens: maximum tokens of one `generate` call, counting prompts, maximum
    completion lengths and padding; None: as memory allows.
    """

    def __init__(
        self,
        sampling: Sampling,
        backend: str = "generate",
        batch_tokens: int | None = None,
    ):
        _check_options(sampling.options)
        self.sampling = sampling
        self.backend = BACKENDS[backend]
        self.batch_tokens = batch_tokens

    def sample(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        keys: list[str],
        weights: AbstractContextManager[bool],
        on_wait: Callable[[], None] = lambda: None,
        **overrides: Any,
    ) -> list[Completion]:
        """One completion for each prompt.

        keys: seed each row's randomness, together with the run's seed. on_wait: see RolloutEngine. weights: context in
        which the model can generate; yields whether every rank must continue until the last one is done
        (zero.generation_weights). overrides: options for this call only. Called by every rank. Raises NonFiniteLogits
        on all ranks, and RuntimeError if the number of completions differs from that of prompts.
        """
        sampling = self.sampling
        options = sampling.of_call(**overrides)
        config = GenerationConfig(
            **options, eos_token_id=sampling.eos_token_ids, pad_token_id=sampling.pad_token_id, use_cache=True
        )
        sampled: dict[int, SampledTokens] = {}
        non_finite: list[str] = []
        with (
            torch.no_grad(),
            evaluating(model),
            _own_generation_config(model),
            weights as synced,
            skinny_gemm(model),
        ):
            # A rank without rows takes part in the others' forwards with a one-token prompt.
            asked, names = (prompts, keys) if prompts or not synced else ([[sampling.pad_token_id]], [""])
            for rows in self._batches(model, asked, config.max_new_tokens, synced):
                batch, seeded = [asked[row] for row in rows], [sampling.seed_key(names[row]) for row in rows]
                try:
                    outputs = self.backend(model, batch, seeded, config, synced)
                except NonFiniteLogits as error:  # continue, as the other ranks do: raised on all of them below
                    non_finite += [names[rows[i]] for i in error.rows]
                    continue
                if len(outputs) != len(batch):
                    raise RuntimeError(f"Generation returned {len(outputs)} completions for {len(batch)} prompts.")
                known = [each if isinstance(each, SampledTokens) else SampledTokens(each) for each in outputs]
                sampled |= zip(rows, known, strict=True)
        on_wait()
        refuse_non_finite(non_finite, model.device)
        return [sampling.completion(sampled[row], options) for row in range(len(prompts))]

    def _batches(
        self, model: PreTrainedModel, prompts: list[list[int]], longest: int, synced: bool
    ) -> list[list[int]]:
        """Row indices of each call: all at once, or as many as fit. synced: equally many calls on every rank; a rank
        with fewer repeats its last row."""
        if self.backend is not generate and model.device.type != "cpu":  # there, others size their own cache
            batches = [list(range(len(prompts)))] if prompts else []
        elif self.batch_tokens is not None:
            sizes = [len(prompt) + longest for prompt in prompts]
            batches = prefix_cache.batches_within(self.batch_tokens, sizes, prompts)
        else:
            sizes = _bytes_of_rows(model, prompts, longest)
            batches = prefix_cache.batches_within(_bytes_to_use(model.device), sizes, prompts)
        batches = [sorted(batch) for batch in batches]
        return ranks.pad_to_equal_count(batches, batches[-1][-1:], model.device) if synced else batches


def _check_options(options: dict[str, Any]) -> None:
    """Raises ValueError for fields of GenerationConfig that rollouts cannot have, and for wrong values."""
    for name in sorted(UNSUPPORTED_OPTIONS.keys() & options):
        raise ValueError(f"generation_kwargs: {name} cannot be set: {UNSUPPORTED_OPTIONS[name]}.")
    if not isinstance(options.get("do_sample", True), bool):
        raise ValueError(f"generation_kwargs: do_sample must be true or false, not {options['do_sample']!r}.")
    for name, value in options.items():
        if isinstance(value, str) and name not in TEXTS:
            raise ValueError(f"generation_kwargs: {name} cannot be a text, {value!r}.")
    try:
        GenerationConfig(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation_kwargs: {error}") from None


def refuse_non_finite(keys: list[str], device: torch.device) -> None:
    """Raises NonFiniteLogits on every rank if any rank has such rows; called by every rank."""
    if ranks.all_reduce_max(len(keys), device):
        raise NonFiniteLogits([key for of_rank in ranks.all_gather_objects(keys) for key in of_rank])


def _bytes_to_use(device: torch.device) -> int:
    """Memory budget for the rows of one call."""
    if device.type == "cpu":
        return CPU_BYTES
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    return prefix_cache.memory_budget(torch.accelerator.get_memory_info(device)[0] + kept)


def _bytes_of_rows(model: PreTrainedModel, prompts: list[list[int]], longest: int) -> list[int]:
    """Estimated bytes of each row: its cache, one layer's activations in prefill with its mask (as booleans, and as
    what a kernel adds), and the next-token scores in fp32 and fp64."""
    config = model.config.get_text_config(decoder=True)
    cache, size = prefix_cache.CacheShape.of(config), model.dtype.itemsize
    widest = 4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    of_pair = 1 + size
    if config._attn_implementation == "eager":  # holds the scores, and their softmax in fp32
        of_pair += (size + 4) * (getattr(config, "num_attention_heads", None) or 0)
    return [
        size * (cache.elements(len(prompt) + longest) + (len(prompt) + longest) * widest)
        + of_pair * len(prompt) ** 2
        + 24 * config.vocab_size
        for prompt in prompts
    ]


# (model, prompts, keys, config, synced: all ranks continue until the last is done) -> the tokens of each completion,
# with or without their log-probabilities.
Backend = Callable[
    [PreTrainedModel, list[list[int]], list[str], GenerationConfig, bool], Sequence[list[int] | SampledTokens]
]


BACKENDS: dict[str, Backend] = {"generate": generate, "continuous": continuous}


def add_backend(name: str, backend: Backend) -> None:
    """Register a backend, selected by rollout_backend=name."""
    BACKENDS[name] = backend
    if name not in ROLLOUT_BACKENDS:
        ROLLOUT_BACKENDS.append(name)


@contextmanager
def _own_generation_config(model: PreTrainedModel):
    """Hide the model's generation_config: transformers would fill unset fields of a GenerationConfig from it."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved
