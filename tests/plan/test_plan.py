import json
import re
import shlex
from pathlib import Path

import pytest

from sdft_ds.cli.arguments import resolve
from sdft_ds.plan import hardware, show
from sdft_ds.plan.__main__ import main
from sdft_ds.plan.job import ZERO_3
from sdft_ds.plan.machine import Machine
from sdft_ds.plan.step_time import weak_scaling
from sdft_ds.plan.survey import SURVEYED
from tests.helpers import tiny
from tests.plan.test_footprint import SEVEN

ROOT = Path(__file__).parents[2]
# Of the settings that the recipe of the command line brings: so that the sizes are those of docs/planning.md.
TRL = ["--recipe", "trl"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """On this CPU, outside of a job, in the repository's folder."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    monkeypatch.chdir(ROOT)


def planned(capsys, *argv: str) -> dict:
    main(["--json", *argv])
    return json.loads(capsys.readouterr().out)


def words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


def settings(command: str) -> dict:
    """What training would read from the command."""
    line = words(command)
    start = next(i for i, word in enumerate(line) if word.endswith((".py", ".sbatch")))
    return resolve(line[start + 1 :], {}).values


LINE = ["deepspeed", "--num_gpus", "2", "launch/train.py", "--deepspeed", "ds_configs/zero2.json", "--batch_size", "4",
        "--lr", "1e-5", "--bf16", "--logging_steps=5", "--dataset", "my data.jsonl", "--teacher_prompt_template",
        "{prompt} {privileged_context}"]  # fmt: skip


def test_a_training_line_is_planned_as_it_is_and_given_back(tmp_path, capsys):
    """With a launcher, aliases and settings that memory does not depend on."""
    tiny.llama().config.save_pretrained(tmp_path)
    line = [*LINE, "--model", str(tmp_path)]
    found = planned(capsys, "--memory", "80", "--", *line)
    assert found["job"]["shape"]["parameters"] == sum(param.numel() for param in tiny.llama().parameters())
    assert (found["job"]["ranks"], found["job"]["batch"], found["job"]["teacher"]) == (2, 4, "base")
    assert found["job"]["topk"] is None  # the full vocabulary, by the recipe that applies where none is named
    [given] = [option for option in found["options"] if option["given"]]
    assert found["verdict"].startswith("The line as it is (zero2) fits: ")
    assert given == found["recommended"] and given["setup"] == "zero2" and given["fits"]
    assert words(found["command"]) == [*line[:4], "--deepspeed", "ds_configs/zero2.json", *line[6:]]


def test_a_file_of_settings_and_flags_without_a_launcher(tmp_path, capsys):
    tiny.llama().config.save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path / 'model'}\nbatch_size: 4\nuse_peft: true\n")
    flags = ["--config", str(tmp_path / "run.yaml"), "--gpus", "2", "--memory", "80"]
    found = planned(capsys, *flags, "--full_logit_distillation")
    assert (found["job"]["batch"], found["job"]["tuning"], found["job"]["topk"]) == (4, "lora", 100)
    assert found["command"].startswith("deepspeed --num_gpus 2 launch/train.py")
    there = settings(found["command"])
    assert there["use_peft"] and there["per_device_train_batch_size"] == 4 and there["dataset_path"] == ["DATA"]


@pytest.mark.parametrize(
    "argv, command",
    [
        ([*TRL, "--gpus", "8", "--memory", "200"], "deepspeed --num_gpus 8 .*zero2.json"),
        # As README and launch/slurm have it for this size, on one node and on several.
        (["--gpus", "8", "--batch_size", "4"], "zero2.json"),
        (["--nodes", "4", "--gpus", "8"], "sbatch --nodes 4 launch/.*zero2.json"),
        (["--nodes", "2", "--gpus", "4"], "sbatch --nodes 2 --gpus-per-node 4 --ntasks-per-node 4 "),
        ([*TRL, "--gpus", "2"], "zero3.json"),
    ],
)
def test_the_cheapest_that_fits_is_the_one_to_run(argv, command, capsys):
    assert re.search(command, planned(capsys, "--model", "7b", *argv)["command"], re.DOTALL)


def test_a_smaller_batch_comes_first_then_an_adapter_then_offloading(capsys):
    """As many rows in a step; and where an adapter is recommended, what trains all weights is named with its price."""
    flags = ["--model", "7b", *TRL, "--gpus", "8", "--batch_size", "64"]
    large = planned(capsys, *flags, "--memory", "41")
    best = large["recommended"]
    assert best["setup"] == "zero2" and best["batch"] < 64 and best["batch"] * best["accumulation"] == 64
    assert settings(large["command"])["gradient_accumulation_steps"] == best["accumulation"]
    adapter = planned(capsys, "--model", "7b", *TRL, "--memory", "80", "--lr", "1e-5")
    assert adapter["recommended"]["tuning"] == "lora" and adapter["command"].startswith("python launch/train.py")
    [(title, instead)] = [item for item in adapter["others"].items() if "all weights" in item[0]]
    assert "113 GiB of host memory" in title and settings(instead)["deepspeed"].endswith("offload_optimizer.json")
    assert not settings(instead)["use_peft"] and any("ten times" in note for note in adapter["notes"])
    quantized = planned(capsys, "--model", "7b", *TRL, "--memory", "16", "--use_peft")
    assert quantized["recommended"]["tuning"] == "qlora" and settings(quantized["command"])["load_in_4bit"]


def test_a_line_that_does_not_fit_is_told_so_and_what_does(capsys):
    line = ["--", "deepspeed", "--num_gpus", "8", "launch/train.py", "--model", "7b", *TRL, "--batch_size", "64"]
    for config in ("zero1", "zero2", "zero3_offload"):
        flags = [*line, "--deepspeed", f"ds_configs/{config}.json", "--max_completion_length", "2048"]
        found = planned(capsys, "--memory", "41", *flags)
        assert found["verdict"].startswith(f"The line as it is ({config}) does not fit: ")
        assert found["recommended"]["fits"] and not found["recommended"]["host"]
        assert settings(found["command"])["max_completion_length"] == 2048


def test_the_hosts_memory_limits_offloading_where_it_is_known(capsys):
    flags = ["--model", "7b", *TRL, "--memory", "80"]
    fits = {
        host: [option["fits"] for option in planned(capsys, *flags, *host)["options"] if option["host"]]
        for host in ((), ("--host_memory", "200"), ("--host_memory", "10"))
    }
    assert [all(each) for each in fits.values()] == [True, True, False]
    needed = planned(capsys, "--model", "70b", *TRL, "--memory", "40")
    assert needed["recommended"]["host"] and any("not known here" in note for note in needed["notes"])


def test_70b_needs_vllm_on_four_nodes_and_an_adapter_on_one(capsys):
    four = planned(capsys, "--model", "70b", "--gpus", "8", "--nodes", "4")
    assert re.search("sbatch --nodes 4 .*zero3.json.*--use_vllm.*_enable_sleep_mode", four["command"], re.DOTALL)
    one = planned(capsys, "--model", "70b", "--gpus", "8")
    assert one["recommended"]["tuning"] == "lora" and "zero3.json" in one["command"]


def test_rollouts_by_vllm_are_offered_with_their_share(capsys):
    found = planned(capsys, "--model", "7b", "--gpus", "8")
    [(title, flags)] = [item for item in found["others"].items() if "vLLM" in item[0]]
    share = float(re.search(r"vllm_gpu_memory_utilization ([\d.]+)", flags)[1])
    assert f"{share * 80:.3g} GiB" in title and 0 < share < 0.9
    [offered] = [option for option in found["options"] if option["vllm"]]
    assert offered["fits"] and offered["setup"] == "zero2 + vLLM" != found["recommended"]["setup"]


def test_rows_that_do_not_fit_are_generated_one_part_after_the_other(capsys):
    """Half of what is free, as in training, unless rollout_batch_tokens says it; then that is in the command."""
    many = ["--model", "7b", *TRL, "--gpus", "8", "--overhead", "6", "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "64"]  # fmt: skip
    caches = [
        planned(capsys, *many, "--memory", memory, *tokens)["options"][-2]["parts"]["KV cache"] / 2**30
        for memory, *tokens in (["4000"], ["80"], ["160"], ["80", "--rollout_batch_tokens", "3072"])
    ]
    whole, half, more, few = caches
    assert few < 10 < half < 40 < more <= whole == 128 * 768 * 2**19 * (1 + 1 / 32) / 2**30
    found = planned(capsys, *many, "--rollout_batch_tokens", "3072")
    assert "--rollout_batch_tokens 3072" in found["command"] and found["recommended"]["fits"]


@pytest.mark.parametrize(
    "argv, advice",
    [
        (["7b", "--memory", "5", "--overhead", "1", "--host_memory", "5"], "nodes it does|Lower per_device"),
        (["405b", "--gpus", "2", "--memory", "60", "--host_memory", "10"], r"Nothing fits. On \d+ nodes it does"),
    ],
)
def test_where_nothing_fits_it_says_what_would(argv, advice, capsys):
    found = planned(capsys, "--model", *argv)
    assert found["command"] is None and re.search(advice, found["advice"])
    assert not any(option["fits"] for option in found["options"])


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "Name the model"),
        (["--model", "no/such"], "no/such is neither 7b"),
        (["--model", "7b", "--load_in_4bit"], "Quantized weights.*add --use_peft"),
        (["--model", "7b", "--gpus", "0"], "gpus must be positive"),
        (["--model", "7b", "--gpus", "8", "--num_generations", "3"], "num_generations=3 does not divide the 64 rows"),
        (["--model", "7b", "--use_peft", "--lora_target_modules", "wq"], "no linear layer is called wq"),
        (["--model", "7b", "--vllm_gpu_memory_utilization", "2"], r"must be in \(0, 1\]"),
        (["--model", "7b", "--gpus", "8", "--use_vllm", "--vllm_tensor_parallel_size", "3"], "divide the 8 ranks"),
        (["--model", "7b", "--deepspeed", "no.json"], "--deepspeed no.json cannot be read"),
    ],
)
def test_a_mistake_is_one_line(argv, said):
    with pytest.raises(SystemExit, match=said) as error:
        main(argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--learning_rat", "1"], "unknown setting --learning_rat; did you mean --learning_rate?"),
        (["--teacher_model_kind", "old"], "invalid choice: 'old'"),
        (
            ["--", "deepspeed", "--num_gpus", "2", "other.py"],
            "unexpected value 'deepspeed'|unknown setting --num_gpus",
        ),
    ],
)
def test_an_unknown_setting_is_refused_as_in_training(argv, said, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    "line, nodes, gpus",
    [
        ("deepspeed launch/train.py", None, None),
        ("deepspeed --num_nodes=2 --num_gpus 4 launch/train.py", 2, 4),
        ("torchrun --nnodes 1:3 --nproc-per-node=8 launch/train.py", 3, 8),
        ("accelerate launch --num_processes 16 --num_machines 2 launch/train.py", None, 16),
        ("MASTER=n1 NODES=2 NPROC_PER_NODE=4 bash launch/multinode.sh", 2, 4),
        ("sbatch launch/slurm/train.sbatch", 2, 8),
        ("sbatch --nodes 4 --gpus-per-node=h100:4 launch/slurm/train.sbatch", 4, 4),
        ("sbatch -N 4 --gpus 16 launch/slurm/train_torchrun.sbatch", 4, 4),
        ("SERVER_NODES=2 sbatch -N 4 launch/slurm/train_vllm.sbatch", 2, 8),
    ],
)
def test_a_launcher_says_where_it_runs(line, nodes, gpus):
    assert hardware.launched(line.split()) == (nodes, gpus)


@pytest.mark.parametrize("script, setup", [("train", "zero2"), ("train_vllm", "zero3 + vLLM server")])
def test_a_job_script_brings_settings_of_its_own(script, setup, capsys):
    line = ["sbatch", f"launch/slurm/{script}.sbatch", "--model", "7b", "--dataset", "d"]
    found = planned(capsys, "--", *line)
    assert found["verdict"].startswith(f"The line as it is ({setup}) fits") and found["job"]["ranks"] == 16
    [given] = [option for option in found["options"] if option["given"]]
    assert given["setup"] == setup and words(found["command"])[:2] == line[:2]
    assert "--vllm_server_base_url" not in found["command"] and not any("server" in title for title in found["others"])


class Properties:
    name, total_memory = "NVIDIA A100-SXM4-40GB", 40 * 2**30


def test_a_machine_with_gpus_is_asked(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    monkeypatch.setattr("sdft_ds.distributed.host_memory.total", lambda: 500 * 2**30)
    here = planned(capsys, "--model", "7b")
    assert here["cluster"] | {"overhead": 0} == {
        "gpus": 4, "nodes": 1, "memory": 40, "overhead": 0, "host_memory": 500, "device": "NVIDIA A100-SXM4-40GB",
        "on_cpu": False, "assumed": False,
    }  # fmt: skip
    assert "312 TFLOP/s" in here["assumptions"] and "at 300 GB/s" in here["assumptions"]
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "102400")
    assert planned(capsys, "--model", "7b")["cluster"]["host_memory"] == 100
    Properties.name = "Some GPU"
    unknown = planned(capsys, "--model", "7b")
    assert unknown["recommended"]["seconds"] is None and "no data sheet of Some GPU" in unknown["assumptions"]
    assert planned(capsys, "--model", "7b", "--flops", "100", "--memory_bandwidth", "900")["recommended"]["seconds"]


def test_a_cpu_runs_one_process_and_no_time_is_estimated(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sdft_ds.distributed.host_memory.available", lambda: 4 * 2**30)
    tiny.llama().config.save_pretrained(tmp_path)
    found = planned(capsys, "--model", str(tmp_path))
    assert found["cluster"]["on_cpu"] and found["cluster"]["memory"] == 4
    assert found["command"].startswith("python launch/train.py") and "--deepspeed" not in found["command"]
    assert found["recommended"]["seconds"] is None and "not estimated for a CPU" in found["assumptions"]
    assert not any(option["host"] or option["vllm"] for option in found["options"])


def test_the_widest_row_has_80_columns(capsys):
    main(["--", "sbatch", "launch/slurm/train_vllm.sbatch", "--model", "70b", "--batch_size", "16"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= show.WIDTH and any(
        "zero3_offload_optimizer + vLLM server  16 x 1" in each for each in lines
    )
    assert any(each.startswith("> all    zero3 + vLLM server ") for each in lines)


@pytest.mark.parametrize("model", ["7b", "70b"])
def test_what_is_shown_is_read_in_80_columns(model, capsys):
    main(["--model", model, "--gpus", "8", "--nodes", "2", "--scaling", "--dataset", "d"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= show.WIDTH
    shown = " ".join(text.split())
    for said in ("16 GPUs on 2 nodes of 80 GiB (assumed: --memory)", "weights ", "s: seconds", "sbatch --nodes 2",
                 "Seconds of a step: rollouts", "Weak scaling", "4096", "at 50 GB/s", "of 989 TFLOP/s"):  # fmt: skip
        assert said in shown


def test_the_survey_has_a_row_for_each_model_and_way_to_train(capsys):
    main(["--survey"])
    rows = capsys.readouterr().out.splitlines()
    end = rows.index("")
    assert end == 2 + 3 * 4 and all(row.count("|") == len(SURVEYED) + 2 for row in rows[:end])
    assert re.search(r"405B full \|( - \|)+ 3", "\n".join(rows)) and "7B QLoRA | 2: " in "\n".join(rows)
    assert re.search(r"\| 3V\d: ", rows[end - 6]) and "3S16" in rows[end - 3]  # 70B, 405B
    assert len(rows[end:]) == 1 + 2 + 4 and "| - | 1 x 16 GPUs" in rows[-1]


def test_more_ranks_are_never_faster_and_compute_the_same():
    times = weak_scaling(SEVEN, ZERO_3, Machine())
    assert [time.ranks for time in times] == [8 << i for i in range(10)]
    assert len({time.computing for time in times}) == 1
    assert all(a.communicating < b.communicating for a, b in zip(times, times[1:], strict=False))
    assert all(max(time.computing, time.communicating) == time.bounds[0] < time.bounds[1] for time in times)


def test_a_faster_network_brings_the_bounds_together():
    slow, fast = (weak_scaling(SEVEN, ZERO_3, Machine(bandwidth=b, latency=0))[-1] for b in (10, 1000))
    assert fast.communicating == pytest.approx(slow.communicating / 100)
