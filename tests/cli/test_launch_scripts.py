"""Scripts of launch/: the commands that they would run. None of these needs vLLM."""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ["launch/vllm_server.sh", "launch/slurm/train_vllm.sbatch"]


def run(script: str, *arguments: str, ok: bool = True, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")} | variables
    done = subprocess.run(["bash", script, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout if ok else done.stderr


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_is_content(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    subprocess.run(["shellcheck", "-x", script], cwd=ROOT, check=True)


def test_the_servers_command():
    [command] = commands(run("launch/vllm_server.sh", "--dry-run", "MODEL", "--port", "8001"))
    assert "VLLM_SERVER_DEV_MODE=1" in command and command[-2:] == ["--port", "8001"]
    given = dict(zip(command, command[1:], strict=False))
    assert given["--model"] == "MODEL" and given["--host"] == "127.0.0.1"
    assert given["--worker-extension-cls"] == "sdft_ds.rollouts.weight_sums.WeightSums"
    assert given["--logprobs-mode"] == "raw_logprobs"
    assert "--enable-lora" not in command


@pytest.mark.parametrize("rank, served", [("4", "8"), ("16", "16"), ("17", "32")])
def test_adapters_of_a_rank_that_vllm_knows(rank, served):
    [command] = commands(run("launch/vllm_server.sh", "--dry-run", "--lora-rank", rank, "MODEL"))
    assert command[command.index("--max-lora-rank") + 1] == served
    assert "--enable-lora" in command and "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in command


def test_a_server_on_gpus_takes_weights_by_nccl(tmp_path):
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 'GPU 0'\n")
    nvidia_smi.chmod(0o755)
    [command] = commands(run("launch/vllm_server.sh", "--dry-run", "M", PATH=f"{tmp_path}:{os.environ['PATH']}"))
    assert command[command.index("--weight-transfer-config") + 1] == '{"backend": "nccl"}'
    assert "--enforce-eager" not in command


def test_a_server_needs_a_model():
    assert "name the model first" in run("launch/vllm_server.sh", "--dry-run", ok=False)


def test_the_jobs_two_commands():
    arguments = ["--model_name_or_path", "MODEL", "--output_dir", "runs/x", "--learning_rate", "1e-5"]
    variables = {"LORA_RANK": "16", "SERVER_ARGUMENTS": "--max-model-len 4096"}
    serve, train = commands(run("launch/slurm/train_vllm.sbatch", "--dry-run", *arguments, **variables))
    assert serve[0] == train[0] == "srun"
    assert "--relative=1" in serve and "--relative=0" in train
    at = serve.index("launch/vllm_server.sh")
    port = serve[serve.index("--port") + 1]
    assert serve[at + 1 :] == ["--lora-rank", "16", "MODEL", "--host", "0.0.0.0", "--port", port, "--max-model-len",
                               "4096"]  # fmt: skip
    assert "--block-signal=TERM" in serve
    assert train[train.index("--vllm_server_base_url") + 1] == f"http://localhost:{port}"
    assert train[-6:] == arguments


@pytest.mark.parametrize("kind, config", [("", 2), ("_torchrun", 2), ("_deepspeed", 2), ("_vllm", 3)])
def test_jobs_keep_the_weights_on_each_gpu_unless_their_models_are_large(kind, config):
    """Of a flag that is there twice the last one counts."""
    script, model = f"launch/slurm/train{kind}.sbatch", ["--model_name_or_path", "MODEL"]
    *_, command = commands(run(script, "--dry-run", *model))
    assert [word for word in command if "ds_configs" in word] == [f"ds_configs/zero{config}.json"]
    *_, command = commands(run(script, "--dry-run", *model, "--deepspeed", "ds_configs/zero1.json"))
    assert dict(zip(command, command[1:], strict=False))["--deepspeed"] == "ds_configs/zero1.json"


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        ([], {}, "give --model_name_or_path MODEL"),
        (["--model_name_or_path", "M"], {"SLURM_NNODES": "2", "SERVER_NODES": "2"}, "none is left to train"),
    ],
)
def test_jobs_that_cannot_work_say_so(arguments, variables, message):
    assert message in run("launch/slurm/train_vllm.sbatch", "--dry-run", *arguments, ok=False, **variables)
