"""Prompts -> completions sampled from the current weights, by one of two backends.

`generate`: rows together, as many as memory has room for. A prompt is computed once for all of its completions, and a
finished row leaves the batch. A row's randomness is a function of (run seed, generation batch, row number, token
position): nothing is drawn from a shared generator, so ranks, batch sizes and resumes do not change what is sampled
(up to the rounding of the logits). `continuous`: transformers' continuous batching, whose draws depend on how it
happens to batch the rows.

A rollout from logits that are not finite ends with NonFiniteLogits, on all ranks.

Shapes: R rows, A rows that are not finished, T positions of the padded prompts, V vocabulary.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
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
# Memory for the rows of one call on a CPU, whose rollouts do not depend on what else happens to be in memory.
CPU_BYTES = 8 << 30
NAMED_ROWS = 16  # in an error


class NonFiniteLogits(FloatingPointError):
    """Some rows had logits that are NaN or infinite. rows: a backend raises it with the numbers of the prompts, and
    Sampler with the keys of all ranks' rows."""

    def __init__(self, rows: list[Any]):
        self.rows = rows
        named: dict[str, list[str]] = {}
        for name, _, row in (str(row).rpartition("/") for row in rows):
            named.setdefault(name, []).append(row)
        where = "; ".join(
            f"{name}, rows {', '.join(of_name[:NAMED_ROWS])}{', ...' if len(of_name) > NAMED_ROWS else ''}"
            for name, of_name in named.items()
        )
        super().__init__(
            f"The model's logits are NaN or infinite in the rollout of {where}; train/N is generation batch N. Resume "
            "from an earlier checkpoint with a lower learning_rate; with fp16, train in bf16 instead."
        )


class Greedy:
    """The likeliest token. non_finite_R: rows whose scores were NaN or infinite; nobody waits for it meanwhile."""

    def __init__(self, rows: int, device: torch.device):
        self.non_finite_R = torch.zeros(rows, dtype=torch.bool, device=device)

    def choose(self, scores_AV: Tensor, rows_A: Tensor, position: int) -> Tensor:
        tokens_A = scores_AV.argmax(-1)
        self._note(scores_AV.gather(-1, tokens_A.unsqueeze(-1)).squeeze(-1), rows_A)
        return tokens_A

    def _note(self, values_A: Tensor, rows_A: Tensor) -> None:
        self.non_finite_R[rows_A] |= ~values_A.isfinite()

    def check(self) -> None:
        """Raises NonFiniteLogits; the one place that waits for the device."""
        if rows := self.non_finite_R.nonzero().flatten().tolist():
            raise NonFiniteLogits(rows)


class Draws(Greedy):
    """A uniform number in [0, 1) for each row and token position; a row's depend on its key alone."""

    def __init__(self, keys: list[str], positions: int, device: torch.device):
        super().__init__(len(keys), device)
        table = [_uniforms(key, positions) for key in keys]
        self.table_RC = torch.from_numpy(numpy.stack(table)).to(device)

    def choose(self, scores_AV: Tensor, rows_A: Tensor, position: int) -> Tensor:
        """A sample of softmax(scores) for each row, [A]: the token at which the cumulated probability passes the
        row's number. In fp64, where the sum of a large vocabulary loses nothing."""
        cumulated_AV = scores_AV.softmax(-1).cumsum(-1, dtype=torch.float64)
        self._note(cumulated_AV[:, -1], rows_A)
        thresholds_A1 = self.table_RC[rows_A, position].unsqueeze(-1) * cumulated_AV[:, -1:]
        tokens_A = torch.searchsorted(cumulated_AV, thresholds_A1, right=True).squeeze(-1)
        return tokens_A.clamp_(max=scores_AV.shape[-1] - 1)  # among NaN none is found


def _uniforms(key: str, count: int) -> numpy.ndarray:
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return (numpy.random.Philox(key=seed).random_raw(count) >> 11) * 2.0**-53


class Sampler:
    """Samples completions.

    options: fields of GenerationConfig. Fields that are not given take transformers' global defaults, never those of
    the model's own generation_config: a sampling setting that nobody asked for would change what is learned.
    backend: `generate` or `continuous`. batch_tokens: most tokens, prompts, longest completions and padding, of one
    call of `generate`; None: as memory allows.
    """

    def __init__(
        self,
        options: dict[str, Any],
        eos_token_ids: list[int],
        pad_token_id: int,
        seed: int,
        backend: str = "generate",
        batch_tokens: int | None = None,
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
        # Called when this rank is done and begins to wait for the others: a phase of its own for the watchdog.
        self.on_wait: Callable[[], None] = lambda: None
        self.batch_tokens = batch_tokens

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
        overrides: options for this call only. Every rank calls it. Raises NonFiniteLogits, on all ranks, and
        RuntimeError where generation gives fewer rows than prompts.
        """
        options = {**self.options, **overrides}
        if not options["do_sample"]:
            options = {name: value for name, value in options.items() if name not in SAMPLING_OPTIONS}
        config = GenerationConfig(
            **options, eos_token_id=self.eos_token_ids, pad_token_id=self.pad_token_id, use_cache=True
        )
        tokens_of: dict[int, list[int]] = {}
        non_finite: list[str] = []
        with (
            torch.no_grad(),
            evaluating(model),
            _own_generation_config(model),
            weights as synced,
            thin_products(model),
        ):
            # A rank without rows takes part in the others' forwards with one of a single token.
            asked, names = (prompts, keys) if prompts or not synced else ([[self.pad_token_id]], [""])
            for rows in self._batches(model, asked, config.max_new_tokens, synced):
                batch, seeded = [asked[row] for row in rows], [f"{self.seed}/{names[row]}" for row in rows]
                try:
                    outputs = self.backend(model, batch, seeded, config, synced)
                except NonFiniteLogits as error:  # the other ranks go on to their next batch
                    non_finite += [names[rows[i]] for i in error.rows]
                    continue
                if len(outputs) != len(batch):
                    raise RuntimeError(f"Generation returned {len(outputs)} completions for {len(batch)} prompts.")
                tokens_of |= zip(rows, outputs, strict=True)
        self.on_wait()
        self._refuse(non_finite, model.device)
        return [self._completion(tokens_of[row]) for row in range(len(prompts))]

    def _batches(
        self, model: PreTrainedModel, prompts: list[list[int]], longest: int, synced: bool
    ) -> list[list[int]]:
        """Row numbers of each call: all at once, or as many as fit. synced: as many calls on every rank; one with
        fewer repeats its last row."""
        if self.backend is not _generate:  # has a cache of its own
            batches = [list(range(len(prompts)))] if prompts else []
        elif self.batch_tokens is not None:
            sizes = [len(prompt) + longest for prompt in prompts]
            batches = prefix.batches_within(self.batch_tokens, sizes, prompts)
        else:
            sizes = _bytes_of_rows(model, prompts, longest)
            batches = prefix.batches_within(_bytes_to_use(model.device), sizes, prompts)
        batches = [sorted(batch) for batch in batches]
        return ranks.equally_many(batches, batches[-1][-1:], model.device) if synced else batches

    def _refuse(self, keys: list[str], device: torch.device) -> None:
        """Raises NonFiniteLogits on every rank if there are such rows on any; every rank calls it."""
        if ranks.largest(len(keys), device):
            raise NonFiniteLogits([key for of_rank in ranks.gather(keys) for key in of_rank])

    def _completion(self, tokens: list[int]) -> Completion:
        """Cut after the first end-of-sequence token, which is kept: it is part of what the student said."""
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos_token_ids), None)
        return Completion(ids=tokens[:end], truncated=end is None)


def _bytes_to_use(device: torch.device) -> int:
    """Memory for the rows of one call: on an accelerator half of what is free, rounded down to a power of two, so that
    a run and its resume make the same calls."""
    if device.type == "cpu":
        return CPU_BYTES
    kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
    half = (torch.accelerator.get_memory_info(device)[0] + kept) // 2
    return 1 << (max(1, half).bit_length() - 1)


def _bytes_of_rows(model: PreTrainedModel, prompts: list[list[int]], longest: int) -> list[int]:
    """Estimates for each row: keys and values of all its tokens, a layer's activations at the prompt's forward, and
    the scores from which a token is chosen, in fp32 and fp64."""
    config = model.config.get_text_config(decoder=True)
    widest = 4 * config.hidden_size + 3 * (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    of_token = (2 * config.num_hidden_layers * prefix.key_value_width(config) + widest) * model.dtype.itemsize
    return [(len(prompt) + longest) * of_token + 24 * config.vocab_size for prompt in prompts]


def _generate(
    model: PreTrainedModel, prompts: list[list[int]], keys: list[str], config: GenerationConfig, synced: bool
) -> list[list[int]]:
    """transformers' `generate`, which sets logits processors and stopping criteria up, around a loop of our own."""
    input_ids, attention_mask = pad_left(prompts, config.pad_token_id, model.device)
    width, room = input_ids.shape[1], config.max_new_tokens
    choice = Draws(keys, room, model.device) if config.do_sample else Greedy(len(keys), model.device)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        own = isinstance(kwargs.get("past_key_values"), DynamicCache) and prefix.supports_prefixes(model)
        if own and not any(getattr(generation_config, name) is not None for name in ROW_BOUND_OPTIONS):
            return _decode(
                model, input_ids, attention_mask, logits_processor, stopping_criteria, choice.choose, room, synced
            )
        logits_processor.append(_Chosen(choice, width))
        generation_config.do_sample = False
        # `generate` does not hand synced_gpus on to a custom loop.
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced, **kwargs
        )

    output = model.generate(input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=decode)
    choice.check()
    return output[:, width:].tolist()


class _Chosen:
    """As the last logits processor of a loop that takes the argmax: leaves the chosen token alone."""

    def __init__(self, choice: Greedy, prompt_width: int):
        self.choice = choice
        self.prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        tokens = self.choice.choose(scores, rows, input_ids.shape[1] - self.prompt_width)
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
    with (
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
        _finite_logits(model) as non_finite,
    ):
        outputs = model.generate_batch(
            inputs=prompts,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(seed=seed, **on_cpu),
        )
    if bool(non_finite):
        raise NonFiniteLogits(list(range(len(prompts))))  # which of them is not known
    failed = [output.error for output in outputs.values() if output.error]
    if failed:
        raise RuntimeError(f"Continuous batching failed: {failed[0]}")
    return [outputs[name].generated_tokens for name in sorted(outputs, key=lambda name: int(name.rpartition("_")[2]))]


@contextmanager
def _finite_logits(model: PreTrainedModel) -> Iterator[Tensor]:
    """Inside, logits that are not finite are replaced, because sampling from them ends the process on a GPU; yields
    a flag, True where there were some."""
    flag = torch.zeros((), dtype=torch.bool, device=model.device)

    def replace(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        flag.logical_or_(~logits.isfinite().all())
        return logits.nan_to_num(0.0)

    hook = model.get_output_embeddings().register_forward_hook(replace)
    try:
        yield flag
    finally:
        hook.remove()


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
