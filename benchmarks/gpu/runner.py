"""Runs parts, each in a process of its own with its own limit, until the budget is spent."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from benchmarks.gpu.findings import NOT_RUN, Findings
from benchmarks.gpu.parts import Part
from benchmarks.gpu.setup import ROOT, Setup

BESIDE = 2  # parts that run beside one another where none of them measures
ON_CPU = 5  # times the limits: whatever else runs there
LEAST = 10.0  # seconds; with less no part is started


_running: set[subprocess.Popen] = set()


def end(number: int, frame: FrameType | None) -> NoReturn:
    """Signal handler: ends what runs, each with all that it has started, and this process."""
    for process in list(_running):
        _kill(process)
    os._exit(128 + number)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_all(parts: Sequence[Part], setup: Setup, budget: float, log: Path, done: Callable[[dict[str, Any]], None]):
    """Hands the record of each part to `done` when it has ended. log: gets what the parts print."""
    deadline = time.monotonic() + budget
    for alone, some in groupby(parts, key=lambda part: part.alone):
        with ThreadPoolExecutor(1 if alone else BESIDE) as pool:
            for record in pool.map(lambda part: run_part(part, setup, deadline - time.monotonic(), log), some):
                done(record)


def run_part(part: Part, setup: Setup, left: float, log: Path) -> dict[str, Any]:
    """Its record. left: seconds of the budget; the part gets as many at most."""
    if left < LEAST:
        return {"part": part.name, "status": NOT_RUN, "seconds": 0, "line": "the budget was spent"}
    limit, started = min(part.seconds * (1 if setup.on_gpu else ON_CPU), left), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file, output = Path(folder, "findings.json"), Path(folder, "output")
        command = [sys.executable, "-m", "benchmarks.gpu", *setup.flags()]
        command += ["--part", part.name, "--findings", str(file)]
        with output.open("w") as stream, _group(command, setup, stream) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            code = process.returncode
        findings, said = Findings.read(file), output.read_text(errors="replace")
    if code is None:
        findings.fail(f"no end within {limit:.0f} s")
    elif code and not findings.error:
        findings.fail(f"ended with status {code}: " + (said.strip().splitlines() or ["without a word"])[-1][:200])
    with log.open("a") as stream:
        stream.write(f"\n===== {part.name}: {findings.status}\n{said}")
    return {
        "part": part.name, "status": findings.status, "seconds": round(time.monotonic() - started, 1),
        "line": findings.line(), "error": findings.error, "checks": findings.checks, "figures": findings.figures,
        "skipped": findings.skipped,
    }  # fmt: skip


@contextmanager
def _group(command: list[str], setup: Setup, stream: Any) -> Iterator[subprocess.Popen]:
    """A process, and with it all that it starts: they are killed when the context ends."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=setup.environment(), stdin=subprocess.DEVNULL, stdout=stream,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    _running.add(process)
    try:
        yield process
    finally:
        _kill(process)
        process.wait()
        _running.remove(process)
