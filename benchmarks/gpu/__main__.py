"""The first run on a GPU: is it right there, how fast is it, does it fit? One command of at most ten minutes.

    python -m benchmarks.gpu --out FOLDER                               on the first GPU
    python -m benchmarks.gpu --out FOLDER --parts decode loss           these parts only
    python -m benchmarks.gpu --out FOLDER --ranks 2                     training parts on two GPUs
    python -m benchmarks.gpu --out FOLDER --device cpu --tiny           every part at a tiny size, on a CPU

Each part is a process of its own with its own limit, prints one line, and is followed by the next even if it fails.
Writes FOLDER/results.json and FOLDER/results.md after each part, and FOLDER/log.txt. Exit status 1 if a part failed.
benchmarks/README.md says what each part must show, and what a machine without a network needs.
"""

import argparse
import importlib
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import page, runner
from benchmarks.gpu.findings import FAILED, Findings
from benchmarks.gpu.parts import PARTS
from benchmarks.gpu.setup import Setup


def run_here(name: str, setup: Setup, findings: Findings) -> None:
    """One part in this process; what it raises is among its findings."""
    try:
        importlib.import_module(f"benchmarks.gpu.parts.{name}").run(setup, findings)
    except Exception as error:
        traceback.print_exc()
        findings.fail(f"{type(error).__name__}: {error}"[:300])


def name_of(setup: Setup) -> str:
    """The device's; asked for in another process, because this one would keep memory of it until the end."""
    if not setup.on_gpu:
        return "CPU"
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def results_of(setup: Setup, device: str, records: list[dict[str, Any]], started: float) -> dict[str, Any]:
    return {
        "device": device, "torch": torch.__version__, "python": sys.version.split()[0], "ranks": setup.ranks,
        "tiny": setup.tiny, "at": time.strftime("%Y-%m-%d %H:%M"), "seconds": round(time.time() - started),
        "parts": records,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all parts (540)")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--ranks", type=int, default=1, help="of the parts that train: one GPU each (1)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a test on a CPU")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--findings", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    setup = Setup.of(args)
    if args.part:
        run_here(args.part, setup, Findings(args.findings))
        return
    if setup.on_gpu and torch.cuda.device_count() < setup.ranks:
        sys.exit(f"--ranks {setup.ranks} needs as many GPUs; torch sees {torch.cuda.device_count()}.")
    if not setup.on_gpu and not setup.tiny:
        sys.exit("--device cpu needs --tiny: the other sizes are a GPU's.")
    args.out.mkdir(parents=True, exist_ok=True)
    device, started, records = name_of(setup), time.time(), []

    def done(record: dict[str, Any]) -> None:
        records.append(record)
        print(f"{record['status']:8} {record['part']:10} {record['seconds']:5.0f} s  {record['line']}", flush=True)
        results = results_of(setup, device, records, started)
        (args.out / "results.json").write_text(json.dumps(results, indent=1))
        (args.out / "results.md").write_text(page.render(results))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, runner.end)
    log = args.out / "log.txt"
    log.write_text("")
    runner.run_all([PARTS[name] for name in args.parts], setup, args.budget, log, done)
    if any(record["status"] == FAILED for record in records):
        sys.exit(1)


if __name__ == "__main__":
    main()
