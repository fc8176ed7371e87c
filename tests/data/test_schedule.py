import itertools
from collections import Counter
from fractions import Fraction

import pytest

from sdft_ds.data.schedule import Schedule, evaluation_batches, for_generation_batches
from sdft_ds.loop.loaders import data_loader


def schedule(**changes):
    settings = {"dataset_length": 10, "batch_size": 2, "rank": 0, "world_size": 1, "num_generations": 2, "seed": 3}
    return Schedule(**{**settings, **changes})


def rows_of_step(schedules, accumulation, step):
    """(data set row, number) of every completion of optimizer step `step`, over the ranks."""
    rows = []
    for one in schedules:
        items = list(one.epoch(0))[step * accumulation : (step + 1) * accumulation]
        for item in items:
            start = item.number * one.batch_size
            rows += [(item.generation_batch, s.index, s.row) for s in item.slots[start : start + one.batch_size]]
    return sorted(rows)


@pytest.mark.parametrize("steps_per_generation, accumulation", [(4, 4), (4, 2), (8, 4), (2, 4)])
def test_an_optimizer_step_holds_the_same_rows_however_they_are_spread(steps_per_generation, accumulation):
    one = [schedule(steps_per_generation=steps_per_generation)]
    two = [schedule(steps_per_generation=steps_per_generation // 2, world_size=2, rank=rank) for rank in (0, 1)]
    for step in range(2):
        assert rows_of_step(one, accumulation, step) == rows_of_step(two, accumulation // 2, step)


def test_prompts_repeat_for_their_generations_in_a_row():
    slots = next(schedule(steps_per_generation=2).epoch(0)).slots
    assert [slot.row for slot in slots] == [0, 1, 2, 3]
    assert slots[0].index == slots[1].index and slots[2].index == slots[3].index != slots[0].index


def test_an_epoch_covers_every_row_and_fills_the_last_batch_from_its_beginning():
    one = schedule(steps_per_generation=4, num_iterations=1)  # 4 prompts a generation batch, 10 rows
    batches = list(itertools.islice(one.epoch(0), 0, None, 4))
    seen = Counter(slot.index for item in batches for slot in item.slots)
    assert len(batches) == 3 and set(seen) == set(range(10)) and sorted(seen.values()) == [2] * 8 + [4] * 2
    assert [s.index for s in batches[2].slots[4:]] == [s.index for s in batches[0].slots[:4]]
    assert schedule(steps_per_generation=4, drop_last=True).generation_batches == 2


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_one_row_trains_on_any_number_of_ranks(world_size):
    for rank in range(world_size):
        one = schedule(dataset_length=1, world_size=world_size, rank=rank, steps_per_generation=2)
        assert len(one) == 2 and {slot.index for item in one.epoch(0) for slot in item.slots} == {0}


def test_iterations_pass_over_the_generation_batch_again():
    items = list(schedule(steps_per_generation=2, num_iterations=2).epoch(1))
    assert [item.number for item in items[:4]] == [0, 1, 0, 1]
    assert len({item.generation_batch for item in items[:4]}) == 1
    assert items[0].generation_batch == schedule(steps_per_generation=2).generation_batches


def test_order_is_a_function_of_seed_and_epoch():
    order = lambda one, epoch: [slot.index for item in one.epoch(epoch) for slot in item.slots]  # noqa: E731
    assert order(schedule(), 1) == order(schedule(), 1)
    assert order(schedule(), 0) != order(schedule(), 1)
    assert order(schedule(seed=3), 0) != order(schedule(seed=4), 0)
    assert order(schedule(shuffle=False), 5)[::2] == list(range(10))


def test_loader_follows_the_epoch_also_when_its_beginning_is_skipped():
    from accelerate import skip_first_batches

    one = schedule(steps_per_generation=2)
    loader = data_loader(one)
    loader.batch_sampler.batch_sampler.set_epoch(1)
    assert list(loader) == list(one.epoch(1)) and len(loader) == len(one)
    skipping = skip_first_batches(data_loader(one), 3)
    skipping.batch_sampler.batch_sampler.set_epoch(1)
    assert list(skipping) == list(one.epoch(1))[3:]


def test_evaluation_counts_every_row_once_and_keeps_the_ranks_in_step():
    ranks = [evaluation_batches(5, 4, rank, 2, num_generations=2) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [2, 2]
    slots = [slot for batches in ranks for batch in batches for slot in batch]
    counted = Counter(slot.index for slot in slots if slot.counted)
    assert counted == {i: 2 for i in range(5)} and len(slots) == 16


# ---- anchors --------------------------------------------------------------------------------------------------------


def anchored(**changes):
    return schedule(**{"anchors": 7, "anchor_share": Fraction(1, 4), "num_generations": 1, **changes})


def prompts_of(one, epoch):
    """(index, whether an anchor) of each prompt of an epoch, in order, on one rank with a single generation."""
    items = [item for item in one.epoch(epoch) if item.number == 0]
    return [(slot.index, slot.anchor) for item in items for slot in item.slots]


def test_anchors_are_evenly_spaced_and_every_row_is_seen():
    prompts = prompts_of(anchored(dataset_length=12, batch_size=8, steps_per_generation=1), epoch=0)
    assert [is_anchor for _, is_anchor in prompts] == [False, False, False, True] * 4
    assert sorted(index for index, is_anchor in prompts if not is_anchor) == list(range(12))


def test_the_anchors_go_on_where_the_last_epoch_ended():
    one = anchored(dataset_length=12, batch_size=8)
    indices = [index for epoch in range(4) for index, is_anchor in prompts_of(one, epoch) if is_anchor]
    assert len(indices) == 16
    assert sorted(indices[:7]) == sorted(indices[7:14]) == list(range(7)) and indices[:7] != indices[7:14]


@pytest.mark.parametrize("share", [Fraction(1, 3), Fraction(2, 5), Fraction(1, 10), Fraction(9, 10)])
@pytest.mark.parametrize("length", [1, 5, 16])
def test_any_share_covers_the_rows_in_the_fewest_generation_batches(share, length):
    one = anchored(dataset_length=length, anchor_share=share, batch_size=4)
    prompts = prompts_of(one, epoch=0)
    assert {index for index, is_anchor in prompts if not is_anchor} == set(range(length))
    assert sum(is_anchor for _, is_anchor in prompts) == int(len(prompts) * share)
    without_last = prompts[: -one.prompts_per_generation_batch]
    assert sum(not is_anchor for _, is_anchor in without_last) < length


def test_ranks_hold_the_same_anchors_together_as_one_alone():
    one = anchored(batch_size=8)
    two = [anchored(batch_size=4, world_size=2, rank=rank) for rank in (0, 1)]
    together = {(i.generation_batch, s.row, s.index, s.anchor) for each in two for i in each.epoch(0) for s in i.slots}
    assert together == {(i.generation_batch, s.row, s.index, s.anchor) for i in one.epoch(0) for s in i.slots}
    assert any(anchor for *_, anchor in together)


def test_a_stream_is_read_in_order_between_the_anchors():
    shape = {"batch_size": 4, "rank": 0, "world_size": 1, "num_generations": 1}
    one = for_generation_batches(3, **shape, anchors=2, anchor_share=Fraction(1, 4))
    prompts = prompts_of(one, epoch=0)
    assert [index for index, is_anchor in prompts if not is_anchor] == list(range(9))
    assert [index for index, is_anchor in prompts if is_anchor] == [0, 1, 0] and len(prompts) == 12
