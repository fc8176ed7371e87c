"""Which rows of a batch share a line, so that the shorter ones are not padded to the longest.

transformers tells packed rows apart by their positions. Flash attention then computes each row by itself, however many
are on the one line. Other implementations mask what lies between rows of a line, which is computed all the same: there
lines are as long as the longest row, and rows share them only where that costs less than padding.
"""

from dataclasses import dataclass

from transformers import PreTrainedModel

from sdft_ds.data.batch import Bins, one_row_per_bin
from sdft_ds.distributed import zero
from sdft_ds.model.prefix_cache import supports_prefixes


@dataclass(frozen=True)
class Packing:
    """on: always, never, or (None) where it costs less.

    linear: operations for each token outside attention; quadratic: those for each pair of tokens; varlen: attention
    computes only what lies within a row.
    """

    on: bool | None
    linear: float = 1.0
    quadratic: float = 0.0
    varlen: bool = False

    def bins_of(self, lengths: list[int]) -> Bins:
        """Lines for rows of these lengths, prompt and completion together."""
        if self.on is False:
            return one_row_per_bin(lengths)
        if self.varlen:
            return [list(range(len(lengths)))]
        width, lines = max(lengths), first_fit(lengths)
        masked = len(lines) * (self.linear + width * self.quadratic)
        causal = len(lengths) * (self.linear + width * self.quadratic / 2)  # its kernels skip what lies ahead
        return lines if self.on or masked < causal else one_row_per_bin(lengths)


def first_fit(lengths: list[int]) -> Bins:
    """Rows on lines as long as the longest row: the longest first, each on the first line that has room."""
    width, lines, room = max(lengths), [], []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        number = next((i for i, left in enumerate(room) if left >= lengths[row]), len(lines))
        if number == len(lines):
            lines.append([])
            room.append(width)
        lines[number].append(row)
        room[number] -= lengths[row]
    return lines


def packing_for(model: PreTrainedModel, on: bool | None) -> Packing:
    """The choice for this model. Raises ValueError where packing is asked for and would mix rows up."""
    if not supports_prefixes(model):
        if on:
            raise ValueError(
                f"padding_free: {type(model).__name__} has layers that carry a state from token to token, and packed "
                "rows would see each other. Leave it unset."
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
    )
