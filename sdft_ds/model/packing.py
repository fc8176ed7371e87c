"""Packing: which rows of a batch share a line, so that shorter ones are not padded to the longest.

transformers separates packed rows by their position ids. Flash attention then computes each row by itself, with all
rows on one line. Other implementations compute and then mask attention between rows of a line: there, lines are as
long as the longest row, and rows share them only where that costs less than padding.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sdft_ds.data.batch import Bins, one_row_per_bin
from sdft_ds.distributed import zero
from sdft_ds.model.prefix_cache import supports_prefixes

# Cost of attention with a mask beyond its FLOPs, by device. On CUDA a mask rules out the flash kernel, and keys and
# values are copied for each query head. An estimate, not measured.
MASK_COSTS = {"cuda": 4.0}


@dataclass(frozen=True)
class Packing:
    """on: always, never, or (None) where it costs less.

    linear: FLOPs per token outside attention; quadratic: FLOPs per pair of tokens; varlen: attention computes only
    within rows; mask_cost: see MASK_COSTS.
    """

    on: bool | None
    linear: float = 1.0
    quadratic: float = 0.0
    varlen: bool = False
    mask_cost: float = 1.0

    def bins_of(self, lengths: list[int]) -> Bins:
        """Lines for rows of these lengths (prompt + completion)."""
        if self.on is False:
            return one_row_per_bin(lengths)
        if self.varlen:
            return [list(range(len(lengths)))]
        width, lines = max(lengths), first_fit(lengths)
        masked = len(lines) * (self.linear + width * self.quadratic * self.mask_cost)
        causal = len(lengths) * (self.linear + width * self.quadratic / 2)  # causal kernels skip future tokens
        return lines if self.on or masked < causal else one_row_per_bin(lengths)


def first_fit(lengths: list[int]) -> Bins:
    """First-fit decreasing bin packing of rows into lines as long as the longest row."""
    width, lines, room = max(lengths), [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        number = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if number == len(lines):
            lines.append([])
            room.append(width)
        lines[number].append(row)
        room[number] -= lengths[row]
    return lines


def packing_for(model: PreTrainedModel, on: bool | None, device: torch.device) -> Packing:
    """Packing for this model on this device. Raises ValueError if packing is requested but rows would affect
    each other."""
    if not supports_prefixes(model):
        if on:
            raise ValueError(
                f"padding_free: {type(model).__name__} has layers that carry a state from token to token, so packed "
                "rows would affect each other. Leave padding_free unset."
            )
        return Packing(on=False)
    config = model.config.get_text_config(decoder=True)
    looked_up = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    weights = [param for param in model.parameters() if param.ndim > 1 and id(param) not in looked_up]
    return Packing(
        on,
        linear=2.0 * sum(zero.full_shape(weight).numel() for weight in weights),
        quadratic=4.0 * config.num_hidden_layers * config.hidden_size,
        varlen="flash" in config._attn_implementation,
        mask_cost=MASK_COSTS.get(device.type, 1.0),
    )
