"""The command line as a user types it, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sdft_ds import train
from sdft_ds.checkpoint import output_dir
from sdft_ds.demo import run as demo
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
PLAIN = [sys.executable, "launch/train.py"]
TWO_STEPS = ["--max_steps", "2", "--max_completion_length", "8", "--bf16", "false", "--report_to", "none",
             "--num_generations", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no",
             "--logging_steps", "1"]  # fmt: skip


def command(*arguments, timeout=280, check=True):
    done = subprocess.run(
        [str(a) for a in arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )  # fmt: skip
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    tiny.llama().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    rows = [{"q": f"Question {i}", "answer": f"Answer {i}", "system": "Be brief."} for i in range(6)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mapping = ["--prompt_column", "q", "--golden_response_column", "answer", "--system_column", "system"]
    return ["--model_name_or_path", folder / "model", "--dataset_path", folder / "train.jsonl", *mapping]


def test_a_model_and_data_of_ones_own(model_and_data, tmp_path):
    done = command(*PLAIN, *model_and_data, *TWO_STEPS, "--output_dir", tmp_path)
    assert f"Saved to {tmp_path}" in done.stdout and (tmp_path / "model.safetensors").exists()
    assert "No recipe was named, so facts applies" in done.stdout and "is asked to repeat each context" in done.stdout


@pytest.mark.parametrize(
    "wrong, words",
    [
        pytest.param(
            ["--distillation_alpha", "3"], "distillation_alpha must be in [0, 1], not 3.0", marks=pytest.mark.full
        ),
        pytest.param(["--learning_rat", "3"], "did you mean --learning_rate", marks=pytest.mark.full),
        pytest.param(["--resume_from_checkpoint", "nowhere"], "nowhere does not exist", marks=pytest.mark.full),
    ],
)
def test_a_mistake_is_one_line_and_a_status(model_and_data, tmp_path, wrong, words):
    done = command(*PLAIN, *model_and_data, *TWO_STEPS, "--output_dir", tmp_path, *wrong, check=False)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_there(model_and_data, tmp_path):
    flags = [*map(str, model_and_data), *TWO_STEPS, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        train.main([*flags, "--resume_from_checkpoint", "nowhere"])


def test_of_a_template_of_ones_own_nothing_is_said(model_and_data, tmp_path, capsys):
    own = ["--teacher_prompt_template", "{privileged_context}\n\n{prompt}", "--resume_from_checkpoint", "nowhere"]
    with pytest.raises(SystemExit):
        train.main([*map(str, model_and_data), *TWO_STEPS, "--output_dir", str(tmp_path), *own])
    said = capsys.readouterr().out
    assert "No recipe was named, so facts applies" in said and "repeat each context" not in said


def test_a_call_from_a_program_with_other_arguments(model_and_data, tmp_path, monkeypatch):
    """In a worker that multiprocessing spawned, the arguments are the parent's and the command the worker's own."""
    monkeypatch.setattr(sys, "argv", ["parent.py", "--jobs", "2", "--output", "folder"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "spawn_main()"])
    flags = [*map(str, model_and_data), *TWO_STEPS, "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="nowhere does not exist"):
        train.main([*flags, "--resume_from_checkpoint", "nowhere"])


def test_a_finished_run_that_is_started_again_only_writes_its_end(model_and_data, tmp_path, monkeypatch, capsys):
    """As a job that is requeued: also what was lost between the last step and the end. Without a resume it is refused,
    before a model is loaded."""
    flags = [*map(str, model_and_data), *TWO_STEPS, "--save_strategy", "steps", "--output_dir", str(tmp_path)]
    train.main(flags)
    weights, log = ((tmp_path / name).read_bytes() for name in ("model.safetensors", "metrics.jsonl"))
    (tmp_path / "model.safetensors").unlink()
    capsys.readouterr()
    train.main([*flags, "--resume_from_checkpoint", "true"])
    assert "All 2 steps are done: nothing is left to train. Raise max_steps to train on." in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").read_bytes() == weights and (
        tmp_path / "metrics.jsonl"
    ).read_bytes() == log
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(output_dir, "_begun", set())  # as in another process
    monkeypatch.setattr(train, "_trainer", lambda *args: pytest.fail("a model was loaded"))
    with pytest.raises(SystemExit, match="holds checkpoints of an earlier run, the newest checkpoint-2"):
        train.main(flags)


@pytest.mark.full
def test_a_deepspeed_configuration_that_contradicts_the_flags(model_and_data, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{"train_micro_batch_size_per_gpu": 3, "zero_optimization": {"stage": 2}}')
    flags = ["--deepspeed", config, "--output_dir", tmp_path]
    done = command(*PLAIN, *model_and_data, *TWO_STEPS, *flags, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ds train_micro_batch_size_per_gpu=3 vs hf per_device_train_batch_size=2. Write" in done.stderr


@pytest.mark.full
def test_what_a_run_saved_of_its_settings_starts_it_again(model_and_data, tmp_path):
    flags = [*TWO_STEPS, "--learning_rate", "1e-3", "--bad_rows", "skip"]
    done = command(*PLAIN, *model_and_data, *flags, "--output_dir", tmp_path / "first")
    assert done.stdout.count("learning_rate: 0.001") == 1 and "bad_rows: skip" in done.stdout
    saved = tmp_path / "first" / "config.yaml"
    command(*PLAIN, "--config", saved, "--output_dir", tmp_path / "second")
    first, second = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("first", "second"))
    assert second == first | {"output_dir": str(tmp_path / "second")}
    weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("first", "second")]
    assert weights[0] == weights[1]


def test_the_demo_teaches_and_keeps(tmp_path, monkeypatch, capsys):
    """The default run, and one baseline beside it, of one step."""
    monkeypatch.setattr(demo, "BASELINES", {"sft": ["--method", "sft", "--max_steps", "1"]})
    train.main(["--output_dir", str(tmp_path)])
    figures = json.loads((tmp_path / "lessons.json").read_text())
    assert [*figures] == ["before", "sdft", "sft"] and figures["sft"]["new_trained"] <= 0.5
    assert figures["before"]["new_trained"] <= 0.10 and figures["before"]["old"] >= 0.97
    assert figures["sdft"]["new_trained"] >= 0.95 and figures["sdft"]["new_held_out"] >= 0.95
    assert figures["sdft"]["old"] >= 0.97
    said = capsys.readouterr().out
    assert "old facts" in said and "supervised fine-tuning kept" in said and f"Saved to {tmp_path}" in said


@pytest.mark.full
def test_the_demo_beside_its_baselines(tmp_path):
    """The default run, whole: what it promises in its table holds."""
    done = command(*PLAIN, "--output_dir", tmp_path)
    figures = json.loads((tmp_path / "lessons.json").read_text())
    assert figures["before"]["new_trained"] <= 0.10 and figures["before"]["old"] >= 0.97
    assert figures["sdft"]["new_trained"] >= 0.95 and figures["sdft"]["new_held_out"] >= 0.95
    assert figures["sdft"]["old"] >= 0.97
    assert figures["sft"]["old"] < figures["sdft"]["old"]
    assert "old facts" in done.stdout and f"Saved to {tmp_path}" in done.stdout


@pytest.mark.full
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_demo_holds_on_other_seeds(tmp_path, seed):
    command(*PLAIN, "--output_dir", tmp_path, "--seed", seed)
    figures = json.loads((tmp_path / "lessons.json").read_text())
    assert min(figures["sdft"][group] for group in ("new_trained", "new_held_out")) >= 0.95
    assert figures["sdft"]["old"] >= 0.97


WAYS = {
    "deepspeed": [DEEPSPEED, "launch/train.py", "--deepspeed", "ds_configs/zero3.json"],
    "deepspeed, two ranks": [DEEPSPEED, "--num_gpus", "2", "launch/train.py", "--deepspeed", "ds_configs/zero2.json"],
    "python under DeepSpeed": [*PLAIN, "--deepspeed", "ds_configs/zero1.json"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "launch/train.py"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1",
                   "launch/train.py"],
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_every_launcher_trains_the_demo(tmp_path, way):
    """A few steps of it; each ends with its table and a model."""
    done = command(*way, "--output_dir", tmp_path, "--max_steps", "4")
    assert "old facts" in done.stdout and (tmp_path / "model.safetensors").exists()
