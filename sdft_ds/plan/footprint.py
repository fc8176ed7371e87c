"""Calculated memory footprint of a training job, in bytes per rank, by part and by phase of a step.

Formulas come from DeepSpeed's source (0.19), this package's own code, or a measurement. Memory that is not tensors
(CUDA context, NCCL, unused allocator blocks) is not included.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sdft_ds.loss.chunked import chunk_elements
from sdft_ds.plan import vllm
from sdft_ds.plan.job import Job, Setup

PARTS = (
    "weights", "optimizer", "gradients", "teacher shadow", "teacher head and states", "gathered weights",
    "activations", "logits chunk", "KV cache", "vLLM weights", "vLLM cache",
)  # fmt: skip
PHASES = ("rollout", "teacher", "loss", "backward", "optimizer")
PUSH = "push"  # of the weights to vLLM, before its rollout

# DeepSpeed's defaults of stage3_max_live_parameters and stage3_max_reuse_distance, and of sub_group_size, each 1e9;
# ds_configs do not change them. Once ZeRO-3 has traced the module order, it prefetches and keeps up to that many.
LIVE_PARAMETERS = 10**9
SUB_GROUP = 10**9


@dataclass(frozen=True)
class Footprint:
    """Bytes per rank. phases: on the device, by phase and part. host: in host memory."""

    phases: dict[str, dict[str, float]]
    host: float

    @property
    def peaks(self) -> dict[str, float]:
        return {phase: sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        return max(self.peaks, key=self.peaks.get)

    @property
    def parts(self) -> dict[str, float]:
        """The maximum of each part over the phases. They do not coincide, so the peak is not their sum."""
        return {name: max(parts.get(name, 0) for parts in self.phases.values()) for name in PARTS}


def footprint(job: Job, setup: Setup) -> Footprint:
    """The footprint of a job under a setup."""
    resident, host = _resident(job, setup)
    phases = {phase: dict(resident) for phase in _phases(setup)}
    for phase, part, size in _transient(job, setup):
        phases[phase][part] = phases[phase].get(part, 0) + size
    return Footprint(phases, host)


def _phases(setup: Setup) -> tuple[str, ...]:
    return PHASES if setup.vllm is None else (PUSH, *PHASES)


def _shards(job: Job, setup: Setup, since: int) -> int:
    """Number of shards of a state that is sharded from stage `since` on."""
    return job.ranks if setup.stage >= since else 1


def _resident(job: Job, setup: Setup) -> tuple[dict[str, float], float]:
    """(Bytes on the device in every phase, by part; bytes in host memory.)"""
    b, trained = job.bytes, job.trained
    share = trained / _shards(job, setup, since=1)
    # Without DeepSpeed what is trained is in fp32.
    weights = job.weights / _shards(job, setup, since=3) + (trained * (4 - b) if setup.config is None else 0)
    # Adam's two moments and fp32 master weights: DeepSpeed's optimizers keep masters even of fp32 weights, except at
    # stage 0, where the optimizer updates those directly.
    masters = 0 if setup.config is None or (setup.stage == 0 and not job.bf16) else 4
    optimizer = (8 + masters) * share
    # ZeRO-3 allocates one persistent flat buffer for its shard of the gradients.
    gradients = b * share if setup.stage == 3 else 0
    shadow = 4 * share if job.has_shadow else 0
    resident = {"weights": job.scales}
    host = 0.0
    if setup.offload_parameters:
        host += weights
    else:
        resident["weights"] += weights
    if setup.offload_optimizer:
        host += optimizer + gradients + 4 * share  # 4: fp32 gradients for the optimizer on the host
    else:
        resident |= {"optimizer": optimizer, "gradients": gradients}
    # The shadow is on the device of the weights, unless the settings put it on the host.
    if job.shadow_on_host or setup.offload_parameters:
        host += shadow
    else:
        resident["teacher shadow"] = shadow
    return resident, host


def _transient(job: Job, setup: Setup) -> Iterator[tuple[str, str, float]]:
    """(phase, part, bytes) of temporary memory."""
    yield from _of_passes(job, setup)
    if setup.config is None and job.bf16:  # autocast keeps copies of what is trained until it ends
        for phase in ("rollout", "teacher", "loss", "backward"):
            yield phase, "weights", job.trained * job.bytes
    yield from _of_gradients(job, setup)
    yield from _of_swaps(job, setup)
    if setup.vllm is None:
        yield from _of_local_rollouts(job)
    else:
        yield from _of_vllm(job, setup)
    if setup.stage == 3:
        bytes_per_element = job.weights / job.elements
        ahead = min(job.weights, (LIVE_PARAMETERS + job.shape.largest) * bytes_per_element)
        for phase in ("teacher", "loss", "backward"):
            yield phase, "gathered weights", ahead
        if setup.vllm is None:
            yield "rollout", "gathered weights", job.weights if setup.gather else ahead


def _of_swaps(job: Job, setup: Setup) -> Iterator[tuple[str, str, float]]:
    """What a shadow brings to the device from the host: one parameter's values at a time, in fp32, its own or those of
    the masters."""
    if not job.has_shadow or setup.offload_parameters:
        return
    one = 4 * min(job.shape.largest, job.trained) / _shards(job, setup, since=1)
    if setup.offload_optimizer or job.shadow_on_host:
        yield "teacher", "teacher shadow", one
    if setup.offload_optimizer and not job.shadow_on_host and job.teacher == "ema":  # an update, after the step
        yield "optimizer", "teacher shadow", one


def _of_local_rollouts(job: Job) -> Iterator[tuple[str, str, float]]:
    """Rollouts in the training process. Each prompt is prefilled once for all its completions. Its cache is expanded
    to their rows one layer at a time. Sampling a token creates fp32 scores, probabilities and an fp64 sum."""
    shape, b, rows = job.shape, job.bytes, job.rollout_rows
    yield "rollout", "KV cache", rows * job.cached(job.prompt + job.completion) * (1 + 1 / shape.layers)
    yield "rollout", "activations", -(-rows // job.generations) * job.prompt * job.without_grad
    yield "rollout", "logits chunk", rows * shape.vocabulary * (b + 4 + 4 + 4 + 8)
    if job.tuning == "qlora":
        yield "rollout", "gathered weights", job.dequantized


def _of_vllm(job: Job, setup: Setup) -> Iterator[tuple[str, str, float]]:
    """Rollouts by vLLM: a push exports one decoder layer, or the head, at a time (model/export.py)."""
    engine, widest = setup.vllm, max(job.shape.layer, job.shape.head)
    gathered = widest * job.weights / job.elements if setup.stage == 3 else 0
    merged = 0 if job.tuning == "full" else 12 * max(width * height for _, width, height in job.shape.linears)
    yield PUSH, "gathered weights", gathered + widest * job.bytes + merged
    if not engine.colocated:
        return
    weights = vllm.weights(job, engine)
    for phase in ("rollout",) if engine.sleeps else _phases(setup):
        yield phase, "vLLM weights", weights
        yield phase, "vLLM cache", max(0.0, engine.memory - weights)
    if engine.sleeps:  # its cache is allocated after the push
        yield PUSH, "vLLM weights", weights


def _of_passes(job: Job, setup: Setup) -> Iterator[tuple[str, str, float]]:
    """Activations, logits and KV caches of scoring and training, and the teacher's states: none of it is sharded."""
    shape, b = job.shape, job.bytes
    stream = 4 if setup.config is None and job.tuning == "full" else b  # hidden states, after an embedding in fp32
    # The scoring pass: batches of full rows, or, with shared prompts, of prompts and then of completions.
    rows, length = job.scoring_rows, job.teacher_prompt + job.completion
    if job.generations > 1:
        prompts = -(-rows // job.generations)
        yield "teacher", "KV cache", rows * job.cached(length) * (1 + 1 / shape.layers)
        tokens = max(prompts * job.teacher_prompt, rows * job.completion)
    else:
        tokens = rows * length
    yield "teacher", "activations", tokens * job.without_grad

    # Kept from the scoring pass for the loss: hidden states, and the teacher's head where the student's will differ.
    states = job.rows * job.completion * shape.hidden * stream
    head = shape.head * b if job.has_shadow and job.tuning == "full" else 0
    for phase in ("teacher", "loss", "backward", "optimizer"):
        yield phase, "teacher head and states", states + head

    if job.tuning == "qlora":  # each linear layer is dequantized to the compute dtype while it computes
        for phase in ("teacher", "loss", "backward"):
            yield phase, "gathered weights", job.dequantized

    # The student: with checkpointing each layer's input, plus one full layer at a time during recomputation.
    tokens = job.batch * (job.prompt + job.completion)
    # ZeRO-3 keeps adapters in fp32, in which PEFT creates them; at other stages the engine casts them to bf16.
    layer = _of_layer(job, fp32_adapter=job.bf16 and job.tuning != "full" and setup.stage == 3)
    kept = shape.layers * (shape.hidden * stream if job.checkpointing else layer)
    yield "loss", "activations", tokens * kept
    # Gradients of the feed-forward layer and of the layer's output, as measured (tests/plan/test_footprint.py).
    in_backward = (layer if job.checkpointing else 0) + b * (2 * shape.intermediate + shape.hidden)
    yield "backward", "activations", tokens * (kept + in_backward)
    yield "loss", "logits chunk", _loss_chunk(job)


def _of_layer(job: Job, fp32_adapter: bool) -> float:
    """Bytes per token that a gated decoder layer saves for its backward: inputs of its norms in fp32, inputs of its
    projections, queries, keys, values, attention output, and four tensors of the feed-forward width."""
    shape, b = job.shape, job.bytes
    if fp32_adapter:  # it saves its inputs in fp32; the frozen layers save none
        inputs = 4 * (5 * shape.hidden + shape.query + shape.intermediate)
        return inputs + 8 * shape.hidden + b * (2 * shape.query + 2 * shape.key_value + 3 * shape.intermediate)
    return shape.hidden * (8 + 4 * b) + b * (2 * shape.query + 2 * shape.key_value + 4 * shape.intermediate)


def _loss_chunk(job: Job) -> float:
    """Bytes of one chunk of the loss (loss/chunked.py). Full vocabulary: about seven fp32 logits matrices, and both
    sides' in the compute dtype. Top-k: one, plus K rows of the head per token and their gradient."""
    shape, b = job.shape, job.bytes
    support = 0 if job.topk is None else job.topk * shape.hidden
    tokens = job.chunk_tokens or max(
        1, chunk_elements("cpu" if job.on_cpu else "cuda") // max(shape.vocabulary, support)
    )
    tokens = min(tokens, job.batch * job.completion)
    half = b if b < 4 else 0  # fp32 logits are not copied
    if job.topk is None:
        return tokens * shape.vocabulary * (7 * 4 + 2 * half)
    return tokens * (shape.vocabulary * (4 + half) + support * (b + 4))


def _of_gradients(job: Job, setup: Setup) -> Iterator[tuple[str, str, float]]:
    """Gradients up to the optimizer step, and the buckets in which they are reduced."""
    shape, trained = job.shape, job.trained
    b = 4 if setup.config is None else job.bytes
    share = trained / _shards(job, setup, since=1)
    # Stages 0 and 1 keep unsharded gradients until the step, stage 2 a shard; stage 3's buffer is resident.
    whole = b * (trained if setup.stage < 2 else share if setup.stage == 2 else 0)
    # reduce_bucket_size "auto" is hidden x hidden; overlap_comm doubles it at stages 1 and 2.
    bucket = min(shape.hidden**2, trained) * b * {0: 0, 1: 2, 2: 2, 3: 1}[setup.stage]
    for phase in _phases(setup):
        yield phase, "gradients", bucket
    yield "loss", "gradients", whole if job.accumulation > 1 else 0
    yield "backward", "gradients", whole
    if job.tuning == "full":
        # A parameter's unsharded gradient before reduction; that of a tied head waits for the embedding's.
        yield "backward", "gradients", b * (shape.largest + (shape.head if shape.tied else 0))
        # The head's gradient in the loss: accumulated over chunks in fp32, then cast to its dtype.
        yield "loss", "gradients", shape.head * (4 + (b if b < 4 else 0))
    # The step flattens gradients and casts them to fp32, stage 3 by sub-group; stage 1 copies its shard first.
    in_fp32 = 4 if job.bf16 else 0
    if setup.offload_optimizer:
        return
    if setup.stage == 3:
        yield "optimizer", "gradients", min(share, SUB_GROUP) * (b + in_fp32)
    elif setup.stage > 0:
        yield "optimizer", "gradients", whole + share * (b + in_fp32 + (b if setup.stage == 1 else 0))
    else:
        yield "optimizer", "gradients", whole + trained * (b + in_fp32 if job.bf16 and setup.config else 0)
