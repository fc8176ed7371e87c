"""Estimated seconds of an optimizer step and of its rollouts, by `machine.ASSUMPTIONS`; not measured on a GPU."""

from dataclasses import dataclass, replace

from sdft_ds.plan import vllm
from sdft_ds.plan.job import Job, Setup
from sdft_ds.plan.machine import Machine
from sdft_ds.plan.traffic import rings, volumes

MOST_RANKS = 4096
KERNELS = 41  # of a decoder layer and token in the training process, as counted


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on `ranks` ranks: rollout, passes (of the teacher and the student), offload (host's optimizer
    and transfers to it), communicating (collectives, and pushes to vLLM)."""

    ranks: int
    rollout: float
    passes: float
    offload: float
    communicating: float

    @property
    def computing(self) -> float:
        return self.rollout + self.passes + self.offload

    @property
    def bounds(self) -> tuple[float, float]:
        """(All collectives overlapped with compute, none overlapped.)"""
        return max(self.computing, self.communicating), self.computing + self.communicating


def step_time(job: Job, setup: Setup, machine: Machine) -> StepTime:
    """Simulates one step."""
    parameters, rate, batches = job.elements, machine.flops * 1e12 * machine.mfu, job.generations_per_step
    # Forward 2, backward 2 for the inputs' gradients and 2 for the weights', and a recomputed forward.
    per_token = 4 + (2 if job.tuning == "full" else 0) + (2 if job.checkpointing else 0)
    student = job.batch * job.accumulation * (job.prompt + job.completion) * per_token
    teacher = batches * 2 * (job.prompts * job.teacher_prompt + job.rows * job.completion)
    # A pass over the weights takes one collective per linear layer, because the prefetch bucket (0.9 hidden^2) is
    # smaller than most of them. Gradients are reduced in buckets of hidden^2.
    layers = len(job.shape.linears) + 2
    buckets = -(-job.trained // job.shape.hidden**2)
    collectives = sum(
        passes * (buckets if name == "gradients" else layers) for name, (_, passes) in rings(job, setup).items()
    )
    hops = collectives * (job.ranks - 1) * machine.latency * 1e-6
    moved = sum(volumes(job, setup).values()) / (machine.bandwidth * 1e9)
    pushed = 0 if setup.vllm is None else batches * vllm.transfer_seconds(job, setup.vllm, machine)
    return StepTime(
        job.ranks,
        rollout=batches * rollout_seconds(job, setup, machine),
        passes=(student + teacher) * parameters / rate,
        offload=_offload_seconds(job, setup, machine),
        communicating=moved + hops + pushed,
    )


def _offload_seconds(job: Job, setup: Setup, machine: Machine) -> float:
    """Of the optimizer's step on the host, of gradients to it and weights back, and of offloaded weights in passes."""
    if not setup.offload_optimizer:
        return 0.0
    share, link = job.trained / job.ranks, machine.pcie * 1e9
    seconds = share * machine.gpus_per_host / (machine.host_adam * 1e9) + 2 * share * job.bytes / link
    if setup.offload_parameters:
        passes = job.accumulation * 2 + job.generations_per_step * (job.scoring_forwards + 1)
        seconds += passes * job.weights / job.ranks / link
    return seconds


def rollout_seconds(job: Job, setup: Setup, machine: Machine) -> float:
    """Of a generation batch, without bringing the weights there."""
    if setup.vllm is not None:
        return vllm.rollout_seconds(job, setup.vllm, machine)
    rate = machine.flops * 1e12 * machine.mfu
    computing = 2 * job.rollout_rows * job.elements / rate
    weights = job.weights
    if job.tuning == "qlora":  # dequantized for each token: written and read again in the compute dtype
        weights += 2 * job.bytes * job.shape.linear_parameters
    read, launched = weights / (machine.memory_bandwidth * 1e9), KERNELS * job.shape.layers * machine.launch * 1e-6
    token = max(computing, read, launched)
    return 2 * job.prompts * job.prompt * job.elements / rate + job.waves * job.completion * token


def weights_seconds(job: Job, setup: Setup, machine: Machine) -> float:
    """Of bringing the weights to where a generation batch is rolled out: gathering them, and a push to vLLM."""
    passes, _ = rings(job, setup).get("rollout's weights", (0, 0))
    gathered = passes * (job.ranks - 1) / job.ranks / (machine.bandwidth * 1e9)
    return gathered + (0 if setup.vllm is None else vllm.transfer_seconds(job, setup.vllm, machine))


def layerwise_seconds(job: Job, machine: Machine) -> float:
    """Of a generation batch if each layer is gathered, or copied from the host, for each token."""
    return job.completion * job.waves * job.weights / (machine.bandwidth * 1e9)


def weak_scaling(job: Job, setup: Setup, machine: Machine) -> list[StepTime]:
    """Step times at constant rows per rank, on the job's ranks and on 2, 4, 8 ... times as many, up to MOST_RANKS."""
    more = [job.ranks]
    while 2 * more[-1] <= MOST_RANKS:
        more.append(2 * more[-1])
    return [step_time(replace(job, ranks=ranks), setup, machine) for ranks in more]
