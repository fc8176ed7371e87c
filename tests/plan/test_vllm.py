"""What the plan says about rollouts by vLLM."""

import re
from dataclasses import replace

import pytest

from sdft_ds.plan import step_time, vllm
from sdft_ds.plan.footprint import PHASES, PUSH, footprint
from sdft_ds.plan.job import ZERO_2, ZERO_3, Job, Vllm
from sdft_ds.plan.machine import Machine
from sdft_ds.plan.model_shape import load_shape
from tests.plan.test_plan import TRL, elsewhere, planned, settings  # noqa: F401 (a fixture)

GIB = 1 << 30
SEVENTY = Job(load_shape("70b"), ranks=64)
ENGINE = Vllm(0.5 * 80 * GIB, 768, parallel=4)


def phases(engine: Vllm, setup=ZERO_3) -> dict[str, dict[str, float]]:
    return footprint(SEVENTY, replace(setup, vllm=engine)).phases


def held(parts: dict[str, float]) -> float:
    return parts.get("vLLM weights", 0) + parts.get("vLLM cache", 0)


def test_an_engine_holds_its_memory_in_all_phases_and_with_sleep_mode_in_rollouts_only():
    awake, sleeping = phases(ENGINE), phases(replace(ENGINE, sleeps=True))
    assert {held(parts) for parts in awake.values()} == {40 * GIB}
    assert held(sleeping["rollout"]) == 40 * GIB
    assert held(sleeping[PUSH]) == sleeping[PUSH]["vLLM weights"] == pytest.approx(2 * 70.55e9 / 4, rel=0.001)
    assert not any(held(sleeping[phase]) for phase in PHASES if phase != "rollout")


def test_a_server_costs_training_one_gathered_layer_and_its_copy():
    parts, without = phases(replace(ENGINE, colocated=False)), footprint(SEVENTY, ZERO_3).phases
    assert not any(map(held, parts.values()))
    assert parts[PUSH]["gathered weights"] == 2 * 2 * SEVENTY.shape.head  # the largest part
    assert parts["rollout"].get("gathered weights", 0) == parts["rollout"].get("KV cache", 0) == 0
    assert all(parts[phase] == without[phase] for phase in PHASES if phase != "rollout")
    stage_2 = phases(replace(ENGINE, colocated=False), ZERO_2)
    assert stage_2[PUSH]["gathered weights"] == 2 * SEVENTY.shape.head


def test_quantized_weights_are_served_in_the_compute_dtype():
    quantized = replace(SEVENTY, tuning="qlora", adapter=10**8)
    assert vllm.weights(quantized, ENGINE) == vllm.weights(SEVENTY, ENGINE)


def test_more_memory_or_gpus_complete_more_rows_at_once():
    job, little = replace(SEVENTY, batch=64), vllm.least(SEVENTY, ENGINE)
    counts = [vllm.rows_at_once(job, replace(ENGINE, memory=memory)) for memory in (little, 1.2 * little, 4 * little)]
    assert counts[0] == 1 < counts[1] < counts[2] == 4 * 64
    seconds = [
        vllm.rollout_seconds(job, replace(ENGINE, memory=memory), Machine()) for memory in (1.2 * little, 4 * little)
    ]
    assert seconds[1] < 0.7 * seconds[0]


def test_one_decode_step_reads_weights_and_cache_once():
    machine = Machine(latency=0, flops=1e9)
    job = replace(SEVENTY, batch=1, generations=1)
    read = vllm.weights(job, ENGINE) + 4 * (512 + 128) * 2 * 1024 * 80 * 2 / 4
    assert vllm.rollout_seconds(job, ENGINE, machine) == pytest.approx(256 * read / 3350e9, rel=1e-4)
    slow = replace(machine, latency=3)
    reductions = 256 * 2 * 80 * 3 * 3e-6
    assert vllm.rollout_seconds(job, ENGINE, slow) == pytest.approx(256 * read / 3350e9 + reductions, rel=1e-4)


def test_a_push_takes_as_long_as_its_slowest_link():
    lora = replace(SEVENTY, tuning="lora", adapter=10**8)
    server = replace(ENGINE, colocated=False)
    full = 2 * SEVENTY.shape.parameters
    times = {
        (job.tuning, sync): vllm.transfer_seconds(job, replace(server, sync=sync), Machine())
        for job in (SEVENTY, lora)
        for sync in ("auto", "nccl", "path")
    }
    assert times["full", "nccl"] == full / 50e9
    assert times["full", "auto"] == times["full", "path"] == 2 * full / 2e9
    assert times["lora", "auto"] == 2 * 2e8 / 2e9
    gathered = full * 63 / 64 / 50e9
    assert step_time.weights_seconds(SEVENTY, replace(ZERO_3, vllm=server), Machine()) == pytest.approx(
        gathered + 2 * full / 2e9
    )


def test_settings_are_those_of_training(capsys):
    flags = ["--use_vllm", "true", "--vllm_gpu_memory_utilization", "0.5", "--per_device_train_batch_size", "8"]
    found = planned(capsys, "--model_name_or_path", "7b", "--gpus", "8", *TRL, *flags)
    own = [option for option in found["options"] if option["tuning"] == "full"]
    assert [option["setup"] for option in own][-3:] == [
        "zero3 + vLLM", "zero3_offload_optimizer + vLLM", "zero3_offload + vLLM",
    ]  # fmt: skip
    assert all(option["vllm"]["memory"] == 40 * GIB for option in own)
    there = settings(found["command"])
    assert there["use_vllm"] and there["vllm_gpu_memory_utilization"] == 0.5 and not there["vllm_enable_sleep_mode"]
    assert there["vllm_max_model_length"] is None


def test_an_engine_that_cannot_hold_its_longest_sequence_does_not_fit(capsys):
    flags = ["--model_name_or_path", "70b", "--gpus", "8", "--nodes", "8", *TRL, "--use_vllm",
             "--vllm_tensor_parallel_size", "4", "--vllm_gpu_memory_utilization", "0.5",
             "--vllm_enable_sleep_mode"]  # fmt: skip
    found = planned(capsys, *flags)
    assert not found["options"][1]["fits"] and "does not start with less than" in found["notes"][0]
    assert found["recommended"]["changes"]["vllm_max_model_length"] == 768
    assert settings(found["command"])["vllm_max_model_length"] == 768
    found = planned(capsys, *flags, "--vllm_max_model_length", "768")
    assert "zero3.json" in found["command"] and not found["recommended"]["changes"]


def test_where_no_node_holds_the_model_servers_do(capsys):
    found = planned(capsys, "--model_name_or_path", "405b", "--gpus", "8", "--nodes", "32", "--servers", "2", *TRL)
    server = found["others"]["A server, on 16 more GPUs:"]
    assert "--tensor-parallel-size 16" in server
    servers = "--vllm_server_base_url http://HOST1:8000,http://HOST2:8000"
    assert re.search(f"--vllm_mode server.*{servers}", found["command"], re.DOTALL)
    adapter = planned(capsys, "--model", "405b", "--gpus", "8", "--nodes", "8", "--use_peft", *TRL)
    assert any("--lora-rank" in server for server in adapter["others"].values())


def test_what_is_shown_says_why_rollouts_need_vllm(capsys):
    from sdft_ds.plan.__main__ import main

    main(["--model_name_or_path", "70b", "--gpus", "8", "--nodes", "8"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "vLLM weights" in shown and "need vLLM" in shown
