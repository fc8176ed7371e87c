"""A rank that keeps the others waiting is named, while they wait and afterwards; and no group waits for ever."""

import time

import pytest

from sdft_ds.distributed.watchdog import RankPhase, straggler_report
from tests.faults.runs import finish, run, start


def test_the_rank_that_is_behind_is_named():
    here, there = RankPhase(9, "teacher", 4, "n1"), RankPhase(8, "rollout", 4, "n2")
    words = "Waiting for rank 1 (host n2, in rollout of step 4); the furthest is in teacher of step 4"
    assert straggler_report([here, there, here]) == words
    assert straggler_report([here, here]) is None
    assert "and 1 more" in straggler_report([there, here, there])


def test_a_rank_that_hangs_is_named_and_ends_the_others(tmp_path):
    """ZeRO-2's groups are DeepSpeed's own: they give up after ddp_timeout as well, not after half an hour."""
    begun = time.monotonic()
    processes = start(tmp_path, 2, stage=2, faults=[("hang", "rollout", 3, 1)], ddp_timeout=12)
    code = processes[0].wait(timeout=100)
    assert code not in (0, None) and time.monotonic() - begun < 90
    processes[1].kill()
    (_, output), _ = finish(processes)
    assert "Waiting for rank 1 (host" in output and "in rollout of step 4)" in output, output


@pytest.mark.full
def test_a_quick_run_says_nothing(tmp_path):
    ended = run(tmp_path, 2, max_steps=2)
    assert all("Waiting for rank" not in output for _, output in ended)
