"""Speeds that estimates of time assume."""

from dataclasses import dataclass

ROLLOUTS = """\
Rollouts: every row to its full length. The training process reads all weights once per token at
{memory_bandwidth:g} GB/s, and launches at least 41 kernels per layer and token at {launch:g} us; vLLM reads its share
of the weights and the rows' KV cache, and its 2 all-reduces per layer cost {latency:g} us for each GPU but one. A push
gathers the weights at {bandwidth:g} GB/s and copies them, within a GPU or to a server: by nccl at the same speed, by
files at {file_bandwidth:g} GB/s for each of writing and reading."""
ASSUMPTIONS = """\
Weak scaling: rows per rank stay as they are. Rings: a rank receives (ranks - 1) / ranks of what is gathered or
reduced, at {bandwidth:g} GB/s, and each collective costs {latency:g} us for each rank but one. Compute: {flops:g}
TFLOP/s at {mfu:.0%}; 6 FLOPs per parameter and student token (8 with checkpointing), 2 per teacher token and prompt
token, none for attention. Optimizer, data and stragglers take no time. Two bounds: collectives beside computing, or
one after the other.
{rollouts}"""


@dataclass(frozen=True)
class Machine:
    """bandwidth, memory_bandwidth: GB/s per GPU. latency: microseconds per rank of a ring. flops: TFLOP/s. launch:
    microseconds of a kernel's launch. file_bandwidth: GB/s of a file that one machine writes and another reads.

    Defaults are assumptions: one 400 Gb/s link per GPU, and the H100 data sheet (SXM: bf16 dense, HBM3).
    """

    bandwidth: float = 50.0
    latency: float = 3.0
    flops: float = 989.0
    mfu: float = 0.4
    memory_bandwidth: float = 3350.0
    launch: float = 8.0
    file_bandwidth: float = 2.0
