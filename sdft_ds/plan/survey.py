"""Tables of the built-in models on 1 ... 512 GPUs of 80 GiB."""

from collections.abc import Iterator
from dataclasses import replace

from sdft_ds.plan import vllm
from sdft_ds.plan.cluster import GIB, Cluster
from sdft_ds.plan.job import ZERO_3, Job, Setup
from sdft_ds.plan.machine import Machine
from sdft_ds.plan.model_shape import BUILT_IN, load_shape
from sdft_ds.plan.request import Line, job_of
from sdft_ds.plan.search import Search
from sdft_ds.plan.step_time import layerwise_seconds, rollout_seconds, weights_seconds

SURVEYED = [1, 8, 16, 32, 64, 128, 256, 512]
TRAINED = {
    "full": [],
    "LoRA": ["--use_peft"],
    "QLoRA": ["--use_peft", "--load_in_4bit"],
}
COMPARED = Cluster(gpus=8, nodes=8, memory=80, overhead=6, host_memory=2000)


def survey() -> Iterator[str]:
    """The rows of two Markdown tables: the cheapest setup of each model, and the time of its rollouts."""
    shapes = {name: load_shape(name) for name in BUILT_IN}
    yield "| model, trained | " + " | ".join(map(str, SURVEYED)) + " |"
    yield "|---" * (len(SURVEYED) + 1) + "|"
    for name, shape in shapes.items():
        for tuning, flags in TRAINED.items():
            values = Line.read(["--model", name, "--recipe", "trl", *flags]).values
            cells = []
            for ranks in SURVEYED:
                cluster = replace(COMPARED, gpus=min(ranks, 8), nodes=max(1, ranks // 8))
                best = Search(values, shape, cluster).cheapest()
                cells.append(
                    f"{_short(best.setup)} {cluster.footprint(best.job, best.setup).peak / GIB:.0f}" if best else "-"
                )
            yield f"| {name.upper()} {tuning} | " + " | ".join(cells) + " |"
    yield ""
    yield "| a generation batch of 512 rows | vLLM colocated on 64 GPUs | vLLM servers | layer by layer |"
    yield "|---|---|---|---|"
    for name, shape in shapes.items():
        values = Line.read(["--model", name, "--recipe", "trl"]).values
        job, search = job_of(values, COMPARED, shape), Search(values, shape, COMPARED)
        size = search.served(job, ZERO_3).vllm.parallel
        served = replace(search, servers=max(1, 8 // size)).served(job, ZERO_3)  # a node, or more if one takes more
        cells = [_rollout(job, setup) for setup in (COMPARED.colocated(job, ZERO_3), served)]
        yield f"| {name.upper()} full | {' | '.join(cells)} | {layerwise_seconds(job, Machine()):.0f} s |"


def _rollout(job: Job, setup: Setup) -> str:
    engine, machine = setup.vllm, Machine()
    if vllm.least(job, engine) > engine.memory:
        return "-"
    where = f"TP {engine.parallel}" if engine.colocated else f"{engine.servers} x {engine.parallel} GPUs"
    return f"{where}: {rollout_seconds(job, setup, machine):.1f} + {weights_seconds(job, setup, machine):.1f} s"


def _short(setup: Setup) -> str:
    offload = "P" if setup.offload_parameters else "O" if setup.offload_optimizer else ""
    engine = setup.vllm
    by = "" if engine is None else f"{'V' if engine.colocated else 'S'}{engine.parallel}"
    return f"{setup.stage}{offload}{by}:"
