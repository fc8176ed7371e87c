"""Prints a plan in 80 columns."""

import textwrap
from typing import Any

from sdft_ds.plan.cluster import GIB

WIDTH = 79
TRAINED = {"full": "all", "lora": "LoRA", "qlora": "QLoRA"}
PHASES = {"push": "push to vLLM", "teacher": "teacher's pass", "optimizer": "optimizer step"}


def shown(found: dict[str, Any]) -> str:
    """The plan as text; found: as `plan` returns it."""
    parts = [_heading(found), _table(found)]
    if found["verdict"]:
        parts.append(_filled(found["verdict"]))
    if found["command"] is None:
        parts.append(_filled(found["advice"]))
    else:
        parts.append(_recommended(found))
    parts += [_filled(note) for note in found["notes"]]
    if "scaling" in found:
        parts.append(_scaling(found))
    parts.append(_filled(found["assumptions"]))
    return "\n\n".join(parts)


def _heading(found: dict[str, Any]) -> str:
    job, cluster = found["job"], found["cluster"]
    kept = f"{cluster['overhead']:.1f} of them kept for libraries and allocator"
    if cluster["on_cpu"]:
        where = f"One process on this CPU with {cluster['memory']:.1f} GiB of free memory, {kept}"
    else:
        device = f" ({cluster['device']})" if cluster["device"] else ""
        nodes = f" on {cluster['nodes']} nodes" if cluster["nodes"] > 1 else ""
        many, host = "s" if job["ranks"] > 1 else "", cluster["host_memory"]
        size = f"{cluster['memory']:.3g} GiB" + (" (assumed: --memory)" if cluster["assumed"] else "")
        where = f"{job['ranks']} GPU{many}{nodes}{device} of {size}, {kept}; "
        where += "host memory unknown" if host is None else f"{host:.0f} GiB of host memory on each node"
    billions = f"{job['shape']['parameters'] / 1e9:.3g} billion parameters"
    rows = job["batch"] * job["accumulation"] * job["ranks"]
    return "\n".join(
        [
            f"{found['model']}: {billions}, teacher: {job['teacher']}",
            _filled(where),
            f"A step: {rows} completions of {job['completion']} tokens, prompts of {job['prompt']}, the teacher's "
            f"{job['teacher_prompt']}",
        ]
    )


def _table(found: dict[str, Any]) -> str:
    """A line for each option."""
    room = found["cluster"]["memory"] - found["cluster"]["overhead"]
    rows = [("", "train", "setup", "batch", "GiB", "host", "s", "fits")]
    for option in found["options"]:
        mark = "*" if option is found["recommended"] else ">" if option["given"] else ""
        seconds, host = option["seconds"], option["host"] / GIB
        known = option["fits"] and seconds is not None
        rows.append(
            (
                mark,
                TRAINED[option["tuning"]],
                option["setup"],
                f"{option['batch']} x {option['accumulation']}",
                _gib(option["peak"]),
                f"{host * found['cluster']['gpus']:.0f}" if host else "-",
                _seconds(sum(seconds.values())) if known else "-",
                "yes" if option["fits"] else "no",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in (4, 5, 6) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join([cells[0], "  ".join(cells[1:])]).rstrip())
    unit = "process" if found["cluster"]["on_cpu"] else "GPU"
    legend = "*: recommended. "
    if any(row[0] == ">" for row in rows):
        legend += ">: the line as it is. "
    legend += (
        "batch: rows of a micro-batch x gradient accumulation. GiB: predicted peak of a "
        f"{unit}, which has {room:.3g} to give."
    )
    if any(option["host"] for option in found["options"]):
        legend += " host: GiB of a node's own memory."
    if any(option["seconds"] for option in found["options"]):
        legend += " s: seconds of a step."
    return "\n".join(lines) + "\n" + _filled(legend)


def _recommended(found: dict[str, Any]) -> str:
    option = found["recommended"]
    peak = PHASES.get(option["phase"], option["phase"])
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in option["parts"].items() if size >= GIB / 200)
    lines = [
        _filled(
            f"* {option['setup']}: {_gib(option['peak'])} GiB at the peak, in the {peak}. Each part at its largest: "
            f"{parts}."
        )  # fmt: skip
    ]
    if option["seconds"] is not None:
        each = ", ".join(f"{name} {_seconds(time)}" for name, time in option["seconds"].items() if time >= 0.05)
        lines.append(_filled(f"Seconds of a step: {each}."))
    lines.append(found["command"])
    for title, text in found["others"].items():
        lines += [_filled(title), text]
    return "\n\n".join(lines)


def _scaling(found: dict[str, Any]) -> str:
    lines = ["Weak scaling, simulated: seconds of a step, and the speed of a rank", ""]
    lines.append(f"{'ranks':>6}{'computing':>11}{'collectives':>13}{'beside':>9}{'in turn':>9}   speed")
    first = found["scaling"][0]["bounds"]
    for row in found["scaling"]:
        best, worst = row["bounds"]
        lines.append(
            f"{row['ranks']:>6}{row['computing']:>11.2f}{row['communicating']:>13.2f}{best:>9.2f}{worst:>9.2f}"
            f"   {first[1] / worst:.2f} ... {first[0] / best:.2f}"
        )
    return "\n".join(lines)


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, break_on_hyphens=False)


def _gib(size: float) -> str:
    return f"{size / GIB:.{2 if size < 10 * GIB else 1}f}"


def _seconds(time: float) -> str:
    return f"{time:.1f}" if time < 10 else f"{time:.0f}"
