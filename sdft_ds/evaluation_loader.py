"""The batches of an evaluation, made when the loop asks for the first: one swap of weights for all of them."""

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset


class EvaluationBatches:
    """What transformers' evaluation loop wants of a data loader. make: gives all batches of this rank."""

    def __init__(self, dataset: Dataset, length: int, make: Callable[[], list[dict[str, Any]]]):
        self.dataset = dataset
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.make():
            yield {**batch, "batches": self.length}
