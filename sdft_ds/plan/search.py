"""Ways to run a training line: as it is, with smaller batches, with an adapter, and at last with offloading."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from sdft_ds.plan import vllm
from sdft_ds.plan.cluster import GIB, Cluster
from sdft_ds.plan.job import OFFLOAD, OFFLOAD_OPTIMIZER, PLAIN, ZERO_2, ZERO_3, Job, Setup, Vllm
from sdft_ds.plan.model_shape import ModelShape
from sdft_ds.plan.request import LORA, QLORA, job_of

MOST_GPUS = 8192


@dataclass(frozen=True)
class Option:
    """changes: settings that differ from the line's. fits: whether the job does, under the setup."""

    changes: dict[str, Any]
    job: Job
    setup: Setup
    fits: bool

    @property
    def offloads(self) -> bool:
        return self.setup.offload_optimizer or self.setup.offload_parameters

    @property
    def served(self) -> bool:
        """Whether it takes GPUs besides those of training."""
        return self.setup.vllm is not None and not self.setup.vllm.colocated


@dataclass(frozen=True)
class Search:
    """values: of all settings. given: the setup that the line names. servers: of vLLM, where there are any."""

    values: dict[str, Any]
    shape: ModelShape
    cluster: Cluster
    given: Setup | None = None
    servers: int = 1

    def options(self) -> list[Option]:
        """Setups for what the line trains, in the order of preference and with the line's own among them; then one for
        each kind of adapter."""
        on_gpu, offloading = list(self._best({}, self._on_gpu)), list(self._offloading_options())
        named = {option.setup.config for option in (*on_gpu, *offloading)}
        if self.given is not None and self.given.config not in named:
            on_gpu += self._best({}, lambda job: [self._as_set(self.given)])
        adapters = []
        others = {"full": (LORA, QLORA), "lora": (QLORA,), "qlora": ()}[on_gpu[0].job.tuning]
        for changes in others if not self.cluster.on_cpu else others[:-1]:  # QLoRA is slow on a CPU
            found = list(self._best(changes, self._on_gpu))
            adapters.append(next((each for each in found if each.fits), found[0]))
        return [*on_gpu, *offloading, *adapters]

    def recommended(self, options: Iterable[Option]) -> Option | None:
        """The first that fits; an adapter comes before offloading, and that before servers."""
        fitting = [option for option in options if option.fits]
        return min(fitting, key=lambda each: (each.served, each.offloads), default=None)

    def is_given(self, option: Option) -> bool:
        """Whether it is the line's own setup with the line's own settings."""
        return self.given is not None and option.setup == self._as_set(self.given) and not option.changes

    def as_it_is(self) -> Option | None:
        """The line with its own setup, if it names one."""
        if self.given is None:
            return None
        job = job_of(self.values, self.cluster, self.shape)
        return self._with_settings({}, job, self._as_set(self.given))

    def with_vllm(self, option: Option) -> Option | None:
        """The same with rollouts by vLLM in the training processes, if that fits."""
        if option.setup.vllm is not None or option.setup.config is None or self.cluster.on_cpu:
            return None
        found = self._with_settings(option.changes, option.job, self.cluster.colocated(option.job, option.setup))
        return found if found.fits else None

    def advice(self) -> str:
        """What to change if nothing fits."""
        nodes = self.cluster.nodes
        while not self.cluster.on_cpu and nodes * self.cluster.gpus < MOST_GPUS:
            nodes *= 2
            larger = replace(self, cluster=replace(self.cluster, nodes=nodes))
            if found := larger.recommended(larger.options()):
                named = {"full": "", "lora": " with an adapter", "qlora": " with QLoRA"}[found.job.tuning]
                return f"Nothing fits. On {nodes} nodes it does{named} ({found.setup.name})."
        return "Nothing fits: what is not sharded is too much. Lower per_device_train_batch_size or the lengths."

    def cheapest(self) -> Option | None:
        """The first that fits with the line's own settings, servers last."""
        job = job_of(self.values, self.cluster, self.shape)
        setups = [ZERO_2, ZERO_3, self.cluster.colocated(job, ZERO_3)]
        for setup in (OFFLOAD_OPTIMIZER, OFFLOAD):
            setups += [setup, self.cluster.colocated(job, setup)]
        setups += [self.served(job, setup) for setup in (ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD)]
        tried = (self._with_settings({}, job, setup) for setup in setups)
        return next((option for option in tried if option.fits), None)

    def served(self, job: Job, setup: Setup) -> Setup:
        return self.cluster.served(job, setup, self.servers, self.values["vllm_weight_sync"])

    def _offloading_options(self) -> Iterator[Option]:
        """Those that offload, and where not even they fit those with vLLM's servers."""
        if self.cluster.on_cpu:
            return
        found = list(self._best({}, self._offloading))
        yield from found
        if not any(option.fits for option in found) and not self.values["use_vllm"]:
            setups = (ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD)
            yield from self._best({}, lambda job: [self.served(job, setup) for setup in setups])

    def _on_gpu(self, job: Job) -> list[Setup]:
        """Setups without offloading, the preferred first."""
        if self.cluster.on_cpu:
            return [PLAIN]
        if self.values["use_vllm"]:
            own = [self._as_set(setup) for setup in (ZERO_2, ZERO_3)]
            return own if self.values["vllm_mode"] == "server" else [*own, self.cluster.colocated(job, ZERO_3)]
        sharded = [ZERO_3, self.cluster.colocated(job, ZERO_3)]
        if job.tuning == "qlora" and job.bits == 8:
            sharded = []  # 8-bit weights cannot be sharded
        if job.ranks > 1:
            return [ZERO_2, *sharded]
        # Of one process nothing is sharded. Frozen weights are in the compute dtype without DeepSpeed as well.
        return [PLAIN, ZERO_2] if job.tuning != "full" and self.given is None else [ZERO_2, PLAIN]

    def _offloading(self, job: Job) -> list[Setup]:
        if job.tuning == "qlora" and job.bits == 8:
            return []
        setups = [OFFLOAD_OPTIMIZER, OFFLOAD]
        if self.values["use_vllm"]:
            return [self._as_set(setup) for setup in setups]
        return [each for setup in setups for each in (setup, self.cluster.colocated(job, setup))]

    def _best(self, changes: dict[str, Any], setups: Callable[[Job], list[Setup]]) -> Iterator[Option]:
        """For each setup the option with the largest batch that fits; one with vLLM that the line does not ask for
        only where it fits and the one before it does not."""
        jobs = [(more, job_of(self.values | more, self.cluster, self.shape)) for more in self._batches(changes)]
        before = None
        for i, _ in enumerate(setups(jobs[0][1])):
            tried = [self._with_settings(more, job, setups(job)[i]) for more, job in jobs]
            found = next((option for option in tried if option.fits), tried[0])
            unasked = found.setup.vllm is not None and found.setup != self._as_set(found.setup) and not found.served
            if not unasked or (found.fits and not (before is not None and before.fits)):
                yield found
            before = found

    def _batches(self, changes: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The batch as given, then halves of it with as many rows in a step."""
        values = self.values | changes
        batch, accumulation = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
        steps, more = values["steps_per_generation"], dict(changes)
        while True:
            yield more
            if batch % 2:
                return
            batch, accumulation, steps = batch // 2, 2 * accumulation, steps and 2 * steps
            more = changes | {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
            if steps:
                more["steps_per_generation"] = steps

    def _with_settings(self, changes: dict[str, Any], job: Job, setup: Setup) -> Option:
        """The option, with vLLM's settings among the changes where the setup's are not the line's."""
        engine = setup.vllm
        if engine is not None and setup != self._as_set(setup):
            changes = changes | {"use_vllm": True, "vllm_mode": "colocate" if engine.colocated else "server"}
            if engine.colocated:
                changes |= {
                    "vllm_gpu_memory_utilization": round(engine.memory / GIB / self.cluster.memory, 2),
                    "vllm_tensor_parallel_size": engine.parallel,
                    "vllm_max_model_length": engine.length,
                    "vllm_enable_sleep_mode": engine.sleeps,
                }
        return Option(changes, job, setup, self.cluster.fits(job, setup))

    def _as_set(self, setup: Setup) -> Setup:
        """The setup with rollouts as the line's own settings say."""
        values = self.values
        if not values["use_vllm"]:
            return replace(setup, vllm=None)
        job = job_of(values, self.cluster, self.shape)
        if values["vllm_mode"] == "server":
            return self.served(job, setup)
        length = values["vllm_max_model_length"] or self.shape.positions
        memory = values["vllm_gpu_memory_utilization"] * self.cluster.memory * GIB
        size, sleeps = values["vllm_tensor_parallel_size"], values["vllm_enable_sleep_mode"]
        return replace(setup, vllm=Vllm(memory, length, parallel=size, sleeps=sleeps))


def why_vllm_does_not_start(job: Job, setup: Setup) -> str | None:
    """A sentence where vLLM's share holds less than it needs to start."""
    engine = setup.vllm
    if engine is None or vllm.least(job, engine) <= engine.memory:
        return None
    return (
        f"vLLM does not start with less than {vllm.least(job, engine) / GIB:.1f} GiB, for weights, activations and a "
        f"sequence of {engine.length} tokens: raise vllm_gpu_memory_utilization or vllm_tensor_parallel_size, or "
        "lower vllm_max_model_length."
    )
