"""Data loaders for transformers' loop: scheduled micro-batches in training, and complete batches in evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import datasets
from torch.utils.data import DataLoader, Dataset, Sampler

from sdft_ds.data.schedule import Schedule, ScheduledBatch


class _EpochSampler(Sampler):
    """A batch sampler over the schedule's items. transformers calls `set_epoch` through `.batch_sampler`, whether this
    sampler is the loader's own or wrapped by the one that skips trained batches after a resume."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.current_epoch = 0

    @property
    def batch_sampler(self) -> "_EpochSampler":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[list[ScheduledBatch]]:
        return ([item] for item in self.schedule.epoch(self.current_epoch))


class _Items(Dataset):
    """Returns the item itself; the rows are read when their generation batch is collected."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: ScheduledBatch) -> ScheduledBatch:
        return item


def only(items: list) -> object:
    """Collate function for batches of one item."""
    return items[0]


def data_loader(schedule: Schedule) -> DataLoader:
    """A loader that yields one ScheduledBatch per forward and backward of this rank."""
    rows = schedule.generation_batches * schedule.prompts_per_generation_batch * schedule.num_generations
    return DataLoader(_Items(rows), batch_sampler=_EpochSampler(schedule), collate_fn=only)


class EvaluationBatches:
    """The data loader interface that transformers' evaluation loop uses. make: returns all batches of this rank."""

    def __init__(self, dataset: datasets.Dataset, length: int, make: Callable[[], list[dict[str, Any]]]):
        self.dataset = dataset
        self.length = length
        self.make = make

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.make():
            yield {**batch, "batches": self.length}
