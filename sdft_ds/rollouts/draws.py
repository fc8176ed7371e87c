"""Next-token selection: greedy, or stateless sampling as a pure function of (row key, position).

No shared generator is used, so ranks, batch sizes and resumes do not change what is sampled.

Shapes: A active (unfinished) rows, C completion positions, R rows, V vocabulary.
"""

import hashlib
from typing import Any

import numpy
import torch
from torch import Tensor

NAMED_ROWS = 16  # rows named in an error message


class NonFiniteLogits(FloatingPointError):
    """Some rows had NaN or infinite logits. rows: prompt indices when raised by a backend, the keys of all ranks' rows
    when raised by Sampler."""

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
    """Top-1 token. non_finite_R: rows with NaN or infinite scores, kept on the device to avoid a sync per token."""

    def __init__(self, rows: int, device: torch.device):
        self.non_finite_R = torch.zeros(rows, dtype=torch.bool, device=device)

    def choose(self, scores_AV: Tensor, rows_A: Tensor, position: int, done_A: Tensor | None = None) -> Tensor:
        """The next token of each row, [A]. done_A: rows whose tokens are not used; nothing is noted of them."""
        tokens_A = scores_AV.argmax(-1)
        self._note(scores_AV.gather(-1, tokens_A.unsqueeze(-1)).squeeze(-1), rows_A, done_A)
        return tokens_A

    def _note(self, values_A: Tensor, rows_A: Tensor, done_A: Tensor | None) -> None:
        bad_A = ~values_A.isfinite()
        self.non_finite_R[rows_A] |= bad_A if done_A is None else bad_A & ~done_A

    def check(self) -> None:
        """Raises NonFiniteLogits if any row had them; the only device sync."""
        if rows := self.non_finite_R.nonzero().flatten().tolist():
            raise NonFiniteLogits(rows)


class Draws(Greedy):
    """Samples with one uniform number in [0, 1) per row and position; a row's numbers depend on its key alone."""

    def __init__(self, keys: list[str], positions: int, device: torch.device):
        super().__init__(len(keys), device)
        table = [uniforms(key, positions) for key in keys]
        self.table_RC = torch.from_numpy(numpy.stack(table)).to(device)

    def choose(self, scores_AV: Tensor, rows_A: Tensor, position: int, done_A: Tensor | None = None) -> Tensor:
        """Sample from softmax(scores) for each row by inverse transform: the token at which the cumulative probability
        exceeds the row's number, [A]. In fp64, so that summing over a large vocabulary is accurate."""
        cumulated_AV = scores_AV.softmax(-1).cumsum(-1, dtype=torch.float64)
        self._note(cumulated_AV[:, -1], rows_A, done_A)
        thresholds_A1 = self.table_RC[rows_A, position].unsqueeze(-1) * cumulated_AV[:, -1:]
        tokens_A = torch.searchsorted(cumulated_AV, thresholds_A1, right=True).squeeze(-1)
        return tokens_A.clamp_(max=scores_AV.shape[-1] - 1)  # for NaN rows searchsorted returns V


def uniforms(key: str, count: int) -> numpy.ndarray:
    """Numbers in [0, 1), a pure function of the key, [count]."""
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest(), "little")
    return (numpy.random.Philox(key=seed).random_raw(count) >> 11) * 2.0**-53
