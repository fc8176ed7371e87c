import json
import re

import pytest

from sdft_ds.cli.arguments import parse
from sdft_ds.plan.__main__ import SURVEYED, main
from sdft_ds.plan.job import ZERO_3
from sdft_ds.plan.machine import Machine
from sdft_ds.plan.traffic import weak_scaling
from tests.helpers import tiny
from tests.plan.test_footprint import SEVEN


def planned(capsys, *argv: str) -> dict:
    main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_configuration_is_planned_and_its_command_is_one_that_training_takes(tmp_path, capsys):
    tiny.llama().config.save_pretrained(tmp_path)
    flags = ["--per_device_train_batch_size", "4", "--teacher_model_kind", "ema", "--full_logit_distillation", "true"]
    found = planned(
        capsys, "--model_name_or_path", str(tmp_path), "--gpus", "2", *flags, "--use_peft", "--bf16", "false"
    )
    assert found["job"]["shape"]["parameters"] == sum(param.numel() for param in tiny.llama().parameters())
    assert all(row["fits"] for row in found["setups"])
    start, _, rest = found["command"].replace("\\\n", " ").partition(" launch/train.py ")
    assert start == "deepspeed --num_gpus 2"
    argv = [word for word in rest.split() if word not in ("--deepspeed", "ds_configs/zero2.json")]
    script, args, model = parse([*argv, "--num_generations", "1"], {})
    assert (args.per_device_train_batch_size, args.teacher_model_kind, args.bf16) == (4, "ema", False)
    assert model.use_peft and args.max_teacher_prompt_length == 2048 and model.model_name_or_path == str(tmp_path)


@pytest.mark.parametrize(
    "argv, command",
    [
        (["7b", "--memory", "200"], "deepspeed --num_gpus 8 .*zero2.json"),
        # As README and launch/slurm have it for this size, on one node and on several.
        (["7b", "--teacher_model_kind", "base", "--per_device_train_batch_size", "4"], "zero2.json"),
        (["7b", "--teacher_model_kind", "base", "--nodes", "4"], "sbatch .*zero2.json"),
        (["7b", "--gpus", "2"], "zero3.json"),
        (["7b", "--gpus", "1"], "zero3_offload_optimizer.json"),
        (["7b", "--gpus", "1", "--host_memory", "10"], None),
        (
            ["70b", "--nodes", "4"],
            "sbatch --nodes 4 launch/slurm/train.sbatch.*zero3.json.*--use_vllm true.*_enable_sleep_mode true",
        ),
    ],
)
def test_the_cheapest_that_fits_is_the_one_to_run(argv, command, capsys):
    found = planned(capsys, "--model_name_or_path", *argv)["command"]
    assert found is None if command is None else re.search(command, found, re.DOTALL)


def test_rows_that_do_not_fit_are_generated_one_part_after_the_other(capsys):
    """Half of what is free, as in training, unless rollout_batch_tokens says it; then that is in the command."""
    many = ["--model_name_or_path", "7b", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "64"]
    caches = [
        planned(capsys, *many, "--memory", memory, *tokens)["setups"][3]["parts"]["KV cache"] / 2**30
        for memory, *tokens in (["4000"], ["80"], ["160"], ["80", "--rollout_batch_tokens", "3072"])
    ]
    whole, half, more, few = caches
    assert few < 10 < half < 40 < more <= whole == 128 * 768 * 2**19 * (1 + 1 / 32) / 2**30
    found = planned(capsys, *many, "--rollout_batch_tokens", "3072")
    assert "--rollout_batch_tokens 3072" in found["command"] and found["setups"][3]["fits"]


@pytest.mark.parametrize(
    "argv, advice",
    [
        (
            ["--gpus", "1", "--memory", "40", "--host_memory", "50"],
            "With --use_peft --lora_target_modules all-linear it",
        ),
        (
            ["--gpus", "1", "--memory", "20", "--overhead", "1", "--host_memory", "5"],
            "all-linear --load_in_4bit it does",
        ),
        (["--gpus", "1", "--memory", "5", "--overhead", "1"], "Lower per_device_train_batch_size"),
    ],
)
def test_where_nothing_fits_it_says_what_would(argv, advice, capsys):
    found = planned(capsys, "--model_name_or_path", "7b", *argv)
    assert found["command"] is None and advice in found["advice"] and not any(row["fits"] for row in found["setups"])


def test_where_an_adapter_does_not_help_more_nodes_are_asked_for(capsys):
    found = planned(capsys, "--model_name_or_path", "405b", "--gpus", "2", "--memory", "60", "--host_memory", "10")
    assert re.match(r"Nothing fits. On \d+ nodes it does", found["advice"])


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], "model_name_or_path is needed"),
        (["--model_name_or_path", "no/such"], "no/such is neither 7b"),
        (["--model_name_or_path", "7b", "--load_in_4bit"], "load_in_4bit.*add --use_peft"),
        (["--model_name_or_path", "7b", "--teacher_model_kind", "old"], "teacher_model_kind must be one of live"),
        (["--model_name_or_path", "7b", "--gpus", "0"], "gpus must be at least 1"),
        (["--model_name_or_path", "7b", "--num_generations", "3"], "num_generations=3 does not divide the 64 rows"),
        (["--model_name_or_path", "7b", "--use_peft", "--lora_target_modules", "wq"], "no linear layer is called wq"),
        (["--model_name_or_path", "7b", "--vllm_mode", "remote"], "vllm_mode must be one of colocate, server"),
        (["--model_name_or_path", "7b", "--vllm_gpu_memory_utilization", "2"], r"must be in \(0, 1\]"),
        (["--model_name_or_path", "7b", "--use_vllm", "--vllm_tensor_parallel_size", "3"], "must divide the 8 ranks"),
    ],
)
def test_a_mistake_is_one_line(argv, words):
    with pytest.raises(SystemExit, match=words) as error:
        main(argv)
    assert "\n" not in str(error.value)


def test_what_is_shown_holds_the_table_the_command_and_the_assumptions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    main(["--model_name_or_path", "7b", "--scaling"])
    shown = capsys.readouterr().out
    for words in ("teacher shadow", "deepspeed --num_gpus 8", "A rank receives", "Weak scaling", "4096", "at 50 GB/s"):
        assert words in shown


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
