"""Will it fit? Memory per rank of a training job, by ZeRO stage, and the command that runs it.

python -m sdft_ds.plan --model_name_or_path MODEL --gpus 8 --nodes 2 --memory 80 [flags of training] [--scaling]
python -m sdft_ds.plan --survey          7B to 405B on 1 ... 512 GPUs, as Markdown

No weights are loaded: MODEL is a folder or file with a config.json, a name on the hub, or 7b, 32b, 70b, 405b. Prompts
and completions are assumed to be as long as their limits allow. Loading and saving a model are not included. Rollouts
are in the training process, or by vLLM: with --use_vllm as its settings say, else where no other setup fits.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import string_to_bool

from sdft_ds.cli.arguments import ModelArguments
from sdft_ds.config.fields import check_ranges
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.teacher import TEACHER_KINDS
from sdft_ds.config.vllm import VllmSettings
from sdft_ds.model.prefix_cache import memory_budget
from sdft_ds.plan import traffic, vllm
from sdft_ds.plan.footprint import PARTS, Footprint, footprint
from sdft_ds.plan.job import OFFLOAD, OFFLOAD_OPTIMIZER, SETUPS, ZERO_2, ZERO_3, Job, Setup, Vllm
from sdft_ds.plan.machine import ASSUMPTIONS, ROLLOUTS, Machine
from sdft_ds.plan.model_shape import BUILT_IN, ModelShape, load_shape

GIB = 1 << 30
ORDER = [ZERO_2, ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD]  # cheapest first
COLOCATED_SIZES, SERVER_SIZES = (1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)  # GPUs that share an engine
MOST_UTILIZED = 0.9  # share of a GPU's memory that vLLM takes at most; also a server's
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]
SURVEYED = [1, 8, 16, 32, 64, 128, 256, 512]

# Flags of training that affect memory, with training's names and, except for DECIDED, its defaults.
TRAINING = {
    "per_device_train_batch_size": int, "gradient_accumulation_steps": int, "num_generations": int,
    "max_prompt_length": int, "max_teacher_prompt_length": int, "max_completion_length": int,
    "scoring_batch_tokens": int, "rollout_batch_tokens": int, "distillation_topk": int, "loss_chunk_tokens": int,
    "full_logit_distillation": bool,
    "teacher_model_kind": str, "teacher_shadow_device": str, "bf16": bool, "activation_checkpointing": bool,
    "use_vllm": bool, "vllm_mode": str, "vllm_gpu_memory_utilization": float, "vllm_tensor_parallel_size": int,
    "vllm_max_model_length": int, "vllm_enable_sleep_mode": bool, "vllm_weight_sync": str,
    "use_peft": bool, "load_in_4bit": bool, "lora_r": int, "lora_target_modules": list,
}  # fmt: skip
# Defaults that training resolves later or takes from the model's context length; the plan needs values.
DECIDED = {"bf16": True, "activation_checkpointing": True, "max_teacher_prompt_length": 2048}
OF_ROLLOUTS = ("KV cache", "activations", "logits chunk")  # parts that grow with the rows of a rollout


@dataclass(frozen=True)
class Cluster:
    """gpus: per node. memory: GiB per GPU, of which `overhead` GiB hold no tensors. host_memory: GiB per node."""

    gpus: int
    nodes: int
    memory: float
    overhead: float
    host_memory: float

    def footprint(self, job: Job, setup: Setup) -> Footprint:
        """Memory of a job. As in training, rollouts use half of the free memory or less, or rollout_batch_tokens."""
        found = footprint(job, setup)
        if job.rollout_tokens is None and setup.vllm is None:
            rest = sum(size for part, size in found.phases["rollout"].items() if part not in OF_ROLLOUTS)
            rows = max(1, memory_budget(int((self.memory - self.overhead) * GIB - rest)) // job.rollout_row)
            if rows < job.rows:
                found = footprint(replace(job, rollout_tokens=rows * (job.prompt + job.completion)), setup)
        return found

    def fits(self, job: Job, setup: Setup) -> bool:
        found, engine = self.footprint(job, setup), setup.vllm
        return (
            found.peak / GIB + self.overhead <= self.memory
            and found.host * self.gpus / GIB <= self.host_memory
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

    def served(self, job: Job, setup: Setup, engine: Vllm) -> Setup:
        """With vLLM's servers on other GPUs, each on as few as hold it."""
        for size in SERVER_SIZES:
            found = replace(engine, memory=MOST_UTILIZED * self.memory * GIB, colocated=False, parallel=size)
            if job.shape.heads % size == 0 and vllm.least(job, found) <= found.memory:
                break
        return replace(setup, vllm=found)


def default(name: str) -> Any:
    """Default of a flag: DECIDED's, else training's."""
    owner = SDFTConfig if name in SDFTConfig.__dataclass_fields__ else ModelArguments
    return DECIDED.get(name, owner.__dataclass_fields__[name].default)


def job_of(args: argparse.Namespace, shape: ModelShape) -> Job:
    """The job that the flags describe. Raises ValueError for settings that training refuses."""
    if args.load_in_4bit and not args.use_peft:
        raise ValueError("load_in_4bit: quantized weights cannot be trained; add --use_peft.")
    if args.teacher_model_kind not in (None, *TEACHER_KINDS):
        raise ValueError(
            f"teacher_model_kind must be one of {', '.join(TEACHER_KINDS)}, not {args.teacher_model_kind!r}."
        )
    check_ranges(VllmSettings(**_vllm_settings(args)))
    for name in ("gpus", "nodes", "servers", *(name for name, kind in TRAINING.items() if kind is int)):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(args, name)}.")
    ranks, peft = args.gpus * args.nodes, args.use_peft
    size = args.vllm_tensor_parallel_size if args.use_vllm and args.vllm_mode == "colocate" else 1
    for what, number in ((f"{ranks} ranks", ranks), (f"{shape.heads} attention heads", shape.heads)):
        if number % size:
            raise ValueError(f"vllm_tensor_parallel_size={size} must divide the {what}.")
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    if rows % args.num_generations:
        raise ValueError(
            f"num_generations={args.num_generations} does not divide the {rows} rows of an optimizer step "
            "(per_device_train_batch_size x gradient_accumulation_steps x ranks)."
        )
    return Job(
        shape=shape,
        ranks=ranks,
        tuning="full" if not peft else "qlora" if args.load_in_4bit else "lora",
        adapter=shape.adapter_parameters(args.lora_r, args.lora_target_modules) if peft else 0,
        teacher=args.teacher_model_kind or ("base" if peft else "live"),
        shadow_on_host=args.teacher_shadow_device == "cpu",
        bf16=args.bf16,
        checkpointing=args.activation_checkpointing,
        batch=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        generations=args.num_generations,
        prompt=args.max_prompt_length,
        teacher_prompt=args.max_teacher_prompt_length,
        completion=args.max_completion_length,
        scoring_tokens=args.scoring_batch_tokens,
        rollout_tokens=args.rollout_batch_tokens,
        topk=None if args.full_logit_distillation else args.distillation_topk,
        chunk_tokens=args.loss_chunk_tokens,
    )


def _vllm_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in TRAINING if name in VllmSettings.__dataclass_fields__}


def as_set(job: Job, cluster: Cluster, args: argparse.Namespace, setup: Setup) -> Setup:
    """The setup with rollouts as the settings say."""
    if not args.use_vllm:
        return setup
    length = args.vllm_max_model_length or job.shape.positions
    if args.vllm_mode == "server":
        engine = Vllm(0, job.prompt + job.completion, servers=args.servers, sync=args.vllm_weight_sync)
        return cluster.served(job, setup, engine)
    memory = args.vllm_gpu_memory_utilization * cluster.memory * GIB
    sleeps = args.vllm_enable_sleep_mode
    return replace(setup, vllm=Vllm(memory, length, parallel=args.vllm_tensor_parallel_size, sleeps=sleeps))


def by_vllm(job: Job, cluster: Cluster, args: argparse.Namespace, setup: Setup) -> list[Setup]:
    """The setup with vLLM as it would be best: colocated without and with sleep mode, and by a server."""
    sleeping = cluster.colocated(job, setup)
    engine = Vllm(0, job.prompt + job.completion, servers=args.servers, sync=args.vllm_weight_sync)
    return [
        replace(setup, vllm=replace(sleeping.vllm, sleeps=False)),
        sleeping,
        cluster.served(job, setup, engine),
    ]


def candidates(job: Job, cluster: Cluster, args: argparse.Namespace) -> Iterator[Setup]:
    """Setups in the order of preference. Without use_vllm: vLLM in the training processes only where rollouts there do
    not fit without it, and a server only where nothing else does."""
    if args.use_vllm:
        yield from (as_set(job, cluster, args, setup) for setup in ORDER)
        return
    for setup in ORDER:
        yield setup
        if setup.stage == 3:
            yield cluster.colocated(job, setup)
    yield from (by_vllm(job, cluster, args, setup)[-1] for setup in ORDER if setup.stage == 3)


def cheapest(job: Job, cluster: Cluster, args: argparse.Namespace) -> Setup | None:
    """The first candidate that fits, or None."""
    return next((setup for setup in candidates(job, cluster, args) if cluster.fits(job, setup)), None)


def chosen(args: argparse.Namespace, cluster: Cluster, setup: Setup) -> argparse.Namespace:
    """The settings with which training runs as in the setup."""
    engine = setup.vllm
    if engine is None or args.use_vllm:
        return args
    found = {"use_vllm": True, "vllm_mode": "colocate" if engine.colocated else "server"}
    if engine.colocated:
        found |= {
            "vllm_gpu_memory_utilization": round(engine.memory / GIB / cluster.memory, 2),
            "vllm_tensor_parallel_size": engine.parallel,
            "vllm_max_model_length": engine.length,
            "vllm_enable_sleep_mode": engine.sleeps,
        }
    return argparse.Namespace(**{**vars(args), **found})


def command(args: argparse.Namespace, setup: Setup) -> str:
    """The command that runs the job: with deepspeed on one node, as a SLURM job on several."""
    model = _model(args)
    flags = [f"--deepspeed ds_configs/{setup.config}.json", f"--model_name_or_path {model}"]
    flags += ["--dataset_path DATA", "--output_dir OUTPUT"]
    for name in TRAINING:
        value = getattr(args, name)
        if value != default(name) or name == "max_teacher_prompt_length":
            flags.append(_flag(name, value))
    if setup.vllm is not None and not setup.vllm.colocated:
        hosts = ",".join(f"http://HOST{i + 1}:8000" for i in range(setup.vllm.servers))
        flags.append(f"--vllm_server_base_url {hosts}")
    start = (
        f"deepspeed --num_gpus {args.gpus} launch/train.py"
        if args.nodes == 1
        else f"sbatch --nodes {args.nodes} launch/slurm/train.sbatch"
    )
    return " \\\n    ".join([start, *flags])


def server_command(args: argparse.Namespace, setup: Setup) -> str:
    """The command that starts one server; it has a machine of its own."""
    length = args.max_prompt_length + args.max_completion_length
    size = f"--tensor-parallel-size {setup.vllm.parallel} --max-model-len {length}"
    adapter = f"--lora-rank {args.lora_r} " if args.use_peft else ""
    return f"bash launch/vllm_server.sh {adapter}{_model(args)} --host 0.0.0.0 {size}"


def _model(args: argparse.Namespace) -> str:
    return "MODEL" if args.model_name_or_path in BUILT_IN else args.model_name_or_path


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """The full plan, in bytes and seconds; if nothing fits, `command` is None and `advice` is set."""
    shape = load_shape(args.model_name_or_path)
    job, cluster, machine = job_of(args, shape), _cluster(args), _machine(args)
    best = cheapest(job, cluster, args)
    setups = [as_set(job, cluster, args, setup) for setup in SETUPS]
    if not args.use_vllm:
        setups += by_vllm(job, cluster, args, ZERO_3 if best is None else replace(best, vllm=None))
    found = {
        "job": {**asdict(job), "shape": {**asdict(shape), "linears": len(shape.linears)}},
        "setups": [_report(job, setup, cluster, machine) for setup in setups],
        "command": None, "server": None, "layer by layer": None, "received per step": None,
        "advice": _advice(args, shape) if best is None else None,
        "assumptions": ROLLOUTS.format(**asdict(machine)),
    }  # fmt: skip
    if best is None:
        return found
    found["command"] = command(chosen(args, cluster, best), best)
    found["received per step"] = traffic.volumes(job, best)
    if best.vllm is not None:
        if not best.vllm.colocated:
            found["server"] = {"gpus": best.vllm.parallel, "command": server_command(args, best)}
        if not args.use_vllm:
            found["layer by layer"] = traffic.layerwise_seconds(job, machine)
    if args.scaling:
        times = traffic.weak_scaling(job, best, machine)
        found["scaling"] = [asdict(time) | {"bounds": time.bounds} for time in times]
        found["assumptions"] = ASSUMPTIONS.format(rollouts=found["assumptions"], **asdict(machine))
    return found


def _machine(args: argparse.Namespace) -> Machine:
    return Machine(**{name: getattr(args, name) for name in Machine.__dataclass_fields__})


def _cluster(args: argparse.Namespace) -> Cluster:
    return Cluster(**{name: getattr(args, name) for name in Cluster.__dataclass_fields__})


def _report(job: Job, setup: Setup, cluster: Cluster, machine: Machine) -> dict[str, Any]:
    found = cluster.footprint(job, setup)
    return {
        "setup": setup.name,
        "vllm": None if setup.vllm is None else {**asdict(setup.vllm), "least": vllm.least(job, setup.vllm)},
        "parts": found.parts, "peak": found.peak, "phase": found.peak_phase, "host": found.host,
        "fits": cluster.fits(job, setup),
        "rollout": traffic.rollout_seconds(job, setup, machine),
        "weights": traffic.weights_seconds(job, setup, machine),
    }  # fmt: skip


def _advice(args: argparse.Namespace, shape: ModelShape) -> str:
    """What to change if nothing fits: vLLM's settings, training fewer parameters, or more nodes."""
    if args.use_vllm:
        auto = argparse.Namespace(**{**vars(args), "use_vllm": False})
        job, cluster = job_of(auto, shape), _cluster(args)
        if found := cheapest(job, cluster, auto):
            settings = vars(chosen(auto, cluster, found))
            flags = [_flag(name, settings[name]) for name in TRAINING if settings[name] != getattr(args, name)]
            return f"Nothing fits as vLLM is set. With {' '.join(flags)} it does ({found.name})."
    for tuning in ({"use_peft": True}, {"use_peft": True, "load_in_4bit": True}):
        changed = argparse.Namespace(**{**vars(args), **tuning, "lora_target_modules": None})
        if found := cheapest(job_of(changed, shape), _cluster(args), changed):
            flags = " ".join(LORA + (["--load_in_4bit"] if "load_in_4bit" in tuning else []))
            return f"Nothing fits. With {flags} it does ({found.name})."
    nodes = args.nodes
    while nodes * args.gpus < 8192:
        nodes *= 2
        larger = argparse.Namespace(**{**vars(args), "nodes": nodes})
        if found := cheapest(job_of(larger, shape), _cluster(larger), larger):
            return f"Nothing fits. On {nodes} nodes it does ({found.name})."
    return "Nothing fits: what is not sharded is too much. Lower per_device_train_batch_size or the lengths."


def _flag(name: str, value: Any) -> str:
    return f"--{name} " + (" ".join(value) if isinstance(value, list) else str(value).lower())


def survey(args: argparse.Namespace) -> Iterator[str]:
    """The built-in models on 1 ... 512 GPUs, 8 per node, as rows of a Markdown table."""
    shapes = {name: load_shape(name) for name in BUILT_IN}
    yield "| model, trained | " + " | ".join(map(str, SURVEYED)) + " |"
    yield "|---" * (len(SURVEYED) + 1) + "|"
    for name, shape in shapes.items():
        for tuning, flags in (
            ("full", {}),
            ("LoRA", {"use_peft": True}),
            ("QLoRA", {"use_peft": True, "load_in_4bit": True}),
        ):
            cells = []
            for ranks in SURVEYED:
                sized = {"gpus": min(ranks, 8), "nodes": max(1, ranks // 8), **flags}
                here = argparse.Namespace(**{**vars(args), **sized})
                job, cluster = job_of(here, shape), _cluster(here)
                best = cheapest(job, cluster, here)
                cells.append(f"{_short(best)} {cluster.footprint(job, best).peak / GIB:.0f}" if best else "-")
            yield f"| {name.upper()} {tuning} | " + " | ".join(cells) + " |"
    yield ""
    yield "| a generation batch of 512 rows | vLLM colocated on 64 GPUs | vLLM servers | layer by layer |"
    yield "|---|---|---|---|"
    for name, shape in shapes.items():
        here = argparse.Namespace(**{**vars(args), "gpus": 8, "nodes": 8})
        job, cluster, machine = job_of(here, shape), _cluster(here), _machine(here)
        size = by_vllm(job, cluster, here, ZERO_3)[-1].vllm.parallel
        here.servers = max(1, 8 // size)  # a node of them, or more if one server takes more
        cells = []
        for setup in by_vllm(job, cluster, here, ZERO_3)[1:]:
            engine = setup.vllm
            seconds = traffic.rollout_seconds(job, setup, machine), traffic.weights_seconds(job, setup, machine)
            where = f"TP {engine.parallel}" if engine.colocated else f"{engine.servers} x {engine.parallel} GPUs"
            holds = vllm.least(job, engine) <= engine.memory
            cells.append(f"{where}: {seconds[0]:.1f} + {seconds[1]:.1f} s" if holds else "-")
        yield f"| {name.upper()} full | {' | '.join(cells)} | {traffic.layerwise_seconds(job, machine):.0f} s |"


def _short(setup: Setup) -> str:
    offload = "P" if setup.offload_parameters else "O" if setup.offload_optimizer else ""
    engine = setup.vllm
    by = "" if engine is None else f"{'V' if engine.colocated else 'S'}{engine.parallel}"
    return f"{setup.stage}{offload}{by}:"


def show(args: argparse.Namespace, found: dict[str, Any], console: Console) -> None:
    """Prints the plan."""
    ranks, parameters = args.gpus * args.nodes, found["job"]["shape"]["parameters"]
    title = (
        f"{args.model_name_or_path}, {parameters / 1e9:.3g} billion parameters, {found['job']['tuning']}, teacher "
        f"{found['job']['teacher']}, on {ranks} GPUs of {args.memory:g} GiB: GiB for each rank"
    )
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for row in found["setups"]:
        table.add_column(row["setup"].replace("_", " "), justify="right")
    for part in PARTS:
        table.add_row(part, *(_gib(row["parts"][part]) for row in found["setups"]))
    table.add_section()
    for line, of in (("peak", _gib), ("phase", str), ("host", _gib), ("fits", lambda fits: "yes" if fits else "no")):
        table.add_row(line, *(of(row[line]) for row in found["setups"]))
    table.add_section()
    for line, name in (("rollout, s", "rollout"), ("weights there, s", "weights")):
        table.add_row(line, *(f"{row[name]:.2g}" if row[name] < 10 else f"{row[name]:.0f}" for row in found["setups"]))
    console.print(table)
    console.print(
        f"Each part at its largest; the peak is the largest sum of a phase. Besides it {args.overhead:g} GiB are left "
        "for the CUDA context, NCCL and the allocator (--overhead; an assumption). Host: of "
        f"{args.host_memory:g} GiB of a node. The last two lines are estimates for a generation batch.\n"
    )
    engines = {row["setup"].partition(", ")[2]: row["vllm"] for row in found["setups"] if row["vllm"] is not None}
    for name, engine in engines.items():
        gpus = f"{engine['parallel']} GPU{'s' if engine['parallel'] > 1 else ''}"
        share = (
            f"{engine['memory'] / GIB / args.memory:.2f} of {gpus} {'each' if engine['parallel'] > 1 else ''}".strip()
        )
        console.print(
            f"{name}: an engine takes {share}{'' if engine['colocated'] else ', besides those of training'}."
        )
        if engine["least"] > engine["memory"]:
            console.print(
                f"It does not start with less than {engine['least'] / GIB:.1f} GiB, for weights, activations and a "
                f"sequence of {engine['length']} tokens: raise vllm_gpu_memory_utilization or "
                "vllm_tensor_parallel_size, or lower vllm_max_model_length."
            )
    console.print()
    if found["advice"]:
        console.print(found["advice"])
        return
    moved = found["received per step"]
    listed = ", ".join(f"{name} {size / GIB:.3g}" for name, size in moved.items() if size)
    console.print(f"A rank receives {sum(moved.values()) / GIB:.3g} GiB per optimizer step: {listed or 'nothing'}.")
    if found["layer by layer"] is not None:
        console.print(
            "The weights do not fit gathered on a GPU, so rollouts need vLLM (docs/rollouts.md). Without it each "
            "layer would be gathered for each token (--ds3_gather_for_generation false): "
            f"{found['layer by layer'] / 60:.0f} minutes for a generation batch."
        )
    if found["server"] is not None:
        console.print(
            f"A server, on {found['server']['gpus']} more GPUs:\n\n{found['server']['command']}\n", soft_wrap=True
        )
    console.print(f"The cheapest that fits:\n\n{found['command']}\n", soft_wrap=True)
    if "scaling" in found:
        _show_scaling(found, console)
    console.print(found["assumptions"])


def _gib(size: float) -> str:
    return f"{size / GIB:.{2 if size < 10 * GIB else 1}f}"


def _show_scaling(found: dict[str, Any], console: Console) -> None:
    table = Table(title="Weak scaling, simulated: seconds of a step, and the share of the first line's speed per rank")
    for heading in ("ranks", "computing", "collectives", "beside", "one after the other", "speed"):
        table.add_column(heading, justify="right")
    first = found["scaling"][0]["bounds"]
    for row in found["scaling"]:
        best, worst = row["bounds"]
        speed = f"{first[1] / worst:.2f} ... {first[0] / best:.2f}"
        seconds = (row["computing"], row["communicating"], best, worst)
        table.add_row(str(row["ranks"]), *(f"{value:.2f}" for value in seconds), speed)
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdft_ds.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", help="folder, config.json, hub name, or " + ", ".join(BUILT_IN))
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    parser.add_argument("--overhead", type=float, default=6, help="GiB of it that hold no tensors: an assumption")
    parser.add_argument("--host_memory", type=float, default=2000, help="GiB of a node's own memory")
    parser.add_argument("--servers", type=int, default=1, help="vLLM servers, if rollouts are by servers")
    parser.add_argument("--survey", action="store_true", help="the built-in models on 1 ... 512 GPUs, as Markdown")
    parser.add_argument("--scaling", action="store_true", help="simulate weak scaling up to 4096 ranks")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes and seconds")
    for name, field in Machine.__dataclass_fields__.items():
        parser.add_argument(
            f"--{name}", type=float, default=field.default, help="for estimates of time; see their notes"
        )
    training = parser.add_argument_group("training", "as in training; those that memory depends on")
    for name, kind in TRAINING.items():
        options: dict[str, Any] = {"nargs": "?", "const": True, "type": string_to_bool} if kind is bool else {}
        if kind is list:
            options = {"nargs": "+"}
        training.add_argument(f"--{name}", default=default(name), **(options or {"type": kind}))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. A mistake is one line and exit status 1; a job that does not fit is no mistake."""
    args = _parser().parse_args(argv)
    try:
        if args.survey:
            print("\n".join(survey(args)))
            return
        if args.model_name_or_path is None:
            raise ValueError(
                "model_name_or_path is needed: a model's folder or config.json, or " + ", ".join(BUILT_IN)
            )
        found = plan(args)
    except ValueError as error:
        sys.exit(f"sdft_ds.plan: {error}")
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(args, found, Console())


if __name__ == "__main__":
    main()
