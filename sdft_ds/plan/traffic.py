"""Communication volume of an optimizer step, and simulated weak scaling.

Volumes are calculated; tests/distributed/test_traffic.py compares them with real collectives. Times are simulated, see
`ASSUMPTIONS`.
"""

from dataclasses import dataclass, replace

from sdft_ds.plan.footprint import LIVE_PARAMETERS, Job, Setup

MOST_RANKS = 4096
ASSUMPTIONS = """\
Weak scaling: rows per rank stay as they are. Rings: a rank receives (ranks - 1) / ranks of what is gathered or
reduced, at {bandwidth:g} GB/s, and each collective costs {latency:g} us for each rank but one. Compute: {flops:g}
TFLOP/s at {mfu:.0%}; 6 FLOPs per parameter and student token (8 with checkpointing), 2 per teacher token and prompt
token, none for attention. Decoding reads all weights once per token at {memory_bandwidth:g} GB/s, every row to its
full length. Optimizer, data and stragglers take no time. Two bounds: collectives beside computing, or one after the
other."""


@dataclass(frozen=True)
class Machine:
    """bandwidth, memory_bandwidth: GB/s per GPU. latency: microseconds per rank of a ring. flops: TFLOP/s.

    Defaults are assumptions: one 400 Gb/s link per GPU, and the H100 data sheet (SXM: bf16 dense, HBM3).
    """

    bandwidth: float = 50.0
    latency: float = 3.0
    flops: float = 989.0
    mfu: float = 0.4
    memory_bandwidth: float = 3350.0


def volumes(job: Job, setup: Setup) -> dict[str, float]:
    """Bytes that a rank receives in one optimizer step, including one generation batch, by purpose.

    An all-gather or reduce-scatter moves (ranks - 1) / ranks of the full size; an all-reduce twice that.
    """
    return {name: whole * (job.ranks - 1) / job.ranks for name, (whole, _) in _rings(job, setup).items()}


def _rings(job: Job, setup: Setup) -> dict[str, tuple[float, float]]:
    """Purpose -> (bytes sent once around the ring; number of passes over all weights or gradients)."""
    weights, gradients, accumulation = job.weights, job.trained * job.bytes, job.accumulation
    if setup.stage < 3:
        # DeepSpeed all-reduces buckets that belong to several ranks (use_multi_rank_bucket_allreduce): stage 2 after
        # each micro-batch, stages 0 and 1 once per step.
        times = 2 * (accumulation if setup.stage == 2 else 1)
        rings = {"gradients": (times * gradients, times)}
        if setup.stage > 0:
            rings["trained weights"] = (gradients, 1)
            if job.has_shadow:
                rings["teacher swapped in and out"] = (2 * gradients, 2)
        return rings
    # Forward and backward each gather the weights, except those kept between them. A tied head is kept from the first
    # forward of the scoring pass to the student's.
    student, teacher = accumulation * (1 + max(0.0, 1 - LIVE_PARAMETERS / job.elements)), job.scoring_forwards
    stays = job.shape.head * job.bytes if job.shape.tied else 0
    rollout = 1 if setup.gather else job.completion * -(-job.rows // job.rollout_rows)
    rings = {
        "gradients": (accumulation * gradients, accumulation),
        "student's weights": (student * weights - stays, student),
        "teacher's weights": (teacher * weights - (teacher - 1) * stays, teacher),
        "rollout's weights": (rollout * weights, rollout),
    }
    if job.has_shadow and job.tuning == "full":
        rings["teacher's head"] = (job.shape.head * job.bytes, 0)
    return rings


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on `ranks` ranks: computing, and in collectives."""

    ranks: int
    computing: float
    communicating: float

    @property
    def bounds(self) -> tuple[float, float]:
        """(All collectives overlapped with compute, none overlapped.)"""
        return max(self.computing, self.communicating), self.computing + self.communicating


def step_time(job: Job, setup: Setup, machine: Machine) -> StepTime:
    """Simulates one step; see ASSUMPTIONS."""
    parameters, rate = job.elements, machine.flops * 1e12 * machine.mfu
    student = job.rows * (job.prompt + job.completion) * (8 if job.checkpointing else 6)
    teacher = 2 * (job.prompts * job.teacher_prompt + job.rows * job.completion)
    prefill = 2 * job.prompts * job.prompt
    token = max(2 * job.rows * parameters / rate, job.weights / (machine.memory_bandwidth * 1e9))
    computing = (student + teacher + prefill) * parameters / rate + job.completion * token
    # A pass over the weights takes one collective per linear layer, because the prefetch bucket (0.9 hidden^2) is
    # smaller than most of them. Gradients are reduced in buckets of hidden^2.
    layers = len(job.shape.linears) + 2
    buckets = -(-job.trained // job.shape.hidden**2)
    rings = _rings(job, setup).items()
    collectives = sum(passes * (buckets if name == "gradients" else layers) for name, (_, passes) in rings)
    hops = collectives * (job.ranks - 1) * machine.latency * 1e-6
    return StepTime(job.ranks, computing, sum(volumes(job, setup).values()) / (machine.bandwidth * 1e9) + hops)


def weak_scaling(job: Job, setup: Setup, machine: Machine) -> list[StepTime]:
    """Step times at constant rows per rank, on the job's ranks and on 2, 4, 8 ... times as many, up to MOST_RANKS."""
    more = [job.ranks]
    while 2 * more[-1] <= MOST_RANKS:
        more.append(2 * more[-1])
    return [step_time(replace(job, ranks=ranks), setup, machine) for ranks in more]
