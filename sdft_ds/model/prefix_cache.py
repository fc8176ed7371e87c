"""Prefix KV cache: a prompt shared by several completions is computed once, its KV cache copied to each row.

Shapes: U unique prompts, R rows, C tokens after the prompts, T positions. Prompts are left-padded, so that the tokens
after them are in the same columns of every row and at the right distance for sliding windows.

Patches transformers' look at a mask, whose answer is known: see `padding_known`.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

# The state of a recurrent layer, or of linear attention, has about as many elements as the keys and values of so many
# tokens (Qwen3-Next: 512, Falcon-H1: 1536).
STATE_TOKENS = 1024


def supports_prefixes(model: PreTrainedModel) -> bool:
    """Whether keys and values are the model's only state of a prompt; False with recurrent layers."""
    accepted = inspect.signature(type(model).forward).parameters
    return (
        not model._is_stateful
        and {"position_ids", "past_key_values"} <= set(accepted)
        and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in empty_cache(model).layers)
    )


@dataclass(frozen=True)
class CacheShape:
    """What a row's cache holds. width: elements of a token's keys in one layer; its values have as many. windows: for
    each attention layer the most tokens that it keeps, None for all. recurrent: number of layers with a state."""

    width: int
    windows: tuple[int | None, ...]
    recurrent: int = 0

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "CacheShape":
        heads = getattr(config, "num_attention_heads", None) or 1
        head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        layers = DynamicCache(config=config).layers
        return cls(
            width=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
            windows=tuple(getattr(each, "sliding_window", None) for each in layers if isinstance(each, DynamicLayer)),
            recurrent=sum(isinstance(each, LinearAttentionCacheLayerMixin) for each in layers),
        )

    def elements(self, length: int) -> int:
        """Of a row of so many tokens; an estimate where there is a state."""
        kept = sum(length if window is None else min(length, window) for window in self.windows)
        return 2 * self.width * (kept + STATE_TOKENS * self.recurrent)


def longest_row(model_config: PreTrainedConfig) -> tuple[int | None, str]:
    """(maximum tokens of prompt + completion, None if unlimited; what sets the limit).

    The limit is the model's context, or, if its rotary factors change at some length (longrope), that length: beyond
    it, cached keys, and rows batched with a longer one, would be rotated differently than in a forward of the row
    alone. Dynamic factors change only beyond the context.
    """
    config = model_config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) or {}
    for factors in [rotary, *(each for each in rotary.values() if isinstance(each, dict))]:  # per layer type
        if factors.get("rope_type") == "longrope" and any(
            factors.get(f"short_{name}") != factors.get(f"long_{name}") for name in ("factor", "mscale")
        ):
            switch = factors["original_max_position_embeddings"]
            if context is None or switch < context:
                return switch, (
                    f"the {switch} tokens at which the model's rotary factors change (longrope; to train beyond them, "
                    "write the values of long_factor into short_factor in its config.json, for every length)"
                )
    return context, f"the model's context of {context} tokens"


def empty_cache(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def distinct(prompts: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """(first row of each unique prompt, [U]; for each row the index of its prompt among those, [R])."""
    number: dict[tuple[int, ...], int] = {}
    first, rows = [], []
    for r, prompt in enumerate(map(tuple, prompts)):
        if prompt not in number:
            number[prompt] = len(first)
            first.append(r)
        rows.append(number[prompt])
    return first, rows


def memory_budget(free: int) -> int:
    """Memory that the rows of one call may take of what is free: half of it, rounded down to a power of two so that a
    run and its resume make the same calls."""
    return 1 << (max(1, free // 2).bit_length() - 1)


def batches_within(budget: int, sizes: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Row indices in batches, largest rows first. A batch takes as many rows as fit into the budget if each were as
    large as its largest; a row larger than the budget is alone. Rows with the same prompt stay together where one
    batch can hold them all."""
    rows_of: dict[int, list[int]] = {}
    for row, prompt in enumerate(distinct(prompts)[1]):
        rows_of.setdefault(prompt, []).append(row)
    groups = [sorted(rows, key=lambda row: -sizes[row]) for rows in rows_of.values()]
    batches: list[list[int]] = []
    room = 0
    for rows in sorted(groups, key=lambda rows: -sizes[rows[0]]):
        if len(rows) > room:
            most = max(1, budget // sizes[rows[0]])
            batches += [rows[start : start + most] for start in range(0, len(rows), most)]
            room = most - len(batches[-1])
        else:
            batches[-1] += rows
            room -= len(rows)
    return batches


def are_padded(lengths: Sequence[int], width: int) -> bool:
    """Whether prompts of these lengths are padded, in a batch of this width; on the host, without reading the mask."""
    return any(length < width for length in lengths)


def prompt_inputs(input_ids_UT: Tensor, attention_mask_UT: Tensor, padded: bool) -> dict[str, Any]:
    """Inputs of the forward over left-padded prompts; without padding the mask is omitted, which is faster."""
    if not padded:
        return {"input_ids": input_ids_UT}
    positions_UT = (attention_mask_UT.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids_UT, "attention_mask": attention_mask_UT, "position_ids": positions_UT}


def next_inputs(ids_RC: Tensor, prompt_mask_RT: Tensor, after: int, padded: bool) -> dict[str, Any]:
    """Inputs of the forward over C tokens after the prompts and `after` more tokens, all of which are cached."""
    if not padded:
        return {"input_ids": ids_RC}
    rows, width = ids_RC.shape
    offsets_C = torch.arange(after, after + width, device=ids_RC.device)
    return {
        "input_ids": ids_RC,
        "attention_mask": torch.nn.functional.pad(prompt_mask_RT, (0, after + width), value=1),
        "position_ids": prompt_mask_RT.sum(-1, keepdim=True) + offsets_C.expand(rows, -1),
    }


@contextmanager
def padding_known() -> Iterator[None]:
    """Inside, a mask is taken to have padding wherever one is given, as by next_inputs: transformers reads it from the
    device in each forward."""
    original = masking_utils.fast_all
    masking_utils.fast_all = lambda mask: False
    try:
        yield
    finally:
        masking_utils.fast_all = original


def fan_out(cache: DynamicCache, rows_R: Tensor, room: int) -> None:
    """Expand the cache from U prompts to R rows, each with a copy of its prompt's KV and space for `room` tokens."""
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = RoomyLayer(layer, rows_R, room)
        else:
            layer.batch_select_indices(rows_R)


def without(finished: list[bool]) -> list[int]:
    """The rows that are not finished, in the order in which `keep_rows` copies fewest: each in its place, but the last
    ones in the places of those that are."""
    left = [row for row, ends in enumerate(finished) if not ends]
    last = [row for row in left if row >= len(left)]
    return [last.pop() if finished[place] else place for place in range(len(left))]


def keep_rows(cache: DynamicCache, rows: list[int]) -> None:
    """Reduce a cache that was fanned out to these rows, in this order."""
    index = None  # on the device, sent once: each copy from the host is waited for
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.keep_rows(rows)
        else:
            index = torch.tensor(rows, dtype=torch.long, device=layer.keys.device) if index is None else index
            layer.batch_select_indices(index)


class RoomyLayer(DynamicLayer):
    """Preallocated KV cache layer: new tokens are written in place, where DynamicLayer would copy the full cache."""

    def __init__(self, filled: DynamicLayer, rows_R: Tensor, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = filled.dtype, filled.device, True
        length = filled.keys.shape[2]
        self.room_keys, self.room_values = (
            old.new_empty(len(rows_R), old.shape[1], length + room, old.shape[3])
            for old in (filled.keys, filled.values)
        )
        torch.index_select(filled.keys, 0, rows_R, out=self.room_keys[:, :, :length])
        torch.index_select(filled.values, 0, rows_R, out=self.room_values[:, :, :length])
        self._show(length)

    def _show(self, length: int) -> None:
        self.keys, self.values = self.room_keys[:, :, :length], self.room_values[:, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[2]
        end = start + key_states.shape[2]
        self.room_keys[:, :, start:end] = key_states
        self.room_values[:, :, start:end] = value_states
        self._show(end)
        return self.keys, self.values

    def keep_rows(self, rows: list[int]) -> None:
        """Reduce to rows of `without`. Only those that move are copied: to copy all that stay, each time that a row
        ends, would take as long as the attention of several tokens."""
        length = self.keys.shape[2]
        for room in (self.room_keys, self.room_values):
            for place, row in enumerate(rows):
                if place != row:
                    room[place, :, :length] = room[row, :, :length]
        self.room_keys, self.room_values = self.room_keys[: len(rows)], self.room_values[: len(rows)]
        self._show(length)
