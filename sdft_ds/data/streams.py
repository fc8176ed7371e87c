"""Streaming data sets (IterableDataset): read forward only, row by row, restarting at the end.

Every rank reads all rows and uses its own, so ranks agree on the order and no row is used twice; a resumed run
continues by skipping the rows already used.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from datasets import IterableDataset

from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import DataError, check_columns
from sdft_ds.data.validation import BadRows, RowValidator, name_of


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Convert any error raised inside to a DataError that names the data set: readers raise many types of errors."""
    try:
        yield
    except DataError as error:
        told = str(error)
        raise DataError(told if told.startswith(where) else f"{where} cannot be read: {told}") from None
    except Exception as error:
        first = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise DataError(f"{where} cannot be read: {type(first).__name__}: {' '.join(str(first).split())}") from error


class Stream:
    """Row `i` of the stream as `stream[i]`, for non-decreasing i.

    Skipped rows (see validation.py) are not counted; bad ones are warned about, and their limit is per pass. Raises
    DataError for a bad row under bad_rows='error', and for a stream without any valid row.
    """

    def __init__(self, dataset: IterableDataset, builder: PromptBuilder, bad_rows: BadRows):
        self.dataset = dataset
        looking = copy(builder)  # truncation is counted when the row is used, not here
        looking.counts = Counter()
        self.screen = RowValidator(name_of(dataset, "train_dataset"), looking, bad_rows)
        self.rewind()

    def rewind(self) -> None:
        """Back to the beginning, for another run."""
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
        screen, passes = self.screen, 0
        while True:
            used, screen.reasons = 0, []
            self.dataset.set_epoch(passes)
            for index, row in enumerate(self._stored()):
                if passes == index == 0:
                    check_columns(list(row), context_optional=screen.builder.context_optional)
                bad = len(screen.reasons)
                # All ranks validate all rows: render prompts, which is slow, only if that can fail.
                first = passes == index == 0
                lengths = first or screen.leaves_out or screen.builder.truncation == "error"
                if screen.accepts(row, index, lengths=lengths):
                    if first:
                        for told in filter(None, [*screen.problems.told(1).values(), screen.first]):
                            warnings.warn(f"{screen.where}: {told}", stacklevel=2)
                    used += 1
                    yield row
                elif len(screen.reasons) > bad and passes == 0:
                    warnings.warn(f"{screen.where}: skipped: {screen.reasons[-1]}", stacklevel=2)
            if not used:
                raise DataError(f"{screen.where} is a stream without any usable row.")
            passes += 1

    def _stored(self) -> Iterator[dict[str, Any]]:
        with reading(self.screen.where):
            yield from self.dataset
