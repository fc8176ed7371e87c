"""Communication volume of an optimizer step, as calculated; tests/distributed/test_traffic.py compares it with real
collectives."""

from sdft_ds.plan import vllm
from sdft_ds.plan.footprint import LIVE_PARAMETERS
from sdft_ds.plan.job import Job, Setup


def volumes(job: Job, setup: Setup) -> dict[str, float]:
    """Bytes that a rank receives in one optimizer step, including one generation batch, by purpose.

    An all-gather or reduce-scatter moves (ranks - 1) / ranks of the full size; an all-reduce twice that.
    """
    return {name: whole * (job.ranks - 1) / job.ranks for name, (whole, _) in rings(job, setup).items()}


def rings(job: Job, setup: Setup) -> dict[str, tuple[float, float]]:
    """Purpose -> (bytes sent once around the ring; number of passes over all weights or gradients)."""
    weights, gradients, accumulation = job.weights, job.trained * job.bytes, job.accumulation
    if setup.stage < 3:
        # DeepSpeed all-reduces buckets that belong to several ranks (use_multi_rank_bucket_allreduce): stage 2 after
        # each micro-batch, stages 0 and 1 once per step.
        times = 2 * (accumulation if setup.stage == 2 else 1)
        found = {"gradients": (times * gradients, times)}
        if setup.stage > 0:
            found["trained weights"] = (gradients, 1)
            if job.has_shadow:
                found["teacher swapped in and out"] = (2 * gradients, 2)
        return found
    # Forward and backward each gather the weights, except those kept between them. A tied head is kept from the first
    # forward of the scoring pass to the student's.
    student, teacher = accumulation * (1 + max(0.0, 1 - LIVE_PARAMETERS / job.elements)), job.scoring_forwards
    stays = job.shape.head * job.bytes if job.shape.tied else 0
    rollout = job.completion * job.waves if setup.vllm is None and not setup.gather else 1
    pushed = job.weights
    if setup.vllm is not None and not setup.vllm.colocated and vllm.sync(job, setup.vllm) == "adapter":
        pushed = job.adapter * job.bytes
    found = {
        "gradients": (accumulation * gradients, accumulation),
        "student's weights": (student * weights - stays, student),
        "teacher's weights": (teacher * weights - (teacher - 1) * stays, teacher),
        "rollout's weights": (rollout * pushed, rollout),
    }
    if job.has_shadow and job.tuning == "full":
        found["teacher's head"] = (job.shape.head * job.bytes, 0)
    return found
