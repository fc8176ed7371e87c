"""Prompts -> completions sampled from the current weights, by one of two backends.

`generate`: all rows together. A prompt is computed once for all of its completions, and a finished row leaves the
batch. A row's randomness is a function of (run seed, generation batch, row number, token position): nothing is drawn
from a shared generator, so ranks, batch sizes and resumes do not change what is sampled (up to the rounding of the
logits). `continuous`: transformers' continuous batching, whose draws depend on how it happens to batch the rows.

Shapes: R rows, A rows that are not finished, T positions of the padded prompts, V vocabulary.
"""

import hashlib
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from sdft_ds import prefix, ranks
from sdft_ds.config_checks import ROLLOUT_BACKENDS
from sdft_ds.module_state import evaluating
from sdft_ds.paired_batch import Completion, pad_left
from sdft_ds.thin_products import thin_products

# What shapes a distribution to sample from; transformers warns where it is given and nothing is sampled.
SAMPLING_OPTIONS = {"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
# Processors of these two options keep something for each row, so rows must stay where they are.
ROW_BOUND_OPTIONS = {"guidance_scale", "watermarking_config"}
UNSUPPORTED_OPTIONS = {"num_beams", "num_return_sequences", "prompt_lookup_num_tokens", "streamer"}


class Draws:
    """A uniform number in [0, 1) for each row and token position; a row's depend on its key alone."""

    def __init__(self, keys: list[str], positions: int, device: torch.device):
        table = [_uniforms(key, positions) for key in keys]
        self.table_RC = torch.from_numpy(numpy.stack(table)).to(device)

    def choose(self, scores_AV: Tensor, rows_A: Tensor, position: int) -> Tensor:
        """A sample of softmax(scores) for each row, [A]: the token at which the cumulated probability passes the
        row's number. In fp64, where the sum of a large vocabulary loses nothing."""
        cumulated_AV = scores_AV.softmax(-1).cumsum(-1, dtype=torch.float64)
        thresholds_A1 = self.table_RC[rows_A, position].unsqueeze(-1) * cumulated_AV[:, -1:]
        return torch.searchsorted(cumulated_AV, thresholds_A1, right=True).squeeze(-1)


def _uniforms(key: str, count: int) -> numpy.ndarray:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return (numpy.random.Philox(key=seed).random_raw(count) >> 11) * 2.0**-53


class Sampler:
    """Samples completions.

    options: fields of GenerationConfig. Fields that are not given take transformers' global defaults, never those of
    the model's own generation_config: a sampling setting that nobody asked for would change what is learned.
    backend: `generate` or `continuous`.
    """

    def __init__(
        self,
        options: dict[str, Any],
        eos_token_ids: list[int],
        pad_token_id: int,
        seed: int,
        backend: str = "generate",
    ):
        if unsupported := UNSUPPORTED_OPTIONS & set(options):
            raise ValueError(
                f"generation_kwargs: {', '.join(sorted(unsupported))} cannot be used for rollouts, which sample one "
                "completion for each row; see num_generations."
            )
        self.options = options
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.backend = BACKENDS[backend]

    def sample(
        self,
        model: PreTrainedModel,
        prompts: list[list[int]],
        keys: list[str],
        weights: AbstractContextManager[bool],
        **overrides: Any,
    ) -> list[Completion]:
        """One completion for each prompt.

        keys: what makes a row's randomness its own, in addition to the run's seed. weights: the context in which the
        model can generate; it says whether every rank goes on until the last is done (zero.generation_weights).
        overrides: options for this call only. Raises RuntimeError where generation gives fewer rows than prompts.
        """
        options = {**self.options, **overrides}
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
        config = GenerationConfig(
            **options, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id, use_cache=True
        )
        seeded = [f"{self.seed}/{key}" for key in keys]
        with (
            torch.no_grad(),
            evaluating(model),
            _own_generation_config(model),
            weights as synced,
            thin_products(model),
        ):
            outputs = self.backend(model, prompts, seeded, config, synced)
        if len(outputs) != len(prompts):
            raise RuntimeError(f"Generation returned {len(outputs)} completions for {len(prompts)} prompts.")
        return [self._completion(tokens) for tokens in outputs]

    def _completion(self, tokens: list[int]) -> Completion:
        """Cut after the first end-of-sequence token, which is kept: it is part of what the student said."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        return Completion(ids=tokens[:end], truncated=end is None)


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], keys: list[str], config: GenerationConfig, synced: bool
) -> list[list[int]]:
    """transformers' `generate`, which sets logits processors and stopping criteria up, around a loop of our own."""
    input_ids, attention_mask = pad_left(prompts, config.pad_token_id, model.device)
    width = input_ids.shape[1]

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        draws = Draws(keys, generation_config.max_length - width, input_ids.device)
        own = isinstance(kwargs.get("past_key_values"), DynamicCache) and prefix.supports_prefixes(model)
        if own and not any(getattr(generation_config, name) is not None for name in ROW_BOUND_OPTIONS):
            choose = draws.choose if generation_config.do_sample else _greedy
            room = generation_config.max_length - width
            return _decode(model, input_ids, attention_mask, logits_processor, stopping_criteria, choose, room, synced)
        if generation_config.do_sample:
            logits_processor.append(_Chosen(draws, width))
            generation_config.do_sample = False
        # `generate` does not hand synced_gpus on to a custom loop.
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced, **kwargs
        )

    output = model.generate(input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=decode)
    return output[:, width:].tolist()


def _greedy(scores_AV: Tensor, rows_A: Tensor, position: int) -> Tensor:
    return scores_AV.argmax(-1)


class _Chosen:
    """As the last logits processor of a loop that takes the argmax: leaves the drawn token alone."""

    def __init__(self, draws: Draws, prompt_width: int):
        self.draws = draws
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        tokens = self.draws.choose(scores, rows, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens.unsqueeze(-1), 0.0)


def _decode(
    model: PreTrainedModel,
    input_ids_RT: Tensor,
    attention_mask_RT: Tensor,
    processors: Callable[[Tensor, Tensor], Tensor],
    finished: Callable[[Tensor, None], Tensor],
    choose: Callable[[Tensor, Tensor, int], Tensor],
    room: int,
    synced: bool,
) -> Tensor:
    """Prompts and completions of at most `room` tokens, [R, T + longest]; after its end a row is undefined.

    synced: all ranks make as many forwards.
    """
    rows, width = input_ids_RT.shape
    sequences = torch.zeros(rows, width + room, dtype=input_ids_RT.dtype, device=input_ids_RT.device)
    sequences[:, :width] = input_ids_RT
    first, prompt_of_row = prefix.distinct(input_ids_RT.tolist())
    cache = prefix.empty_cache(model)
    inputs = prefix.prompt_inputs(input_ids_RT[first], attention_mask_RT[first])
    logits_UV = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    active_A = torch.tensor(prompt_of_row, device=input_ids_RT.device)
    logits_AV = logits_UV[active_A]
    prefix.fan_out(cache, active_A, room)
    active_A = torch.arange(rows, device=input_ids_RT.device)
    mask_AT = attention_mask_RT
    for position in itertools.count():  # the longest length is one of the criteria of `finished`
        if len(active_A):
            end = width + position + 1
            scores_AV = processors(sequences[active_A, : end - 1], logits_AV.float())
            tokens_A = choose(scores_AV, active_A, position)
            sequences[active_A, end - 1] = tokens_A
            going = (~finished(sequences[active_A, :end], None)).nonzero().squeeze(-1)
            if len(going) < len(active_A):
                active_A, tokens_A, mask_AT = active_A[going], tokens_A[going], mask_AT[going]
                cache.batch_select_indices(going)
        if not (ranks.largest(len(active_A), active_A.device) if synced else len(active_A)):
            break
        if len(active_A):
            inputs = prefix.next_inputs(tokens_A.unsqueeze(-1), mask_AT, after=position)
            logits_AV = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        else:
            model(input_ids=input_ids_RT[:1, :1], use_cache=False)  # only to take part in gathering the weights
    return sequences[:, :end]


def _continuous(
    model: PreTrainedModel, prompts: list[list[int]], keys: list[str], config: GenerationConfig, synced: bool
) -> list[list[int]]:
    """transformers' continuous batching: rows come and go, each with pages of its own in the cache.

    Its draws are seeded with the keys, but which draw a row gets depends on the batching.
    """
    seed = int.from_bytes(hashlib.blake2b("\n".join(keys).encode(), digest_size=4).digest(), "little")
    on_cpu = {}
    if model.device.type == "cpu":
        # Without an accelerator's memory to divide there is nothing to infer these from.
        page, longest = 32, max(map(len, prompts)) + config.max_new_tokens
        rows = len(prompts)
        on_cpu = {
            "page_size": page,
            "num_blocks": rows * (-(-longest // page) + 1),
            "max_batch_tokens": max(2 * longest, 256),
            "max_requests_per_batch": rows,
        }
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        outputs = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, **on_cpu),
        )
    failed = [output.error for output in outputs.values() if output.error]
    if failed:
        raise RuntimeError(f"Continuous batching failed: {failed[0]}")
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]


# (model, prompts, keys, config, whether all ranks go on until the last is done) -> the tokens of each completion
Backend = Callable[[PreTrainedModel, list[list[int]], list[str], GenerationConfig, bool], list[list[int]]]
BACKENDS: dict[str, Backend] = {"generate": _generate, "continuous": _continuous}


def add_backend(name: str, backend: Backend) -> None:
    """Let rollout_backend be `name`."""
    BACKENDS[name] = backend
    if name not in ROLLOUT_BACKENDS:
        ROLLOUT_BACKENDS.append(name)


@contextmanager
def _own_generation_config(model: PreTrainedModel):
    """transformers fills what a GenerationConfig leaves open from the model's own: keep that one out of the way."""
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved
