"""Whatever a rank's rows are, it makes the collectives that the others make: hundreds of random cases on real engines.

A rank that does otherwise is found at the first collective in which it differs, not by waiting for it.
"""

import time

import pytest

from tests.distributed.scenarios import uneven_ranks

LAYER_BY_LAYER = {"ds3_gather_for_generation": False}
# (stage, settings, cases of the fast set, further ones with --full); fewer where no forward is a collective.
ENGINES = [
    (None, {}, 8, 200),
    (0, {}, 8, 200),
    (1, {}, 8, 200),
    (2, {"teacher_model_kind": "base"}, 24, 400),
    (3, {"teacher_model_kind": "ema", "teacher_sync_steps": 1}, 60, 1000),
    (3, LAYER_BY_LAYER, 40, 800),
    (3, {"lora": True, "teacher_model_kind": "base"}, 0, 200),
]
CASES = [(stage, settings, range(fast)) for stage, settings, fast, _ in ENGINES if fast]
CASES += [
    pytest.param(stage, settings, range(start, min(start + 200, fast + more)), marks=pytest.mark.full)
    for stage, settings, fast, more in ENGINES
    for start in range(fast, fast + more, 200)
]


@pytest.mark.parametrize("stage, settings, cases", CASES)
def test_all_ranks_make_the_same_collectives(two_ranks, tmp_path, stage, settings, cases):
    board = str(tmp_path / "board")
    one, other = two_ranks.run(uneven_ranks.same_collectives, stage, board, cases, timeout=300, **settings)
    assert one["done"] == other["done"] and len(one["done"]) == len(cases)
    assert len(cases) < 40 or set(one["done"]) == set(uneven_ranks.KINDS)
    assert one["collectives"] == other["collectives"] > 0
    assert one["finite"] and other["finite"]
    # Or it would show nothing: the ranks' own rows need batches of another number.
    assert sum(a != b for a, b in zip(one["alone"], other["alone"], strict=True)) > len(cases) // 5


def test_a_rank_that_makes_one_forward_more_is_found_at_once(two_ranks, tmp_path):
    start = time.monotonic()
    one, other = two_ranks.run(uneven_ranks.forwards_of_one_rank_more, 3, str(tmp_path / "board"), timeout=60)
    assert "rank 0 is at" in one and "rank 1 is at" in other and "gather" in one + other
    assert time.monotonic() - start < 30
