"""Rollouts by a real vLLM server on the CPU, of two ranks."""

import importlib.util
import threading
import time

import pytest

from sdft_ds.checkpoint import storage
from sdft_ds.distributed.launch import free_port
from tests.distributed.scenarios import vllm, vllm_server
from tests.helpers.vllm_server import Server

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM: bash launch/vllm_environment.sh"
)


@pytest.fixture(scope="module")
def started(two_ranks, tmp_path_factory):
    made = Server(tmp_path_factory.mktemp("server"), adapters=True)
    two_ranks.run(vllm.steps, None, max_steps=1)  # the processes start meanwhile
    made.wait()
    yield made
    made.kill()


@pytest.fixture
def server(started):
    """With the weights that it starts with."""
    started.forget()
    return started


def full(*case):
    return pytest.param(*case, marks=pytest.mark.full)


CASES = [(2, False, "path"), (3, True, "adapter"), full(None, False, "path"), full(0, False, "path"),
         full(3, False, "path"), full(0, True, "path"), full(2, True, "path"), full(3, True, "path"),
         full(0, True, "adapter"), full(2, True, "adapter"), full(None, True, "auto")]  # fmt: skip


@pytest.mark.parametrize("stage, lora, sync", CASES, ids=str)
def test_greedy_steps_equal_those_of_local_rollouts(two_ranks, server, stage, lora, sync):
    local = two_ranks.run(vllm.steps, stage, lora)
    by_server = two_ranks.run(vllm.steps, stage, lora, vllm_weight_sync=sync, **server.settings)
    for ours, theirs in zip(local, by_server, strict=True):
        assert theirs["completions"] == ours["completions"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
        assert max(theirs["logprob_diff"]) < 1e-4
    assert local[0]["completions"] != local[1]["completions"]
    assert len(set(local[0]["losses"])) == 3
    assert server.version().endswith(f"-3-{'adapter' if sync == 'auto' else sync}")


@pytest.mark.parametrize("stage, lora, sync", [(3, False, "path"), full(2, True, "adapter")], ids=str)
def test_a_restarted_server_gets_the_weights_before_it_answers(two_ranks, server, stage, lora, sync):
    local = two_ranks.run(vllm.steps, stage, lora)
    settings = {"vllm_weight_sync": sync, **server.settings}
    restarted = two_ranks.run(vllm_server.steps_with_restarts, str(server.model), stage, lora, **settings)
    for ours, theirs in zip(local, restarted, strict=True):
        assert theirs["completions"] == ours["completions"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)


@pytest.mark.full
def test_two_generations_of_files_at_most_and_none_after_the_run(two_ranks, server, tmp_path):
    settings = {"vllm_weight_folder": str(tmp_path), "max_steps": 4, "vllm_weight_sync": "path", **server.settings}
    found = two_ranks.run(vllm_server.folders_while_training, 2, False, **settings)[0]
    assert found == [["weights-1"], ["weights-1", "weights-2"], ["weights-2", "weights-3"],
                     ["weights-3", "weights-4"], []]  # fmt: skip


REFUSED = {
    "temperature": ({"temperature": 0.7}, "--logprobs-mode processed_logprobs"),
    "tokenizer": ({"other_tokenizer": True}, "another tokenizer"),
    "length": ({"max_completion_length": 254}, "--max-model-len"),
    "saved head": ({"lora": "head saved", "vllm_weight_sync": "adapter"}, "modules_to_save"),
    "adapter on the head": ({"lora": "on the head", "vllm_weight_sync": "adapter"}, "on the head"),
    "untied head": ({"lora": "on the head", "vllm_weight_sync": "path"}, "out of target_modules"),
    "nccl": ({"vllm_weight_sync": "nccl"}, "--weight-transfer-config"),
    "no adapter": ({"vllm_weight_sync": "adapter"}, "the model has no adapter"),
    "unreachable": ({"vllm_server_timeout": 0.5, "vllm_server_base_url": "nowhere"}, "launch/vllm_server.sh MODEL"),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_one_line_on_every_rank(two_ranks, started, settings, message):
    here = {**started.settings, **settings}
    if here["vllm_server_base_url"] == "nowhere":
        here["vllm_server_base_url"] = f"http://127.0.0.1:{free_port()}"
    first, second = two_ranks.run(vllm_server.error, None, **here)
    assert message in first and "\n" not in first
    assert second == first


@pytest.mark.full
def test_weights_of_another_shape(two_ranks, server):
    first, second = two_ranks.run(vllm_server.error, None, narrow=True, **server.settings)
    server.kill()  # it is of no use any more
    server.start()
    server.wait()
    assert "start it again with the model that is trained" in first and "\n" not in first
    assert second == first


def test_another_runs_weights_are_noticed(two_ranks, server):
    """An adapter is served beside weights that a run has replaced."""
    two_ranks.run(vllm_server.error, None, False, **server.settings)
    refused = two_ranks.run(vllm_server.error, None, True, vllm_weight_sync="adapter", **server.settings)
    assert "start it again" in refused[0] and refused[0] == refused[1]


@pytest.mark.full
def test_a_server_that_is_killed_in_the_middle_of_a_rollout_and_started_again(two_ranks, server):
    local = two_ranks.run(vllm.steps, 3, False)

    def kill_and_start() -> None:
        while not server.version().endswith("-2-path"):
            time.sleep(0.02)
        server.kill()
        server.start()

    beside = threading.Thread(target=kill_and_start)
    beside.start()
    settings = {"vllm_server_timeout": 500, **server.settings}
    by_server = two_ranks.run(vllm.steps, 3, False, timeout=550, **settings)
    beside.join()
    for ours, theirs in zip(local, by_server, strict=True):
        assert theirs["completions"] == ours["completions"]
        assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-5)
    assert server.version().endswith("-3-path")


@pytest.mark.full
def test_a_server_that_stays_away_ends_the_run_on_every_rank(two_ranks, server, tmp_path):
    def kill() -> None:
        while not server.version().endswith("-2-path"):
            time.sleep(0.02)
        server.kill()

    beside = threading.Thread(target=kill)
    beside.start()
    settings = {"vllm_server_timeout": 3, "output_dir": str(tmp_path / "run"), "save_strategy": "steps",
                "save_steps": 1, "max_steps": 20, **server.settings}  # fmt: skip
    first, second = two_ranks.run(vllm_server.training_error, 2, **settings)
    beside.join()
    assert "resume the run from its newest checkpoint" in first and first == second
    assert storage.newest_complete(tmp_path / "run")[0] is not None
    server.start()
    server.wait()


@pytest.mark.full
def test_sigterm_during_a_rollout_saves_and_leaves(two_ranks, server, tmp_path):
    got = two_ranks.run(vllm_server.preempted_during_a_rollout, 2, str(tmp_path / "run"), **server.settings)
    assert got[0] == got[1] and got[0]["code"] not in (None, 0)
    assert storage.newest_complete(tmp_path / "run")[0].name == f"checkpoint-{got[0]['step']}"


@pytest.mark.full
def test_a_server_without_the_endpoints_for_weights(two_ranks, tmp_path):
    server = Server(tmp_path, dev_mode=False)
    server.wait()
    try:
        first, second = two_ranks.run(vllm_server.error, None, **server.settings)
    finally:
        server.kill()
    assert "VLLM_SERVER_DEV_MODE=1" in first and first == second


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A server whose weights stay as they were loaded."""
    extension = ["--worker-extension-cls", "tests.helpers.plain_weights.WeightSums"]
    made = Server(tmp_path_factory.mktemp("plain"), *extension)
    made.wait()
    yield made
    made.kill()


@pytest.mark.full
@pytest.mark.parametrize("stage, lora", [(0, False), (2, False), (3, False), (0, True), (2, True), (3, True)], ids=str)
def test_after_each_push_the_server_has_all_of_the_students_weights(two_ranks, plain, stage, lora):
    of_rank_0 = two_ranks.run(vllm_server.pushes, stage, lora, vllm_weight_sync="path", **plain.settings)[0]
    assert len(of_rank_0) == 3
    for after_push in of_rank_0:
        assert max(after_push.values()) < 1e-6, after_push


@pytest.mark.full
def test_rows_are_spread_over_two_servers(two_ranks, server, plain):
    local = two_ranks.run(vllm.steps, 2, False)
    both = {**server.settings, "vllm_server_base_url": f"{server.url},{plain.url}"}
    for ours, theirs in zip(local, two_ranks.run(vllm.steps, 2, False, **both), strict=True):
        assert theirs["completions"] == ours["completions"]
    assert all("POST /v1/completions" in each.log.read_text() for each in (server, plain))


@pytest.mark.parametrize("stage", [2, full(3), full(None)])
def test_one_batch_ahead_samples_from_the_weights_before(two_ranks, server, stage):
    settings = {"vllm_weight_sync": "path", **server.settings}
    untrained = two_ranks.run(vllm.steps, stage, learning_rate=0.0)
    on_time = two_ranks.run(vllm.steps, stage)
    ahead = two_ranks.run(vllm.steps, stage, rollout_lag=1, **settings)
    for start, now, before in zip(untrained, on_time, ahead, strict=True):
        assert before["completions"][:2] == start["completions"][:2]  # both batches are from the first weights
        assert before["completions"][2] != start["completions"][2]
        assert before["losses"][0] == pytest.approx(now["losses"][0], rel=1e-5)
        # The first batch is of the weights that train on it; later ones are corrected by the importance weight.
        assert before["logprob_diff"][0] < 1e-4 and before["logprob_diff"][1:] == [None, None]
        assert before["importance"][0] == pytest.approx(1.0, abs=1e-4)
        assert all(abs(ratio - 1.0) > 1e-3 for ratio in before["importance"][1:])
    assert on_time[0]["completions"][1] != untrained[0]["completions"][1]


@pytest.mark.full
@pytest.mark.parametrize("lag, iterations", [(0, 2), (1, 1), (1, 2)])
def test_a_resume_is_exact_with_a_batch_in_flight(two_ranks, server, tmp_path, lag, iterations):
    settings = {"rollout_lag": lag, "num_iterations": iterations, "vllm_weight_sync": "path", **server.settings}
    whole = two_ranks.run(vllm.interrupted, 2, str(tmp_path), False, **settings)
    server.forget()
    rest = two_ranks.run(vllm.interrupted, 2, str(tmp_path), True, **settings)
    in_flight = (tmp_path / "checkpoint-3" / "next-generation-batch-rank-1.json").exists()
    assert in_flight == bool(lag)
    for before, after in zip(whole, rest, strict=True):
        assert after["losses"] == before["losses"][3:]
        assert after["weights"].equal(before["weights"])


@pytest.mark.full
def test_logits_that_are_not_numbers_end_the_run_by_name(two_ranks, server):
    with pytest.raises(AssertionError, match="logits are NaN or infinite in the rollout of train/1, rows 0, 1, 2, 3"):
        two_ranks.run(vllm.steps_with_a_nan, **server.settings, vllm_weight_sync="path")
