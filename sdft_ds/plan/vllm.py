"""Memory and time of rollouts by vLLM, calculated; nothing here was measured on a GPU."""

from sdft_ds.plan.job import Job, Vllm
from sdft_ds.plan.machine import Machine

# vLLM keeps memory free for the largest batch that it schedules: its defaults on GPUs of 70 GiB and more.
SCHEDULED_TOKENS, SCHEDULED_ROWS = 16384, 1024


def weights(job: Job, engine: Vllm) -> float:
    """Bytes on each of its GPUs: adapters are merged, and quantized weights served in the compute dtype."""
    return job.shape.parameters * job.bytes / engine.parallel


def unused_for_cache(job: Job, engine: Vllm) -> float:
    """Bytes of its memory on each GPU that are not KV cache: weights, and activations of the largest batch."""
    activations = SCHEDULED_TOKENS * job.without_grad + SCHEDULED_ROWS * job.shape.vocabulary * 8
    return weights(job, engine) + activations / engine.parallel


def rows(job: Job, engine: Vllm) -> int:
    """Rows of a generation batch that one engine completes."""
    return job.rows * engine.parallel if engine.colocated else -(-job.rows * job.ranks // engine.servers)


def row_bytes(job: Job, engine: Vllm) -> float:
    """Bytes of KV cache per row on each of its GPUs."""
    return job.cached(job.prompt + job.completion) / engine.parallel


def wanted(job: Job, engine: Vllm) -> float:
    """Bytes on each of its GPUs with which it generates all rows at once."""
    return unused_for_cache(job, engine) + max(rows(job, engine) * row_bytes(job, engine), _longest(job, engine))


def least(job: Job, engine: Vllm) -> float:
    """Bytes on each of its GPUs with which vLLM starts: its cache must hold one sequence of its greatest length."""
    return unused_for_cache(job, engine) + _longest(job, engine)


def _longest(job: Job, engine: Vllm) -> float:
    return job.cached(engine.length) / engine.parallel


def rows_at_once(job: Job, engine: Vllm) -> int:
    room = engine.memory - unused_for_cache(job, engine)
    return max(1, min(rows(job, engine), SCHEDULED_ROWS, int(room / row_bytes(job, engine))))


def rollout_seconds(job: Job, engine: Vllm, machine: Machine) -> float:
    """Of a generation batch: prefill by FLOPs; each decode step reads the weights and the rows' KV cache once."""
    of_engine, at_once = rows(job, engine), rows_at_once(job, engine)
    rate = machine.flops * 1e12 * machine.mfu * engine.parallel
    prefill = 2 * -(-of_engine // job.generations) * job.prompt * job.shape.parameters / rate
    read = weights(job, engine) + at_once * job.cached(job.prompt + job.completion // 2) / engine.parallel
    computing = 2 * at_once * job.shape.parameters / rate
    reductions = 2 * job.shape.layers * (engine.parallel - 1) * machine.latency * 1e-6
    step = max(computing, read / (machine.memory_bandwidth * 1e9)) + reductions
    return prefill + -(-of_engine // at_once) * job.completion * step


def sync(job: Job, engine: Vllm) -> str:
    """How weights reach a server; auto: the adapter if only that is trained, else whole, by path."""
    return engine.sync if engine.sync != "auto" else "adapter" if job.tuning != "full" else "path"


def transfer_seconds(job: Job, engine: Vllm, machine: Machine) -> float:
    """Of a push, after the weights were gathered: within a GPU's memory, or from rank 0 to the servers."""
    full = job.shape.parameters * job.bytes
    if engine.colocated:
        return 3 * full / (machine.memory_bandwidth * 1e9)  # copied, then read and written
    if sync(job, engine) == "nccl":
        return full / (machine.bandwidth * 1e9)
    sent = full if sync(job, engine) == "path" else job.adapter * job.bytes
    return 2 * sent / (machine.file_bandwidth * 1e9)  # written, then read
