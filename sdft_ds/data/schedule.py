"""Batch schedule: which rows form which micro-batch, as a pure function of (seed, epoch).

A generation batch has `steps_per_generation` micro-batches of rows, each prompt repeated `num_generations` times, and
is used for `num_iterations` passes. Its rows are numbered across ranks; micro-batch m of rank r holds rows
m x B x W + r x B and the next B - 1 (B rows per micro-batch, W ranks), so an optimizer step covers the same rows
however they are distributed over ranks and gradient accumulation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Slot:
    """One completion to sample: row `row` of its generation batch, for data set row `index`."""

    index: int
    row: int
    counted: bool = True  # False: a duplicate that only keeps the ranks in step


@dataclass(frozen=True)
class ScheduledBatch:
    """One item of the data loader: micro-batch `number` of generation batch `generation_batch` on this rank.

    slots: this rank's slots of the full generation batch, in micro-batch order.
    """

    generation_batch: int
    number: int
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Schedule:
    """The micro-batches of an epoch on one rank."""

    dataset_length: int
    batch_size: int  # rows per micro-batch and rank
    rank: int
    world_size: int
    num_generations: int
    steps_per_generation: int = 1
    num_iterations: int = 1
    shuffle: bool = True
    drop_last: bool = False
    seed: int = 0

    @property
    def prompts_per_generation_batch(self) -> int:
        return self.batch_size * self.world_size * self.steps_per_generation // self.num_generations

    @property
    def generation_batches(self) -> int:
        """Number per epoch; the last one is padded with the epoch's first rows unless drop_last is set."""
        whole, rest = divmod(self.dataset_length, self.prompts_per_generation_batch)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return self.generation_batches * self.steps_per_generation * self.num_iterations

    def epoch(self, epoch: int) -> Iterator[ScheduledBatch]:
        order = self._order(epoch)
        prompts = self.prompts_per_generation_batch
        for b in range(self.generation_batches):
            slots = self._slots([order[(b * prompts + i) % len(order)] for i in range(prompts)])
            for _ in range(self.num_iterations):
                for number in range(self.steps_per_generation):
                    yield ScheduledBatch(epoch * self.generation_batches + b, number, slots)

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.dataset_length))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.dataset_length, generator=generator).tolist()

    def _slots(self, indices: list[int]) -> tuple[Slot, ...]:
        starts = ((m * self.world_size + self.rank) * self.batch_size for m in range(self.steps_per_generation))
        rows = (start + i for start in starts for i in range(self.batch_size))
        return tuple(Slot(indices[row // self.num_generations], row) for row in rows)


def for_generation_batches(count: int, **shape: Any) -> Schedule:
    """An unshuffled epoch of `count` generation batches: for a stream, which has no length."""
    prompts = Schedule(0, **shape).prompts_per_generation_batch
    return Schedule(count * prompts, shuffle=False, **shape)


def evaluation_batches(
    dataset_length: int, batch_size: int, rank: int, world_size: int, num_generations: int
) -> list[tuple[Slot, ...]]:
    """Every row `num_generations` times, in order, in equally many batches of equal size on every rank.

    Padding rows of the last batches are not counted.
    """
    total = dataset_length * num_generations
    batches = -(-total // (batch_size * world_size))
    return [
        tuple(
            Slot(min(row, total - 1) // num_generations, row, counted=row < total)
            for row in range((b * world_size + rank) * batch_size, (b * world_size + rank + 1) * batch_size)
        )
        for b in range(batches)
    ]
