"""Will it fit, and how fast? Memory and seconds of a step for a training line, and the command that runs it.

    python -m sdft_ds.plan -- deepspeed launch/train.py --deepspeed ds_configs/zero2.json --model M --dataset D
    python -m sdft_ds.plan --model M --batch_size 4 --gpus 8 --nodes 2 --memory 80
    python -m sdft_ds.plan --survey          7B to 405B on 1 ... 512 GPUs, as Markdown

All settings of training apply; a launcher before them says how many GPUs and nodes. GPUs, their memory and the host's
are those of this machine, unless the flags below say others. No weights are loaded: M is a folder or file with a
config.json, a name on the hub, or 7b, 32b, 70b, 405b. Prompts and completions are taken to be as long as their limits
allow. Loading and saving a model are not included.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from sdft_ds.cli import errors
from sdft_ds.cli.terminal import tidy
from sdft_ds.plan import hardware, step_time, traffic, vllm
from sdft_ds.plan.cluster import GIB, Cluster
from sdft_ds.plan.command import command, flag, server_command
from sdft_ds.plan.machine import ASSUMPTIONS, SCALING, Machine, machine_of
from sdft_ds.plan.model_shape import BUILT_IN, load_shape
from sdft_ds.plan.request import Line
from sdft_ds.plan.search import Option, Search, why_vllm_does_not_start
from sdft_ds.plan.show import shown
from sdft_ds.plan.survey import survey

SPEEDS = [name for name, f in Machine.__dataclass_fields__.items() if f.type is float]


def plan(
    line: Line, cluster: Cluster, machine: Machine | None, servers: int = 1, scaling: bool = False
) -> dict[str, Any]:
    """The full plan, in bytes and seconds; if nothing fits, `command` is None and `advice` is set. machine: None where
    no estimate of time is possible."""
    shape = load_shape(line.model)
    search = Search(line.values, shape, cluster, line.setup, servers)
    options = search.options()
    best = search.recommended(options)
    offered = None if best is None else search.with_vllm(best)
    if offered is not None:
        options.insert(options.index(best) + 1, offered)
    reports = [_report(option, search, machine) for option in options]
    job = options[0].job
    found = {
        "model": line.model,
        "job": {**asdict(job), "shape": {**asdict(shape), "linears": len(shape.linears)}},
        "cluster": asdict(cluster),
        "options": reports,
        "recommended": None if best is None else reports[options.index(best)],
        "command": None if best is None else command(line, cluster, best),
        "others": {},
        "advice": search.advice() if best is None else None,
        "verdict": _verdict(search),
        "notes": _notes(line, search, options, best),
        "assumptions": _assumptions(cluster, machine),
    }
    if best is None:
        return found
    found["others"] = _others(line, cluster, options, best, offered)
    found["received per step"] = traffic.volumes(best.job, best.setup)
    if scaling and machine is not None:
        times = step_time.weak_scaling(best.job, best.setup, machine)
        found["scaling"] = [asdict(time) | {"computing": time.computing, "bounds": time.bounds} for time in times]
        found["assumptions"] += " " + SCALING.format(**asdict(machine))
    return found


def _report(option: Option, search: Search, machine: Machine | None) -> dict[str, Any]:
    job, setup = option.job, option.setup
    found = search.cluster.footprint(job, setup)
    seconds = None
    if machine is not None:
        time = step_time.step_time(search.cluster.with_rollout_rows(job, setup), setup, machine)
        seconds = {
            "rollouts": time.rollout, "teacher and student": time.passes, "host": time.offload,
            "communication": time.communicating,
        }  # fmt: skip
    engine = setup.vllm
    return {
        "setup": setup.name, "given": search.is_given(option),
        "tuning": job.tuning, "changes": option.changes, "batch": job.batch, "accumulation": job.accumulation,
        "vllm": None if engine is None else {**asdict(engine), "least": vllm.least(job, engine)},
        "parts": found.parts, "peak": found.peak, "phase": found.peak_phase, "host": found.host, "fits": option.fits,
        "seconds": seconds,
    }  # fmt: skip


def _verdict(search: Search) -> str | None:
    """Whether the line fits as it is, where it names a setup."""
    option = search.as_it_is()
    if option is None:
        return None
    found = search.cluster.footprint(option.job, option.setup)
    host = f" and {found.host * search.cluster.gpus / GIB:.0f} GiB of host memory" if found.host else ""
    fits = "fits" if option.fits else "does not fit"
    return f"The line as it is ({option.setup.name}) {fits}: {found.peak / GIB:.1f} GiB{host}."


def _others(
    line: Line, cluster: Cluster, options: list[Option], best: Option, offered: Option | None
) -> dict[str, str]:
    """Sentence -> command or flags, of what goes with the recommended option or could take its place."""
    found = {}
    if best.served and not line.starts_servers:
        found[f"A server, on {best.setup.vllm.parallel} more GPUs:"] = server_command(line, best)
    if offered is not None:
        share = offered.setup.vllm.memory / GIB
        flags = [flag(name, value) for name, value in offered.changes.items() if "vllm" in name]
        each = "GPUs" if offered.setup.vllm.parallel > 1 else "GPU"
        title = f"With rollouts by vLLM, which takes {share:.3g} GiB of {offered.setup.vllm.parallel} {each}, add:"
        found[title] = "    " + " \\\n    ".join(flags)
    if best.job.tuning != options[0].job.tuning:
        same = next((each for each in options if each.fits and each.job.tuning == options[0].job.tuning), None)
        if same is not None:
            host = cluster.footprint(same.job, same.setup).host * cluster.gpus / GIB
            needs = f", which takes {host:.0f} GiB of host memory on each node" if host else ""
            kept = "train all weights" if same.job.tuning == "full" else "keep the frozen weights in 16 bits"
            found[f"To {kept} instead, with {same.setup.name}{needs}:"] = command(line, cluster, same)
    plain = next((each for each in options if each.fits and each.setup.config is None), None)
    if plain is not None and plain is not best and plain.job.tuning == best.job.tuning:
        found["It fits without DeepSpeed as well:"] = command(line, cluster, plain)
    return found


def _notes(line: Line, search: Search, options: list[Option], best: Option | None) -> list[str]:
    values, notes = line.values, []
    cluster = search.cluster
    notes += [why for option in options[:1] if (why := why_vllm_does_not_start(option.job, option.setup))]
    if best is not None and best.setup.vllm is not None and not values["use_vllm"] and best.setup.stage == 3:
        notes.append(
            "Gathered, the weights do not fit on a GPU beside the rest, so rollouts need vLLM (docs/rollouts.md)."
        )
    adapts = best is not None and best.job.tuning != "full" == options[0].job.tuning
    if adapts and "learning_rate" in line.names:
        notes.append("An adapter needs about ten times the learning rate of full fine-tuning.")
    if values["max_teacher_prompt_length"] is None:
        notes.append(
            f"No --max_teacher_prompt_length is set: the teacher's prompts are taken to be at most "
            f"{options[0].job.teacher_prompt} tokens."
        )
    if cluster.host_memory is None and best is not None and best.offloads:
        notes.append("The host's memory is not known here: a node needs as much as the column says.")
    if values["method"] == "sft":
        notes.append("Method sft has no rollouts and no teacher: it takes less, and is faster.")
    if not str(values["optim"]).startswith("adamw_torch"):
        notes.append(f"The optimizer's states are counted as those of AdamW, not of {values['optim']}.")
    return notes


def _assumptions(cluster: Cluster, machine: Machine | None) -> str:
    if machine is not None:
        return ASSUMPTIONS.format(kernels=step_time.KERNELS, **asdict(machine))
    if cluster.on_cpu:
        return "Seconds of a step are not estimated for a CPU."
    return (
        f"Seconds of a step are not estimated: there is no data sheet of {cluster.device} here. --flops and "
        "--memory_bandwidth give its speed."
    )


def _speeds(flags: argparse.Namespace, cluster: Cluster) -> Machine | None:
    if cluster.on_cpu:
        return None
    given = {name: getattr(flags, name) for name in SPEEDS if getattr(flags, name) is not None}
    found = machine_of(cluster.device, cluster.memory, cluster.nodes, cluster.gpus)
    if found is None and {"flops", "memory_bandwidth"} <= given.keys():
        found = Machine(cluster.device, gpus_per_host=cluster.gpus)
    return found and replace(found, **given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdft_ds.plan",
        usage="python -m sdft_ds.plan [flags below] [--] [launcher] [settings of training]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of a node")
    parser.add_argument("--nodes", type=int, metavar="N")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU")
    parser.add_argument("--overhead", type=float, metavar="GIB", help="of it that hold no tensors; an assumption")
    parser.add_argument("--host_memory", type=float, metavar="GIB", help="of a node")
    parser.add_argument("--servers", type=int, default=1, metavar="N", help="vLLM servers, if rollouts are by servers")
    parser.add_argument("--scaling", action="store_true", help="simulate weak scaling up to 4096 ranks")
    parser.add_argument("--survey", action="store_true", help="the built-in models on 1 ... 512 GPUs, as Markdown")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes and seconds")
    speeds = parser.add_argument_group("speeds that times assume", "by default those of the GPU's data sheet")
    units = {"latency": "US", "launch": "US", "flops": "TFLOPS", "mfu": "SHARE", "host_adam": "1E9"}
    for name in SPEEDS:
        speeds.add_argument(f"--{name}", type=float, metavar=units.get(name, "GBPS"))
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. A mistake is one line and exit status 1 or 2; a job that does not fit is no mistake."""
    flags, words = _parser().parse_known_args(argv)
    with tidy():
        _main(flags, words)


def _main(flags: argparse.Namespace, words: list[str]) -> None:
    try:
        if flags.survey:
            print("\n".join(survey()))
            return
        line = Line.read([word for word in words if word != "--"])
        if line.model is None:
            raise ValueError("Name the model: --model with a folder, a hub id, or " + ", ".join(BUILT_IN) + ".")
        cluster = hardware.cluster(flags, line.launcher, on_cpu=line.values["use_cpu"])
        found = plan(line, cluster, _speeds(flags, cluster), flags.servers, flags.scaling)
    except Exception as error:
        errors.leave(error)
    print(json.dumps(found, indent=1) if flags.json else shown(found))


if __name__ == "__main__":
    main()
