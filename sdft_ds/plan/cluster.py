"""The GPUs, or the CPU, that a job runs on, and which jobs fit there."""

import math
from dataclasses import dataclass, replace

from sdft_ds.model.prefix_cache import memory_budget
from sdft_ds.plan import vllm
from sdft_ds.plan.footprint import Footprint, footprint
from sdft_ds.plan.job import Job, Setup, Vllm

GIB = 1 << 30
COLOCATED_SIZES, SERVER_SIZES = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)  # GPUs that share an engine
MOST_UTILIZED = 0.9  # share of a GPU's memory that vLLM takes at most; also a server's
OF_ROLLOUTS = ("KV cache", "activations", "logits chunk")  # parts that grow with the rows of a rollout


@dataclass(frozen=True)
class Cluster:
    """gpus: per node. memory: GiB per GPU, of which `overhead` GiB hold no tensors. host_memory: GiB per node, None if
    unknown. device: name of the GPUs, None if they are not here. on_cpu: one process in host memory, without GPUs.
    assumed: nothing says how much memory the GPUs have."""

    gpus: int
    nodes: int
    memory: float
    overhead: float
    host_memory: float | None
    device: str | None = None
    on_cpu: bool = False
    assumed: bool = False

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    def footprint(self, job: Job, setup: Setup) -> Footprint:
        """Memory of a job. As in training, rollouts use half of the free memory or less, or rollout_batch_tokens."""
        return footprint(self.with_rollout_rows(job, setup), setup)

    def with_rollout_rows(self, job: Job, setup: Setup) -> Job:
        """The job with rollout_batch_tokens as training would choose it."""
        if job.rollout_tokens is not None or setup.vllm is not None:
            return job
        parts = footprint(job, setup).phases["rollout"].items()
        rest = sum(size for part, size in parts if part not in OF_ROLLOUTS)
        rows = max(1, memory_budget(int((self.memory - self.overhead) * GIB - rest)) // job.rollout_row)
        return job if rows >= job.rows else replace(job, rollout_tokens=rows * (job.prompt + job.completion))

    def fits(self, job: Job, setup: Setup) -> bool:
        """Whether it fits; of host memory that is unknown everything is taken to fit."""
        found, engine = self.footprint(job, setup), setup.vllm
        return (
            found.peak / GIB + self.overhead <= self.memory
            and (self.host_memory is None or found.host * self.gpus / GIB <= self.host_memory)
            and (engine is None or vllm.least(job, engine) <= engine.memory)
        )

    def colocated(self, job: Job, setup: Setup) -> Setup:
        """With vLLM in the training processes, asleep while they train, on as few GPUs as it takes for all rows at
        once, and as much of their memory; if that is not free, as is free. It may not fit."""
        beside = replace(setup, vllm=Vllm(0, job.prompt + job.completion, colocated=False))
        free = self.memory - self.overhead - footprint(job, beside).peaks["rollout"] / GIB
        tried = []
        for size in COLOCATED_SIZES:
            if size <= self.gpus and job.ranks % size == 0 and job.shape.heads % size == 0:
                engine = Vllm(0, job.prompt + job.completion, parallel=size, sleeps=True)
                share = math.ceil(vllm.wanted(job, engine) / GIB / self.memory * 20) / 20
                share = max(0.05, min(share, math.floor(free / self.memory * 20) / 20, MOST_UTILIZED))
                tried.append(replace(setup, vllm=replace(engine, memory=share * self.memory * GIB)))
        return min(
            tried,
            key=lambda each: (
                not self.fits(job, each),
                -vllm.rows_at_once(job, each.vllm) / each.vllm.parallel,
                each.vllm.parallel,
            ),
        )

    def served(self, job: Job, setup: Setup, servers: int, sync: str) -> Setup:
        """With vLLM's servers on other GPUs, each on as few as hold it."""
        engine = Vllm(
            MOST_UTILIZED * self.memory * GIB, job.prompt + job.completion, False, servers=servers, sync=sync
        )
        for size in SERVER_SIZES:
            found = replace(engine, parallel=size)
            if job.shape.heads % size == 0 and vllm.least(job, found) <= found.memory:
                break
        return replace(setup, vllm=found)
