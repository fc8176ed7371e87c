"""Speeds that estimates of time assume."""

import re
from dataclasses import dataclass, replace

ASSUMPTIONS = """\
Seconds are estimates, from data sheets ({name}): {mfu:.0%} of {flops:g} TFLOP/s in bf16 (--mfu); memory at
{memory_bandwidth:g} GB/s; GPUs connected at {bandwidth:g} GB/s (--bandwidth), not overlapped; the host at {pcie:g}
GB/s per GPU, updating {host_adam:g}e9 parameters a second; prompts and completions of full length; {kernels} kernels
of {launch:g} us per layer and token in rollouts without vLLM. See docs/planning.md."""
SCALING = """\
Weak scaling: rows per rank stay as they are. Rings: a rank receives (ranks - 1) / ranks of what is gathered or
reduced, at {bandwidth:g} GB/s, and each collective costs {latency:g} us for each rank but one. Two bounds: collectives
beside computing, or one after the other."""
BETWEEN_NODES = 50.0  # GB/s for each GPU: one link of 400 Gb/s


@dataclass(frozen=True)
class Machine:
    """bandwidth: GB/s between GPUs, for each. memory_bandwidth: GB/s. latency: microseconds per rank of a ring. flops:
    TFLOP/s in bf16, dense; mfu: the share that is reached. launch: microseconds of a kernel's launch. file_bandwidth:
    GB/s of a file that one machine writes and another reads. pcie: GB/s between a GPU and its host. host_adam: 1e9
    parameters that a host's CPUs update per second. gpus_per_host: that share them.

    Defaults are assumptions: one 400 Gb/s link per GPU, and the H100 data sheet (SXM: bf16 dense, HBM3).
    """

    name: str = "H100"
    bandwidth: float = BETWEEN_NODES
    latency: float = 3.0
    flops: float = 989.0
    mfu: float = 0.4
    memory_bandwidth: float = 3350.0
    launch: float = 8.0
    file_bandwidth: float = 2.0
    pcie: float = 25.0
    host_adam: float = 3.0
    gpus_per_host: int = 8


# Data sheets: TFLOP/s in bf16 (fp16 where there is none), dense; GB/s of memory; GB/s to the other GPUs of a node.
SHEETS = {
    "B200": (2250, 8000, 900),
    "H200": (989, 4800, 450),
    "H100": (989, 3350, 450),
    "A100": (312, 2039, 300),
    "V100": (125, 900, 150),
    "L40S": (362, 864, 25),
    "A40": (150, 696, 25),
    "A10G": (70, 600, 25),
    "A10": (125, 600, 25),
    "L4": (121, 300, 25),
    "T4": (65, 320, 12),
    "RTX 5090": (210, 1792, 25),
    "RTX 4090": (165, 1008, 25),
    "RTX 4080": (97, 717, 25),
    "RTX 3090": (71, 936, 25),
}
# What a GPU is taken for of which only the memory is known: the first of at least so many GiB.
BY_MEMORY = {140: "H200", 79: "H100", 44: "L40S", 40: "A100", 22: "A10", 0: "RTX 4080"}


def machine_of(device: str | None, memory: float, nodes: int, gpus: int) -> Machine | None:
    """Speeds of a GPU by its name or, if that is None, its GiB. None for a name of which there is no data sheet."""
    if device is None:
        name = next(name for least, name in BY_MEMORY.items() if memory >= least)
    else:
        name = next((name for name in SHEETS if re.search(rf"\b{name}\b", device)), None)
    if name is None:
        return None
    flops, read, link = SHEETS[name]
    bandwidth = link if nodes == 1 else min(link, BETWEEN_NODES)
    speeds = Machine(name, bandwidth, flops=flops, memory_bandwidth=read, gpus_per_host=gpus)
    return speeds if device is not None else replace(speeds, name=f"taken for {name}s")
