"""How the next token of each row is chosen: greedily, or by draws that are a function of its key and the position.

Nothing is drawn from a shared generator, so ranks, batch sizes and resumes do not change what is sampled.

Shapes: A rows that are not finished, V vocabulary.
"""

import hashlib
from typing import Any

import numpy
import torch
from torch import Tensor

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
