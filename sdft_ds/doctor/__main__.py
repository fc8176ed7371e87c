"""Checks whether this machine can train: one line per requirement of a run, with the remedy if it is not met.

python -m sdft_ds.doctor [--output_dir FOLDER] [--json]

Exit status 1 if any line is `fail`.
"""

import argparse
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import util
from pathlib import Path
from typing import Any

from sdft_ds.doctor import checks, vllm
from sdft_ds.doctor.checks import FAIL, OK, WARN, Finding

SLOW = 5.0  # seconds
COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def all_checks(output_dir: Path) -> dict[str, Callable[[], Finding]]:
    """Name -> check, in the order in which they are printed."""
    return {
        "python": checks.python,
        "packages": checks.packages,
        "accelerator": checks.accelerator,
        "bf16": checks.bf16,
        "operators": checks.operators,
        "vllm": vllm.vllm,
        "communication": checks.communication,
        "memory": checks.memory,
        "disk": partial(checks.disk, output_dir),
        "shared memory": checks.shared_memory,
        "slurm": checks.slurm,
        "environment": checks.environment,
    }


def examine(check: Callable[[], Finding]) -> Finding:
    """Runs a check. Any exception becomes a finding, because a broken machine may raise anything."""
    try:
        return check()
    except Exception as error:
        remedy = "Fix what the message names; where other lines fail, those first."
        return Finding(FAIL, f"{type(error).__name__}: {error}", remedy)


def show(todo: dict[str, Callable[[], Finding]]) -> dict[str, Finding]:
    """Runs all checks and prints each line as soon as it is known: building an operator may take minutes."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console, findings = Console(), {}
    with console.status("") as status:
        for name, check in todo.items():
            status.update(f"{name} ...")
            with said_if_slow(name, console):
                findings[name] = finding = examine(check)
            text = Text(finding.found)
            if finding.remedy:
                text.append(f"\n-> {finding.remedy}", "bold")
            line = Table.grid(Column(width=4), Column(width=max(map(len, todo))), Column(), padding=(0, 2))
            line.add_row(Text(finding.status, COLOURS[finding.status]), name, text)
            console.print(line)
    console.print(
        "This machine can train." if fit(findings) else "This machine cannot train as it is: see what fails."
    )
    return findings


@contextmanager
def said_if_slow(name: str, console: Any) -> Iterator[None]:
    """In a log, which has no status line: says that a check is under way if it takes longer than a few seconds."""
    timer = threading.Timer(SLOW, console.print, [f"{name}: still at it; this may take minutes ..."])
    if not console.is_terminal:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def fit(findings: dict[str, Finding]) -> bool:
    return all(finding.status != FAIL for finding in findings.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="Where a run would save; need not exist.")
    parser.add_argument("--json", action="store_true", help="Print JSON; what happens without rich, too.")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # ends the checks' processes as well
    todo = all_checks(args.output_dir)
    if args.json or util.find_spec("rich") is None:
        findings = {name: examine(check) for name, check in todo.items()}
        lines = {name: asdict(finding) for name, finding in findings.items()}
        print(json.dumps({"fit": fit(findings), "checks": lines}, indent=1))
    else:
        findings = show(todo)
    sys.exit(0 if fit(findings) else 1)


if __name__ == "__main__":
    main()
