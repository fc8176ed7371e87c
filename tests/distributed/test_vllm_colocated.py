"""Rollouts by vLLM in the training processes, with a real engine."""

import importlib.util

import pytest

from tests.distributed.scenarios import vllm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: bash launch/vllm_environment.sh"
)
REPEATED = [(None, False), (None, True), (0, False), (0, True), (2, True), (3, False), (3, "on the head"),
            (3, "head saved")]  # fmt: skip
CASES = [(2, False), (3, True), *(pytest.param(*case, marks=pytest.mark.full) for case in REPEATED)]


@pytest.mark.parametrize("stage, lora", CASES, ids=str)
def test_greedy_steps_equal_those_of_local_rollouts(two_ranks, stage, lora):
    local = two_ranks.run(vllm.steps, stage, lora)
    by_vllm = two_ranks.run(vllm.steps, stage, lora, use_vllm=True, vllm_gpu_memory_utilization=0.1)
    for ours, theirs in zip(local, by_vllm, strict=True):
        assert theirs["completions"] == ours["completions"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert theirs["random"] == ours["random"]  # vLLM leaves the generators as they were
        assert max(theirs["logprob_diff"]) < 1e-4
    assert local[0]["completions"] != local[1]["completions"]
    assert len(set(local[0]["losses"])) == 3


@pytest.mark.parametrize("stage, lora", CASES, ids=str)
def test_after_each_push_the_engine_has_all_of_the_students_weights(two_ranks, stage, lora):
    for of_rank in two_ranks.run(vllm.pushes, stage, lora, timeout=240):
        assert len(of_rank) == 3
        for after_push in of_rank:
            assert max(after_push.values()) < 1e-6, after_push


SAMPLED = {"generation_kwargs": {"do_sample": True}}


def test_one_rank_and_two_sample_the_same_completions(one_rank, two_ranks):
    settings = {**SAMPLED, **vllm.VLLM, "max_steps": 2}
    (alone,) = one_rank.run(vllm.steps, None, per_device_train_batch_size=4, **settings)
    both = two_ranks.run(vllm.steps, 3, **settings)
    whole = [sorted(map(without_padding, step)) for step in alone["completions"]]
    assert whole == [
        sorted(map(without_padding, a + b)) for a, b in zip(*(r["completions"] for r in both), strict=True)
    ]
    assert both[0]["completions"] != both[1]["completions"]
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def without_padding(ids):
    return [token for token in ids if token != 257]


@pytest.mark.full
@pytest.mark.parametrize("stage", [None, 3])
def test_a_resume_within_a_generation_batch_is_exact(two_ranks, tmp_path, stage):
    settings = {**SAMPLED, **vllm.VLLM}
    whole = two_ranks.run(vllm.interrupted, stage, str(tmp_path), False, timeout=240, **settings)
    rest = two_ranks.run(vllm.interrupted, stage, str(tmp_path), True, timeout=240, **settings)
    for before, after in zip(whole, rest, strict=True):
        assert after["losses"] == before["losses"][3:]
        assert after["weights"].equal(before["weights"])


@pytest.mark.full
def test_two_ranks_share_an_engine(two_ranks):
    local = two_ranks.run(vllm.steps, 3)
    shared = two_ranks.run(vllm.steps, 3, vllm_tensor_parallel_size=2, timeout=240, **vllm.VLLM)
    for ours, theirs in zip(local, shared, strict=True):
        assert theirs["completions"] == ours["completions"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-4)


@pytest.mark.full
def test_a_closed_engine_leaves_no_memory_behind(one_rank):
    (sizes,) = one_rank.run(vllm.memory_of_runs, 3, timeout=240)
    assert sizes[2] - sizes[0] < 0.5  # GiB; a KV cache is 1


@pytest.mark.full
def test_logits_that_are_not_numbers_end_the_run_by_name(two_ranks):
    with pytest.raises(AssertionError, match="logits are NaN or infinite in the rollout of train/1, rows 0, 1, 2, 3"):
        two_ranks.run(vllm.steps_with_a_nan, **vllm.VLLM)
