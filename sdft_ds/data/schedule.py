"""Batch schedule: which rows form which micro-batch, as a pure function of (seed, epoch).

A generation batch has `steps_per_generation` micro-batches of rows, each prompt repeated `num_generations` times, and
is used for `num_iterations` passes. Its rows are numbered across ranks; micro-batch m of rank r holds rows
m x B x W + r x B and the next B - 1 (B rows per micro-batch, W ranks), so an optimizer step covers the same rows
however they are distributed over ranks and gradient accumulation.

Anchors take a fixed share of the prompts' places, evenly spaced over the epoch; the data set's rows fill the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import count, islice
from typing import Any

import torch


@dataclass(frozen=True)
class Slot:
    """One completion to sample: row `row` of its generation batch, for data set row `index`."""

    index: int
    row: int
    counted: bool = True  # False: a duplicate that only keeps the ranks in step
    anchor: bool = False  # index is a row of the anchors


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
    anchors: int = 0  # rows
    anchor_share: Fraction = Fraction(0)  # of the prompts

    @property
    def prompts_per_generation_batch(self) -> int:
        return self.batch_size * self.world_size * self.steps_per_generation // self.num_generations

    @property
    def generation_batches(self) -> int:
        """Number per epoch; the last one is padded with the epoch's first rows unless drop_last is set."""
        # The least number of places of which dataset_length are not anchors': ceil(places x (1 - share)) are not.
        places = int((self.dataset_length - 1) // (1 - self.anchor_share)) + 1
        whole, rest = divmod(places, self.prompts_per_generation_batch)
        return max(1, whole + (rest > 0 and not self.drop_last))

    def _anchors_before(self, place: int) -> int:
        """Number of anchors among an epoch's first `place` prompts."""
        return int(place * self.anchor_share)

    def __len__(self) -> int:
        """Micro-batches per epoch."""
        return self.generation_batches * self.steps_per_generation * self.num_iterations

    def epoch(self, epoch: int) -> Iterator[ScheduledBatch]:
        order = self._order(epoch)
        prompts = self.prompts_per_generation_batch
        per_epoch = self._anchors_before(self.generation_batches * prompts)
        anchors = islice(self._anchor_order(), epoch * per_epoch, None)
        for b in range(self.generation_batches):
            chosen = []
            for place in range(b * prompts, (b + 1) * prompts):
                before = self._anchors_before(place)
                is_anchor = self._anchors_before(place + 1) > before
                chosen.append((next(anchors) if is_anchor else order[(place - before) % len(order)], is_anchor))
            slots = self._slots(chosen)
            for _ in range(self.num_iterations):
                for number in range(self.steps_per_generation):
                    yield ScheduledBatch(epoch * self.generation_batches + b, number, slots)

    def _order(self, epoch: int) -> list[int]:
        return self._permutation(self.dataset_length, epoch)

    def _permutation(self, rows: int, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(rows))
        return torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed + number)).tolist()

    def _anchor_order(self) -> Iterator[int]:
        """The anchors over the whole run, pass after pass: their passes are not the data set's epochs."""
        for number in count():
            yield from self._permutation(self.anchors, number)

    def _slots(self, prompts: list[tuple[int, bool]]) -> tuple[Slot, ...]:
        """prompts: (row, whether of the anchors) of each prompt."""
        starts = ((m * self.world_size + self.rank) * self.batch_size for m in range(self.steps_per_generation))
        rows = (start + i for start in starts for i in range(self.batch_size))
        chosen = ((row, *prompts[row // self.num_generations]) for row in rows)
        return tuple(Slot(index, row, anchor=anchor) for row, index, anchor in chosen)


class Lookahead:
    """Generation batches ahead of their turn, in order, over all epochs."""

    def __init__(self, schedule: Schedule):
        self.batches = (item for epoch in count() for item in schedule.epoch(epoch))
        self.ahead: ScheduledBatch | None = None

    def batch(self, number: int) -> ScheduledBatch:
        """The first micro-batch of generation batch `number`, which never decreases from call to call."""
        while self.ahead is None or self.ahead.generation_batch < number:
            self.ahead = next(self.batches)
        return self.ahead


def for_generation_batches(batches: int, **shape: Any) -> Schedule:
    """An unshuffled epoch of `batches` generation batches: for a stream, which has no length."""
    schedule = Schedule(0, **shape)
    places = batches * schedule.prompts_per_generation_batch
    return Schedule(places - schedule._anchors_before(places), shuffle=False, **shape)


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
