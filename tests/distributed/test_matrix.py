"""The smallest set of cells that covers every pair of settings: on persistent workers, and through the command line.

`python -m benchmarks.matrix` runs all 504.
"""

import itertools
import json
import math
import sys

import pytest

from benchmarks.matrix import ADAPTERS, KINDS, STAGES, cell, is_right, pairs_of, pairwise, save_tiny
from tests.cli.test_train import DEEPSPEED, command
from tests.helpers import tiny

FACTORS = [STAGES, ADAPTERS, KINDS, [False, True], [1, 2], [False, True]]


CELLS = pairwise(FACTORS)
NAMES = ["-".join(map(str, chosen)) for chosen in CELLS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(str(folder))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.rows())))
    return folder


def test_the_set_is_small_and_covers_every_pair():
    assert set().union(*map(pairs_of, CELLS)) == set().union(*map(pairs_of, itertools.product(*FACTORS)))
    assert len(CELLS) < 30


# An offloaded optimizer's operator is compiled at its first use, which takes minutes.
MARKED = [pytest.param(each, marks=pytest.mark.full if "offload" in each[0] else []) for each in CELLS]


@pytest.mark.parametrize("chosen", MARKED, ids=NAMES)
def test_on_workers(one_rank, two_ranks, folder, chosen):
    stage, adapter, kind, checkpointing, ranks, bf16 = chosen
    reference = one_rank.run(cell, "none", adapter, kind, False, bf16, str(folder))[0]
    workers = {1: one_rank, 2: two_ranks}[ranks]
    for found in workers.run(cell, stage, adapter, kind, checkpointing, bf16, str(folder)):
        assert is_right(found, reference, bf16), (found, reference)


def test_what_is_right_in_bf16_depends_on_what_was_sampled():
    reference = ([1.0, 2.0], [[1], [2], [3], [4]])
    assert is_right(([1.04, 9.0], [[4], [3], [2], [1]]), reference, True)
    assert not is_right(([1.06, 2.0], [[1], [2], [3], [4]]), reference, True)
    assert is_right(([1.2, 2.0], [[1], [2], [3], [5]]), reference, True)
    assert not is_right(([1.3, 2.0], [[1], [2], [3], [5]]), reference, True)
    assert not is_right(([1.0, math.nan], [[1], [2], [3], [4]]), reference, True)


@pytest.mark.full
@pytest.mark.parametrize("chosen", CELLS, ids=NAMES)
def test_through_the_command_line_and_resumed(folder, tmp_path, chosen):
    stage, adapter, kind, checkpointing, ranks, bf16 = chosen
    flags = [
        "--model_name_or_path", folder, "--dataset_path", folder / "rows.jsonl", "--output_dir", tmp_path,
        "--teacher_model_kind", kind, "--activation_checkpointing", checkpointing, "--bf16", bf16,
        "--num_generations", 2, "--per_device_train_batch_size", 2, "--max_completion_length", 8,
        "--logging_steps", 1,
        "--report_to", "none", "--teacher_sync_steps", 1, "--save_strategy", "steps", "--save_steps", 2,
        *(["--deepspeed", f"ds_configs/{stage}.json"] if stage != "none" else []),
        *(["--use_peft", "--lora_target_modules", "all-linear"] if adapter != "full" else []),
        *(["--load_in_4bit"] if adapter == "QLoRA" else []),
    ]  # fmt: skip
    launcher = [DEEPSPEED, "--num_gpus", ranks, "launch/train.py"]
    command(*launcher, *flags, "--max_steps", 2)
    command(*launcher, *flags, "--max_steps", 3, "--resume_from_checkpoint", "true")
    saved = "adapter_model.safetensors" if adapter != "full" else "model.safetensors"
    assert (tmp_path / saved).exists()
    history = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]


@pytest.mark.full
def test_what_cannot_work_is_refused_at_start(folder, tmp_path):
    flags = ["--model_name_or_path", folder, "--dataset_path", folder / "rows.jsonl", "--output_dir", tmp_path]
    refusals = {
        "8-bit weights cannot be sharded by ZeRO-3: use --load_in_4bit": [
            "--load_in_8bit", "--use_peft", "--deepspeed", "ds_configs/zero3.json",
        ],
        "Quantized weights cannot be trained: add --use_peft": ["--load_in_4bit"],
        "leave ds3_gather_for_generation=True": [
            "--rollout_backend", "continuous", "--ds3_gather_for_generation", "false",
        ],
    }  # fmt: skip
    for words, more in refusals.items():
        done = command(sys.executable, "launch/train.py", *flags, *more, check=False)
        assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr, done.stderr
