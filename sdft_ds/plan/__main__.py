"""Will it fit? Memory per rank of a training job, by ZeRO stage, and the command that runs it.

python -m sdft_ds.plan --model_name_or_path MODEL --gpus 8 --nodes 2 --memory 80 [flags of training] [--scaling]
python -m sdft_ds.plan --survey          7B, 70B and 405B on 1 ... 512 GPUs, as Markdown

No weights are loaded: MODEL is a folder or file with a config.json, a name on the hub, or 7b, 70b, 405b. Prompts and
completions are assumed to be as long as their limits allow. Loading and saving a model are not included.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from transformers.hf_argparser import string_to_bool

from sdft_ds.cli.arguments import ModelArguments
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.teacher import TEACHER_KINDS
from sdft_ds.plan import traffic
from sdft_ds.plan.footprint import (
    OFFLOAD,
    OFFLOAD_OPTIMIZER,
    PARTS,
    SETUPS,
    ZERO_2,
    ZERO_3,
    Footprint,
    Job,
    Setup,
    footprint,
)
from sdft_ds.plan.model_shape import BUILT_IN, ModelShape, load_shape

GIB = 1 << 30
# Cheapest first; the last three gather each layer for every token of a rollout.
ORDER = [ZERO_2, ZERO_3, OFFLOAD_OPTIMIZER, OFFLOAD]
ORDER += [replace(setup, gather=False) for setup in ORDER[1:]]
LORA = ["--use_peft", "--lora_target_modules", "all-linear"]
SURVEYED = [1, 8, 16, 32, 64, 128, 256, 512]

# Flags of training that affect memory, with training's names and, except for DECIDED, its defaults.
TRAINING = {
    "per_device_train_batch_size": int, "gradient_accumulation_steps": int, "num_generations": int,
    "max_prompt_length": int, "max_teacher_prompt_length": int, "max_completion_length": int,
    "scoring_batch_tokens": int, "rollout_batch_tokens": int, "distillation_topk": int, "loss_chunk_tokens": int,
    "full_logit_distillation": bool,
    "teacher_model_kind": str, "teacher_shadow_device": str, "bf16": bool, "activation_checkpointing": bool,
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
        """Memory of a job. As in training, rollouts use half of the free memory unless rollout_batch_tokens is set."""
        found = footprint(job, setup)
        if job.rollout_tokens is None:
            rest = sum(size for part, size in found.phases["rollout"].items() if part not in OF_ROLLOUTS)
            rows = max(1, int(((self.memory - self.overhead) * GIB - rest) / 2 / job.rollout_row))
            if rows < job.rows:
                found = footprint(replace(job, rollout_tokens=rows * (job.prompt + job.completion)), setup)
        return found

    def fits(self, found: Footprint) -> bool:
        return found.peak / GIB + self.overhead <= self.memory and found.host * self.gpus / GIB <= self.host_memory


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
    for name in ("gpus", "nodes", *(name for name, kind in TRAINING.items() if kind is int)):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(args, name)}.")
    ranks, peft = args.gpus * args.nodes, args.use_peft
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


def cheapest(job: Job, cluster: Cluster) -> tuple[Setup, Footprint] | None:
    """The first setup of ORDER that fits, or None."""
    for setup in ORDER:
        if cluster.fits(found := cluster.footprint(job, setup)):
            return setup, found
    return None


def command(args: argparse.Namespace, setup: Setup) -> str:
    """The command that runs the job: with deepspeed on one node, as a SLURM job on several."""
    model = "MODEL" if args.model_name_or_path in BUILT_IN else args.model_name_or_path
    flags = [f"--deepspeed ds_configs/{setup.config}.json", f"--model_name_or_path {model}"]
    flags += ["--dataset_path DATA", "--output_dir OUTPUT"]
    for name in TRAINING:
        value = getattr(args, name)
        if value != default(name) or name == "max_teacher_prompt_length":
            flags.append(f"--{name} " + (" ".join(value) if isinstance(value, list) else str(value).lower()))
    if not setup.gather:
        flags.append("--ds3_gather_for_generation false")
    start = (
        f"deepspeed --num_gpus {args.gpus} launch/train.py"
        if args.nodes == 1
        else f"sbatch --nodes {args.nodes} launch/slurm/train.sbatch"
    )
    return " \\\n    ".join([start, *flags])


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """The full plan, in bytes and seconds; if nothing fits, `command` is None and `advice` is set."""
    shape = load_shape(args.model_name_or_path)
    job, cluster = job_of(args, shape), _cluster(args)
    setups = [*SETUPS, *(setup for setup in ORDER if not setup.gather)]
    best = cheapest(job, cluster)
    found = {
        "job": {**asdict(job), "shape": {**asdict(shape), "linears": len(shape.linears)}},
        "setups": [_report(job, setup, cluster) for setup in setups],
        "command": command(args, best[0]) if best else None,
        "advice": None if best else _advice(args, shape),
        "received per step": traffic.volumes(job, best[0]) if best else None,
    }
    if args.scaling and best:
        machine = traffic.Machine(**{name: getattr(args, name) for name in traffic.Machine.__dataclass_fields__})
        times = traffic.weak_scaling(job, best[0], machine)
        found["scaling"] = [asdict(time) | {"bounds": time.bounds} for time in times]
        found["assumptions"] = traffic.ASSUMPTIONS.format(**asdict(machine))
    return found


def _cluster(args: argparse.Namespace) -> Cluster:
    return Cluster(**{name: getattr(args, name) for name in Cluster.__dataclass_fields__})


def _report(job: Job, setup: Setup, cluster: Cluster) -> dict[str, Any]:
    found = cluster.footprint(job, setup)
    return {
        "setup": setup.config + ("" if setup.gather else ", layer by layer"),
        "parts": found.parts, "peak": found.peak, "phase": found.peak_phase, "host": found.host,
        "fits": cluster.fits(found),
    }  # fmt: skip


def _advice(args: argparse.Namespace, shape: ModelShape) -> str:
    """What to change if nothing fits: train fewer parameters, or use more nodes."""
    for tuning in ({"use_peft": True}, {"use_peft": True, "load_in_4bit": True}):
        job = job_of(argparse.Namespace(**{**vars(args), **tuning, "lora_target_modules": None}), shape)
        if found := cheapest(job, _cluster(args)):
            flags = " ".join(LORA + (["--load_in_4bit"] if "load_in_4bit" in tuning else []))
            return f"Nothing fits. With {flags} it does ({found[0].config})."
    nodes = args.nodes
    while nodes * args.gpus < 8192:
        nodes *= 2
        larger = argparse.Namespace(**{**vars(args), "nodes": nodes})
        if found := cheapest(job_of(larger, shape), _cluster(larger)):
            return f"Nothing fits. On {nodes} nodes it does ({found[0].config})."
    return "Nothing fits: what is not sharded is too much. Lower per_device_train_batch_size or the lengths."


def survey(args: argparse.Namespace) -> Iterator[str]:
    """The built-in models on 1 ... 512 GPUs, 8 per node, as rows of a Markdown table."""
    yield "| model, trained | " + " | ".join(map(str, SURVEYED)) + " |"
    yield "|---" * (len(SURVEYED) + 1) + "|"
    for name in BUILT_IN:
        shape = load_shape(name)
        for tuning, flags in (
            ("full", {}),
            ("LoRA", {"use_peft": True}),
            ("QLoRA", {"use_peft": True, "load_in_4bit": True}),
        ):
            cells = []
            for ranks in SURVEYED:
                sized = {"gpus": min(ranks, 8), "nodes": max(1, ranks // 8), **flags}
                here = argparse.Namespace(**{**vars(args), **sized})
                best = cheapest(job_of(here, shape), _cluster(here))
                cells.append(f"{_short(best[0])} {best[1].peak / GIB:.0f}" if best else "-")
            yield f"| {name.upper()} {tuning} | " + " | ".join(cells) + " |"


def _short(setup: Setup) -> str:
    offload = "P" if setup.offload_parameters else "O" if setup.offload_optimizer else ""
    return f"{setup.stage}{offload}{'' if setup.gather else 'L'}:"


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
    console.print(table)
    console.print(
        f"Each part at its largest; the peak is the largest sum of a phase. Besides it {args.overhead:g} GiB are left "
        "for the CUDA context, NCCL and the allocator (--overhead; an assumption). Host: of "
        f"{args.host_memory:g} GiB of a node. Layer by layer: with --ds3_gather_for_generation false.\n"
    )
    if found["advice"]:
        console.print(found["advice"])
        return
    moved = found["received per step"]
    listed = ", ".join(f"{name} {size / GIB:.3g}" for name, size in moved.items() if size)
    console.print(f"A rank receives {sum(moved.values()) / GIB:.3g} GiB per optimizer step: {listed or 'nothing'}.")
    console.print(f"The cheapest that fits:\n\n{found['command']}\n", soft_wrap=True)
    if "scaling" in found:
        _show_scaling(found, console)


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
    console.print(found["assumptions"])


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
    parser.add_argument("--survey", action="store_true", help="the built-in models on 1 ... 512 GPUs, as Markdown")
    parser.add_argument("--scaling", action="store_true", help="simulate weak scaling up to 4096 ranks")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes and seconds")
    for name, field in traffic.Machine.__dataclass_fields__.items():
        parser.add_argument(f"--{name}", type=float, default=field.default, help="of the simulation; see its notes")
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
