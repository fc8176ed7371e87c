"""Communication volume of an optimizer step, and simulated weak scaling.

Volumes are calculated; tests/distributed/test_traffic.py compares them with real collectives. Times are simulated, see
`machine.ASSUMPTIONS`.
"""

from dataclasses import dataclass, replace

from sdft_ds.plan import vllm
from sdft_ds.plan.footprint import LIVE_PARAMETERS
from sdft_ds.plan.job import Job, Setup
from sdft_ds.plan.machine import Machine

MOST_RANKS = 4096
KERNELS = 41  # of a decoder layer and token in the training process, as counted


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
    rollout = job.completion * _waves(job) if setup.vllm is None and not setup.gather else 1
    pushed = job.weights
    if setup.vllm is not None and not setup.vllm.colocated and vllm.sync(job, setup.vllm) == "adapter":
        pushed = job.adapter * job.bytes
    rings = {
        "gradients": (accumulation * gradients, accumulation),
        "student's weights": (student * weights - stays, student),
        "teacher's weights": (teacher * weights - (teacher - 1) * stays, teacher),
        "rollout's weights": (rollout * pushed, rollout),
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
    """Simulates one step; see machine.ASSUMPTIONS."""
    parameters, rate = job.elements, machine.flops * 1e12 * machine.mfu
    student = job.rows * (job.prompt + job.completion) * (8 if job.checkpointing else 6)
    teacher = 2 * (job.prompts * job.teacher_prompt + job.rows * job.completion)
    computing = (student + teacher) * parameters / rate + rollout_seconds(job, setup, machine)
    # A pass over the weights takes one collective per linear layer, because the prefetch bucket (0.9 hidden^2) is
    # smaller than most of them. Gradients are reduced in buckets of hidden^2.
    layers = len(job.shape.linears) + 2
    buckets = -(-job.trained // job.shape.hidden**2)
    rings = _rings(job, setup).items()
    collectives = sum(passes * (buckets if name == "gradients" else layers) for name, (_, passes) in rings)
    hops = collectives * (job.ranks - 1) * machine.latency * 1e-6
    moved = sum(volumes(job, setup).values()) / (machine.bandwidth * 1e9)
    pushed = 0 if setup.vllm is None else vllm.transfer_seconds(job, setup.vllm, machine)
    return StepTime(job.ranks, computing, moved + hops + pushed)


def _waves(job: Job) -> int:
    """Rollouts of the training process that complete a generation batch one after the other."""
    return -(-job.rows // job.rollout_rows)


def rollout_seconds(job: Job, setup: Setup, machine: Machine) -> float:
    """Of a generation batch, without bringing the weights there."""
    if setup.vllm is not None:
        return vllm.rollout_seconds(job, setup.vllm, machine)
    rate = machine.flops * 1e12 * machine.mfu
    computing = 2 * job.rollout_rows * job.elements / rate
    read, launched = job.weights / (machine.memory_bandwidth * 1e9), KERNELS * job.shape.layers * machine.launch * 1e-6
    token = max(computing, read, launched)
    return 2 * job.prompts * job.prompt * job.elements / rate + _waves(job) * job.completion * token


def weights_seconds(job: Job, setup: Setup, machine: Machine) -> float:
    """Of bringing the weights to where a generation batch is rolled out: gathering them, and a push to vLLM."""
    passes, _ = _rings(job, setup).get("rollout's weights", (0, 0))
    gathered = passes * (job.ranks - 1) / job.ranks / (machine.bandwidth * 1e9)
    return gathered + (0 if setup.vllm is None else vllm.transfer_seconds(job, setup.vllm, machine))


def layerwise_seconds(job: Job, machine: Machine) -> float:
    """Of a generation batch if each layer is gathered, or copied from the host, for each token."""
    return job.completion * _waves(job) * job.weights / (machine.bandwidth * 1e9)


def weak_scaling(job: Job, setup: Setup, machine: Machine) -> list[StepTime]:
    """Step times at constant rows per rank, on the job's ranks and on 2, 4, 8 ... times as many, up to MOST_RANKS."""
    more = [job.ranks]
    while 2 * more[-1] <= MOST_RANKS:
        more.append(2 * more[-1])
    return [step_time(replace(job, ranks=ranks), setup, machine) for ranks in more]
