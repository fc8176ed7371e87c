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
    assert "--relative=2" in serve and "--relative=0" in train  # the header has three nodes
    at = serve.index("launch/vllm_server.sh")
    port = serve[serve.index("--port") + 1]
    assert serve[at + 1 :] == ["--lora-rank", "16", "MODEL", "--host", "0.0.0.0", "--port", port, "--max-model-len",
                               "4096"]  # fmt: skip
    assert "--block-signal=TERM" in serve
    assert train[train.index("--vllm_server_base_url") + 1] == f"http://node3:{port}"
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
        ([], {}, "give --model MODEL"),
        (["--model_name_or_path", "M"], {"SLURM_NNODES": "2", "SERVER_NODES": "2"}, "none is left to train"),
    ],
)
def test_jobs_that_cannot_work_say_so(arguments, variables, message):
    assert message in run("launch/slurm/train_vllm.sbatch", "--dry-run", *arguments, ok=False, **variables)


KINDS = ["", "_torchrun", "_deepspeed", "_vllm"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_has_the_nodes_and_gpus_of_the_header_or_of_sbatchs_options(kind):
    script, model = f"launch/slurm/train{kind}.sbatch", ["--model=M", "--lr", "1e-5"]
    nodes = 3 if kind == "_vllm" else 2
    shown = run(script, "--dry-run", *model)
    assert f"nodes {' '.join(f'node{i + 1}' for i in range(nodes))} with 8 GPUs each into runs/sdft-0" in shown
    options = ["-N", "4", "--gpus-per-node=h100:4", "--ntasks-per-node", "4", "--job-name", "mine"]
    asked = run(script, "--dry-run", *options, *model)
    assert "nodes node1 node2 node3 node4 with 4 GPUs each into runs/mine-0" in asked
    *_, command = commands(asked)
    assert command[-3:] == model and not any(word.startswith(("-N", "--gpus", "--ntasks-")) for word in command)
    if kind == "_torchrun":
        assert command[command.index("--nnodes") + 1] == command[command.index("--nproc_per_node") + 1] == "4"
    if kind == "_vllm":
        assert "--ntasks=12" in command and "--tensor-parallel-size 4" in asked


def test_a_dry_run_takes_sbatchs_other_options_for_no_settings_of_the_training():
    sbatch = ["--account", "MINE", "-p", "gpu", "--time=1:00:00"]
    *_, command = commands(run("launch/slurm/train.sbatch", "--dry-run", *sbatch, "--model", "M", "--dataset", "D"))
    assert not {"MINE", "gpu", "--time=1:00:00", "--account", "-p"} & set(command) and "M" in command


def test_a_dry_run_says_that_gpus_are_of_the_whole_job():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    line = ["bash", "launch/slurm/train.sbatch", "--dry-run", "--nodes", "2", "--gpus", "8", "--model", "M"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "nodes node1 node2 with 8 GPUs each" in done.stdout and "--gpus is of the whole job" in done.stderr


@pytest.mark.parametrize("given", [["--output_dir", "runs/x"], ["--output-dir=runs/x"]])
def test_jobs_find_a_setting_by_each_of_its_names(given):
    assert "each into runs/x\n" in run("launch/slurm/train.sbatch", "--dry-run", *given)
    shown = run("launch/slurm/train_vllm.sbatch", "--dry-run", "--lr", "1", "--model", "M", *given)
    assert "launch/vllm_server.sh M --host" in shown


def system_packages(tmp_path: Path, *arguments: str, **variables: str) -> tuple[str, str]:
    """(What apt-get was asked for, what was said) by launch/test.sh without a terminal, where nothing is installed."""
    for name, text in {
        "apt-get": f'echo "$*" >>{tmp_path}/asked',
        "dpkg-query": "exit 1",
        "id": "echo 0",
        "python3": "exit 1",  # ends the script after the packages
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
    environment.pop("PYTHON", None)
    done = subprocess.run(["bash", "launch/test.sh", *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)  # fmt: skip
    asked = tmp_path / "asked"
    return asked.read_text() if asked.exists() else "", done.stderr


def test_system_packages_are_not_installed_unasked(tmp_path):
    asked, said = system_packages(tmp_path, SYSTEM_PACKAGES="")
    assert not asked and "skipped: shellcheck" in said and "--system-packages installs them" in said
    assert not system_packages(tmp_path, SYSTEM_PACKAGES="no")[0]


@pytest.mark.parametrize(
    "arguments, variables", [(["--system-packages", "--full"], {}), (["--full"], {"SYSTEM_PACKAGES": "yes"})]
)
def test_system_packages_are_installed_where_it_is_asked_for(tmp_path, arguments, variables):
    asked, _ = system_packages(tmp_path, *arguments, **variables)
    assert "install --yes --no-install-recommends shellcheck slurmctld" in asked


def test_continuous_integration_may_install_them():
    assert "SYSTEM_PACKAGES=${SYSTEM_PACKAGES:-yes} exec bash launch/test.sh" in (ROOT / ".ci/run").read_text()
