"""A data set that is read as a stream: forward only, row by row, from its beginning again when it ends.

Every rank reads all rows and uses its own, so that ranks agree on the order; a resumed run reads on from where it was
by skipping what was used.
"""

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset

from sdft_ds.prompts import PromptBuilder, PromptTooLong
from sdft_ds.rows import check_columns, example_from_row


class Stream:
    """Row `i` of the stream as `stream[i]`, for i that never decrease.

    With truncation='drop' rows that are too long are not counted. Raises what a row's own check raises when it comes
    to it, and ValueError for a stream without a row that can be used.
    """

    def __init__(self, dataset: IterableDataset, builder: PromptBuilder):
        self.dataset = dataset
        self.builder = builder
        self.rows = self._endless()
        self.position = -1
        self.current: dict[str, Any] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < self.position:
            raise IndexError(f"Row {index} of a stream that has gone on to {self.position}.")
        while self.position < index:
            self.current = next(self.rows)
            self.position += 1
        return self.current

    def _endless(self) -> Iterator[dict[str, Any]]:
        passes = 0
        while True:
            used = 0
            self.dataset.set_epoch(passes)
            for row in self.dataset:
                if passes == used == 0:
                    check_columns(list(row))
                if self.builder.truncation == "drop" and self._too_long(row):
                    continue
                used += 1
                yield row
            if not used:
                raise ValueError("train_dataset is a stream without a row that can be used.")
            passes += 1

    def _too_long(self, row: dict[str, Any]) -> bool:
        try:
            self.builder.build(example_from_row(row, self.position + 1), self.position + 1)
        except PromptTooLong:
            return True
        return False
