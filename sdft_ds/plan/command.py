"""The command that runs an option: the training line, with what differs."""

import shlex
from typing import Any

from sdft_ds.cli import arguments
from sdft_ds.plan.cluster import Cluster
from sdft_ds.plan.model_shape import BUILT_IN
from sdft_ds.plan.request import Line
from sdft_ds.plan.search import Option

SCRIPT = "launch/train.py"
NAMES = {name: alias for alias, name in arguments.ALIASES.items()}  # settings with a short name


def command(line: Line, cluster: Cluster, option: Option) -> str:
    """With the line's own launcher, else python, deepspeed on one node, or a SLURM job on several."""
    setup, changes = option.setup, option.changes
    start = " ".join(line.launcher) if line.launcher and setup.config is not None else _start(cluster, option)
    flags = [] if setup.config is None else [f"--deepspeed ds_configs/{setup.config}.json"]
    kept = arguments.without(line.words, {"deepspeed", *changes})
    flags += _joined(["MODEL" if word in BUILT_IN else word for word in kept])
    if line.values["dataset_path"] is None and line.values["dataset_name"] is None:
        flags.append("--dataset DATA")
    if not line.launcher and cluster.nodes == 1 and "output_dir" not in line.names:
        flags.append("--output_dir OUTPUT")
    flags += [flag(name, value) for name, value in changes.items()]
    if option.served and line.values["vllm_server_base_url"] is None and not line.starts_servers:
        hosts = ",".join(f"http://HOST{i + 1}:8000" for i in range(setup.vllm.servers))
        flags.append(f"--vllm_server_base_url {hosts}")
    return " \\\n    ".join([start, *flags])


def server_command(line: Line, option: Option) -> str:
    """The command that starts one server; it has a machine of its own."""
    size = f"--tensor-parallel-size {option.setup.vllm.parallel}"
    length = f"--max-model-len {option.job.prompt + option.job.completion}"
    adapter = f"--lora-rank {line.values['lora_r']} " if option.job.tuning != "full" else ""
    model = "MODEL" if line.model in BUILT_IN else line.model
    return f"bash launch/vllm_server.sh {adapter}{model} \\\n    --host 0.0.0.0 {size} {length}"


def flag(name: str, value: Any) -> str:
    """A setting as on the command line."""
    if value is True:
        return f"--{name}"
    words = " ".join(value) if isinstance(value, list) else str(value).lower()
    return f"--{NAMES.get(name, name)} {words}"


def _start(cluster: Cluster, option: Option) -> str:
    if option.setup.config is None:
        return f"python {SCRIPT}"
    if cluster.nodes == 1:
        return f"deepspeed --num_gpus {cluster.gpus} {SCRIPT}"
    shape = "" if cluster.gpus == 8 else f" --gpus-per-node {cluster.gpus} --ntasks-per-node {cluster.gpus}"
    return f"sbatch --nodes {cluster.nodes}{shape} launch/slurm/train.sbatch"


def _joined(words: list[str]) -> list[str]:
    """Each flag with its values."""
    flags: list[str] = []
    for word in words:
        if word.startswith("--") or not flags:
            flags.append(shlex.quote(word))
        else:
            flags[-1] += " " + shlex.quote(word)
    return flags
