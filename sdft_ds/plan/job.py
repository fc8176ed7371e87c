"""A training job, the setups that it can run under, and what generates its completions."""

from dataclasses import dataclass

from sdft_ds.plan.model_shape import ModelShape

# NF4: an fp32 scale per 64 values, which ZeRO-3 does not shard.
NF4_SCALE_BYTES = 4 / 64


@dataclass(frozen=True)
class Vllm:
    """An engine of vLLM: in the training processes of `parallel` ranks (colocated), or `servers` on GPUs of their own.

    memory: bytes of each of its GPUs that it takes. parallel: GPUs that share an engine. length: tokens of the longest
    sequence it accepts. sleeps: it holds memory during rollouts only. sync: as vllm_weight_sync.
    """

    memory: float
    length: int
    colocated: bool = True
    parallel: int = 1
    sleeps: bool = False
    servers: int = 1
    sync: str = "auto"


@dataclass(frozen=True)
class Setup:
    """A DeepSpeed setup, and what generates: vllm, or the training process. gather: ZeRO-3 gathers the weights once
    per rollout of the training process (ds3_gather_for_generation)."""

    config: str | None  # of ds_configs, without .json; None: without DeepSpeed
    stage: int
    offload_optimizer: bool = False
    offload_parameters: bool = False
    gather: bool = True
    vllm: Vllm | None = None

    @property
    def name(self) -> str:
        config = self.config or "without DeepSpeed"
        if self.vllm is None:
            return config + ("" if self.gather else ", layer by layer")
        return config + (" + vLLM" if self.vllm.colocated else " + vLLM server")


PLAIN = Setup(None, 0)  # one process: weights in fp32 under autocast, frozen ones in the compute dtype
ZERO_0, ZERO_1, ZERO_2 = (Setup(f"zero{stage}", stage) for stage in range(3))
ZERO_3 = Setup("zero3", 3)
OFFLOAD_OPTIMIZER = Setup("zero3_offload_optimizer", 3, offload_optimizer=True)
OFFLOAD = Setup("zero3_offload", 3, offload_optimizer=True, offload_parameters=True)
SETUPS = (ZERO_0, ZERO_1, ZERO_2, ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD)


@dataclass(frozen=True)
class Job:
    """A training job. Lengths are tokens; a micro-batch is `batch` rows, a step `accumulation` micro-batches.

    tuning: full, lora or qlora, whose frozen weights have `bits` bits. adapter: its parameters. teacher: live, base or
    ema. topk: size of the support; None: the full vocabulary. chunk_tokens: as loss_chunk_tokens. rollout_tokens: as
    rollout_batch_tokens; None: all rows are generated at once. steps_per_generation, iterations: as
    steps_per_generation and num_iterations.
    """

    shape: ModelShape
    ranks: int
    tuning: str = "full"
    adapter: int = 0
    teacher: str = "live"
    shadow_on_host: bool = False
    bf16: bool = True
    checkpointing: bool = True
    batch: int = 8
    accumulation: int = 1
    generations: int = 8
    prompt: int = 512
    teacher_prompt: int = 2048
    completion: int = 256
    scoring_tokens: int = 16384
    rollout_tokens: int | None = None
    topk: int | None = 100
    chunk_tokens: int | None = None
    bits: int = 4
    steps_per_generation: int | None = None
    iterations: int = 1
    on_cpu: bool = False

    @property
    def bytes(self) -> int:
        """Bytes per element in the compute dtype, which is also that of the engine's weights."""
        return 2 if self.bf16 else 4

    @property
    def trained(self) -> int:
        return self.shape.parameters if self.tuning == "full" else self.adapter

    @property
    def elements(self) -> int:
        return self.shape.parameters + self.adapter

    @property
    def scales(self) -> float:
        return NF4_SCALE_BYTES * self.shape.linear_parameters if self.tuning == "qlora" and self.bits == 4 else 0

    @property
    def weights(self) -> float:
        """Bytes of all the weights that stage 3 shards."""
        if self.tuning != "qlora":
            return self.elements * self.bytes
        quantized = self.shape.linear_parameters
        return self.bits / 8 * quantized + (self.elements - quantized) * self.bytes

    def cached(self, length: int) -> int:
        """Bytes of the cache of a row of so many tokens."""
        return self.shape.cache.elements(length) * self.bytes

    @property
    def dequantized(self) -> int:
        """Bytes of the largest linear layer in the compute dtype: QLoRA dequantizes each while it computes."""
        return self.bytes * max(width * height for _, width, height in self.shape.linears)

    @property
    def without_grad(self) -> float:
        """Activation bytes per token without a backward: the larger of a layer's feed-forward and attention peaks (as
        measured; attention without a materialized score matrix)."""
        shape = self.shape
        feed_forward = 3 * shape.intermediate + 4 * shape.hidden
        attention = 3 * shape.hidden + 3 * shape.query + 4 * shape.key_value
        return self.bytes * max(feed_forward, attention)

    @property
    def rows(self) -> int:
        """Rows of a generation batch per rank; as a rule it serves one optimizer step."""
        return self.batch * (self.steps_per_generation or self.accumulation)

    @property
    def generations_per_step(self) -> float:
        """Generation batches of an optimizer step."""
        return self.accumulation / ((self.steps_per_generation or self.accumulation) * self.iterations)

    @property
    def prompts(self) -> int:
        """Distinct prompts among those rows."""
        return -(-self.rows // self.generations)

    @property
    def rollout_rows(self) -> int:
        """Rows that are generated at once."""
        tokens = self.rollout_tokens
        return self.rows if tokens is None else min(self.rows, max(1, tokens // (self.prompt + self.completion)))

    @property
    def waves(self) -> int:
        """Rollouts of the training process that complete a generation batch one after the other."""
        return -(-self.rows // self.rollout_rows)

    @property
    def rollout_row(self) -> float:
        """Training's own estimate of bytes per rollout row, by which it chooses how many are generated at once."""
        shape, length = self.shape, self.prompt + self.completion
        widest = 4 * shape.hidden + 3 * shape.intermediate
        mask = (1 + self.bytes) * self.prompt**2
        return self.cached(length) + length * widest * self.bytes + mask + 24 * shape.vocabulary

    @property
    def has_shadow(self) -> bool:
        return self.teacher == "ema" or (self.teacher == "base" and self.tuning == "full")

    @property
    def scoring_rows(self) -> int:
        """Rows per batch of the scoring pass: a multiple of `generations`, if a prompt's completions fit in one."""
        rows = min(self.rows, max(1, self.scoring_tokens // (self.teacher_prompt + self.completion)))
        return rows - rows % self.generations if rows > self.generations else rows

    @property
    def scoring_forwards(self) -> int:
        """Forwards of one scoring pass: with shared prompts two per batch, one over prompts, one over completions."""
        return -(-self.rows // self.scoring_rows) * (2 if self.generations > 1 else 1)
