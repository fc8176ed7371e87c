"""Rollout backend `generate`: batched decode loop with shared prompt prefill, in which finished rows leave the batch.

Shapes: R rows, A active rows, U unique prompts, T positions of the padded prompts, V vocabulary.

On a GPU the host runs ahead of the device: all that it reads is, every LOOK_EVERY tokens, which rows are finished.
"""

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicCache

from sdft_ds.data.batch import pad_left
from sdft_ds.distributed import ranks
from sdft_ds.loss.divergence import token_log_probs
from sdft_ds.model import prefix_cache
from sdft_ds.rollouts.draws import Draws, Greedy
from sdft_ds.rollouts.engine import SampledTokens

# Logits processors of these options keep per-row state, so rows must not leave the batch.
ROW_BOUND_OPTIONS = (
    "guidance_scale", "watermarking_config", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
)  # fmt: skip
OFF = (None, 0, 1)  # values of theirs that switch them off
# Tokens from one look for finished rows to the next. On a GPU a look is a synchronization; on a CPU it costs nothing,
# and a finished row as much as any other.
LOOK_EVERY, LOOK_EVERY_CPU = 8, 1


def generate(
    model: PreTrainedModel, prompts: list[list[int]], keys: list[str], config: GenerationConfig, synced: bool
) -> list[SampledTokens]:
    """transformers' `generate`, which sets up logits processors and stopping criteria, with a custom decode loop."""
    input_ids, attention_mask = pad_left(prompts, config.pad_token_id, model.device)
    width, room = input_ids.shape[1], config.max_new_tokens
    choice = Draws(keys, room, model.device) if config.do_sample else Greedy(len(keys), model.device)
    temperature = config.temperature or 1.0  # unset when greedy
    log_probs_RC = torch.zeros(len(keys), room, device=model.device)

    def choose(
        logits_AV: Tensor, scores_AV: Tensor, rows_A: Tensor, position: int, done_A: Tensor | None = None
    ) -> Tensor:
        """The next token of each row, [A]; notes its log-probability. done_A: rows that no longer need one."""
        tokens_A = choice.choose(scores_AV, rows_A, position, done_A)
        log_probs_RC[rows_A, position] = token_log_probs(logits_AV / temperature, tokens_A)
        return tokens_A

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        own = isinstance(kwargs.get("past_key_values"), DynamicCache) and prefix_cache.supports_prefixes(model)
        if own and all(getattr(generation_config, name) in OFF for name in ROW_BOUND_OPTIONS):
            return decode_rows(
                model, input_ids, attention_mask, logits_processor, stopping_criteria, choose, room, synced
            )
        chosen = _Chosen(choose, width)
        logits_processor.insert(0, chosen.see)
        logits_processor.append(chosen)
        generation_config.do_sample = False
        # `generate` does not pass synced_gpus to a custom loop.
        return model._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced, **kwargs
        )

    output = model.generate(input_ids, attention_mask=attention_mask, generation_config=config, custom_generate=loop)
    choice.check()
    tokens, log_probs = output[:, width:].tolist(), log_probs_RC.tolist()
    return [SampledTokens(*each) for each in zip(tokens, log_probs[: len(tokens)], strict=True)]


class _Chosen:
    """Last logits processor of a greedy loop: masks all but the chosen token, so that the argmax is that token.
    `see` is the first one."""

    def __init__(self, choose: Callable[[Tensor, Tensor, Tensor, int], Tensor], prompt_width: int):
        self.choose = choose
        self.prompt_width = prompt_width

    def see(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(len(scores), device=scores.device)
        tokens = self.choose(self.logits, scores, rows, input_ids.shape[1] - self.prompt_width)
        return torch.full_like(scores, float("-inf")).scatter(-1, tokens.unsqueeze(-1), 0.0)


def decode_rows(
    model: PreTrainedModel,
    input_ids_RT: Tensor,
    attention_mask_RT: Tensor,
    processors: LogitsProcessorList,
    finished: Callable[[Tensor, None], Tensor],
    choose: Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor],
    room: int,
    synced: bool,
) -> Tensor:
    """Prompts and completions of at most `room` tokens, [R, T + longest]; values after the end of a row are undefined.

    choose: (logits, processed scores, rows, position, rows that are finished) -> tokens. synced: all ranks run equally
    many forwards.
    """
    rows, width = input_ids_RT.shape
    device = input_ids_RT.device
    look_every = LOOK_EVERY_CPU if device.type == "cpu" else LOOK_EVERY
    last = int(ranks.all_reduce_max(room, device)) if synced else room
    sequences = torch.zeros(rows, width + room, dtype=input_ids_RT.dtype, device=device)
    sequences[:, :width] = input_ids_RT
    first, prompt_of_row = prefix_cache.distinct(input_ids_RT.tolist())
    lengths_A = attention_mask_RT.sum(-1).tolist()  # of the prompts; on the host
    cache = prefix_cache.empty_cache(model)
    padded = prefix_cache.are_padded(lengths_A, width)
    inputs = prefix_cache.prompt_inputs(input_ids_RT[first], attention_mask_RT[first], padded)
    last_only = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
    logits_UV = model(**inputs, past_key_values=cache, use_cache=True, **last_only).logits[:, -1]
    active_A = torch.tensor(prompt_of_row, device=device)
    logits_AV = logits_UV[active_A]
    prefix_cache.fan_out(cache, active_A, room)
    active_A, done_A = torch.arange(rows, device=device), torch.zeros(rows, dtype=torch.bool, device=device)
    mask_AT = attention_mask_RT
    with prefix_cache.padding_known(), _decode_settings(model, rows):
        for position in itertools.count():
            end = width + position + 1
            if len(active_A):
                logits_AV = logits_AV.float()
                scores_AV = processors(sequences[active_A, : end - 1], logits_AV)
                tokens_A = choose(logits_AV, scores_AV, active_A, position, done_A)
                sequences[active_A, end - 1] = tokens_A
                done_A = done_A | finished(sequences[active_A, :end], None)
            # The maximum length is one of the stopping criteria in `finished`: after `room` tokens, all rows are.
            look = (position + 1) % look_every == 0 or position + 1 == last  # on all ranks together
            if look or position + 1 == room:
                going = prefix_cache.without(done_A.tolist())
                if len(going) < len(active_A):
                    lengths_A = [lengths_A[i] for i in going]
                    padded = prefix_cache.are_padded(lengths_A, width)
                    kept = torch.tensor(going, dtype=torch.long, device=device)
                    active_A, done_A, tokens_A, mask_AT = (
                        each[kept] for each in (active_A, done_A, tokens_A, mask_AT)
                    )
                    prefix_cache.keep_rows(cache, going)
                    _keep_rows(processors, kept)
            if look and not (ranks.all_reduce_max(len(active_A), device) if synced else len(active_A)):
                break
            if len(active_A):
                inputs = prefix_cache.next_inputs(tokens_A.unsqueeze(-1), mask_AT, position, padded)
                logits_AV = model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
            else:
                model(input_ids=input_ids_RT[:1, :1], use_cache=False)  # only to take part in the weight all-gathers
    return sequences[:, :end]


def _keep_rows(processors: LogitsProcessorList, rows: Tensor) -> None:
    """Of what logits processors know of each row (repetition_penalty: how far its prompt is padded)."""
    for processor in processors:
        lengths = getattr(processor, "prompt_ignore_length", None)
        if isinstance(lengths, Tensor):
            processor.prompt_ignore_length = lengths[rows]


def _decode_settings(model: PreTrainedModel, rows: int) -> AbstractContextManager[Any]:
    """transformers' settings for decoding a mixture of experts on a GPU: products with a copy of the weights of each
    row's experts. For as many rows as the copies are no larger than the layer's own weights."""
    config = model.config.get_text_config(decoder=True)
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), None)
    of_token = getattr(config, "num_experts_per_tok", None)
    if experts is None or of_token is None or rows * of_token > experts:
        return nullcontext()
    return model._optimize_model_for_decode()


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # models' names for how many a layer has
