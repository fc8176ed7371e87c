"""Says whether this machine can train: one line for each thing that a run needs, with the remedy where it is missing.

python -m sdft_ds.doctor [--output_dir FOLDER] [--json]

Exit status 1 if any line is `fail`.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import util
from pathlib import Path

from sdft_ds import machine
from sdft_ds.machine import FAIL, OK, WARN, Finding

COLOURS = {OK: "green", WARN: "yellow", FAIL: "red"}


def checks(output_dir: Path) -> dict[str, Callable[[], Finding]]:
    """Every check by the name of its line, in the order of the screen."""
    return {
        "python": machine.python,
        "packages": machine.packages,
        "accelerator": machine.accelerator,
        "bf16": machine.bf16,
        "operators": machine.operators,
        "communication": machine.communication,
        "memory": machine.memory,
        "disk": partial(machine.disk, output_dir),
        "shared memory": machine.shared_memory,
        "slurm": machine.slurm,
        "environment": machine.environment,
    }


def examine(check: Callable[[], Finding]) -> Finding:
    """What the check finds. What it raises is a finding too: there is no telling what a broken machine throws."""
    try:
        return check()
    except Exception as error:
        remedy = "Mend what the message names; where other lines fail, those first."
        return Finding(FAIL, f"{type(error).__name__}: {error}", remedy)


def show(todo: dict[str, Callable[[], Finding]]) -> dict[str, Finding]:
    """Examine all and print each line when it is known: an operator may take minutes to build."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console, findings = Console(), {}
    with console.status("") as status:
        for name, check in todo.items():
            status.update(f"{name} ...")
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


def fit(findings: dict[str, Finding]) -> bool:
    return all(finding.status != FAIL for finding in findings.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="Where a run would save; need not exist.")
    parser.add_argument("--json", action="store_true", help="Print JSON; what happens without rich, too.")
    args = parser.parse_args()
    todo = checks(args.output_dir)
    if args.json or util.find_spec("rich") is None:
        findings = {name: examine(check) for name, check in todo.items()}
        lines = {name: asdict(finding) for name, finding in findings.items()}
        print(json.dumps({"fit": fit(findings), "checks": lines}, indent=1))
    else:
        findings = show(todo)
    sys.exit(0 if fit(findings) else 1)


if __name__ == "__main__":
    main()
