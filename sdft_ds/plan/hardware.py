"""What a job has to run on: as the flags say, else as the training line's launcher does, else this machine."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from sdft_ds.distributed import host_memory
from sdft_ds.plan.cluster import GIB, Cluster

ASSUMED_MEMORY = 80.0  # GiB of GPUs of which nothing is known
# Of launchers: options and variables that say how many nodes, GPUs of each, and processes in all.
NODES = ("--num_nodes", "--nnodes", "--nodes", "-N", "NODES")
GPUS = ("--num_gpus", "--nproc_per_node", "--gpus-per-node", "--ntasks-per-node", "NPROC_PER_NODE")
PROCESSES = ("--num_processes", "--gpus", "-G")


def cluster(flags: argparse.Namespace, launcher: Sequence[str], on_cpu: bool) -> Cluster:
    """flags: gpus, nodes, memory, overhead and host_memory, each None where it was not given. launcher: the words
    before the settings. on_cpu: training is told to use no GPU. Raises ValueError for numbers that cannot be."""
    nodes, gpus = launched(launcher)
    nodes, gpus = flags.nodes or nodes, flags.gpus or gpus
    here = 0 if on_cpu else torch.cuda.device_count()
    for name in ("gpus", "nodes", "memory"):
        if getattr(flags, name) is not None and getattr(flags, name) <= 0:
            raise ValueError(f"--{name} must be positive, not {getattr(flags, name):g}.")
    if on_cpu or (not here and gpus is None and nodes is None and flags.memory is None):
        free = host_memory.available()
        if free is None and flags.memory is None:
            raise ValueError("This system does not say how much memory it has: give --memory, in GiB.")
        memory = flags.memory or free / GIB
        overhead = 1.0 if flags.overhead is None else flags.overhead  # Python and the libraries take half of it
        return Cluster(1, 1, memory, overhead, None, on_cpu=True)
    device, memory, host = None, flags.memory or ASSUMED_MEMORY, None
    if here and flags.memory is None:
        properties = torch.cuda.get_device_properties(0)
        device, memory, host = properties.name, properties.total_memory / GIB, host_memory.total()
    nodes, gpus = nodes or 1, gpus or here or 1
    if megabytes := os.environ.get("SLURM_MEM_PER_NODE", "0"):
        host = int(megabytes) << 20 or host
    overhead = (1 + 0.05 * memory + (gpus * nodes > 1)) if flags.overhead is None else flags.overhead
    assumed = device is None and flags.memory is None
    return Cluster(gpus, nodes, memory, overhead, flags.host_memory or (host and host / GIB), device, assumed=assumed)


def launched(words: Sequence[str]) -> tuple[int | None, int | None]:
    """(Nodes, GPUs of each) by a launcher's words, and by the header of a job script among them."""
    headers = [Path(word).read_text() for word in words if word.endswith(".sbatch") and Path(word).exists()]
    header = _options([line for text in headers for line in re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE)])
    given = _options(words)
    nodes = _first(given, NODES) or _first(header, NODES)
    if nodes and any(word.endswith("train_vllm.sbatch") for word in words):
        nodes = max(1, nodes - given.get("SERVER_NODES", 1))  # the last ones serve
    processes = _first(given, PROCESSES)
    in_all = None if processes is None else max(1, processes // (nodes or 1))
    return nodes, _first(given, GPUS) or in_all or _first(header, GPUS)


def _first(options: dict[str, int], names: Sequence[str]) -> int | None:
    return next((options[name] for name in names if name in options), None)


def _options(words: Sequence[str]) -> dict[str, int]:
    """Option -> the number at the end of its value: 4, 1:4, h100:8."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=False):
        name, equals, value = word.partition("=")
        name = name.replace("nproc-per-node", "nproc_per_node")
        if name in (*NODES, *GPUS, *PROCESSES, "SERVER_NODES") and (
            number := re.search(r"\d+$", value if equals else following)
        ):
            found[name] = int(number[0])
    return found
