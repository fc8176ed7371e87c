"""Calls a function in processes of its own: on the device, on several ranks, or on the CPU for comparison.

What the function yields arrives here as soon as it is yielded, so that a crash costs what comes after it only. The
processes stay in the process group of their part, which is killed when the part's time is over.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import ROOT, Setup
from sdft_ds.distributed.launch import free_port
from sdft_ds.doctor.subprocesses import cause

GRACE = 5.0  # seconds that the other ranks have to end after one has failed


class ProcessFailed(RuntimeError):
    """A process ended with an error; the message is its last line that names one."""


def stream(
    function: Callable[..., Iterator[Any]],
    *args: Any,
    setup: Setup,
    on_cpu: bool = False,
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    **kwargs: Any,
) -> Iterator[Any]:
    """What the function yields on each rank, as JSON, in the order of arrival. Raises ProcessFailed at the end if it
    raised."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call.json").write_text(json.dumps({"args": args, "kwargs": kwargs}))
        named = [function.__module__, function.__name__, folder]
        processes = [
            start(["-m", "benchmarks.gpu.processes", *named], setup, Path(folder, f"log-{each['RANK']}"), on_cpu,
                  {**each, **(environment or {})})
            for each in rank_variables(ranks)
        ]  # fmt: skip
        files = [Path(folder, f"yielded-{rank}") for rank in range(ranks)]
        try:
            yield from _lines(processes, files)
        finally:
            for process in processes:
                process.kill()
                process.wait()
            logs = [Path(folder, f"log-{rank}").read_text(errors="replace") for rank in range(ranks)]
            print("\n".join(logs), flush=True)
        failed = [log for process, log in zip(processes, logs, strict=True) if process.returncode]
        if failed:
            raise ProcessFailed(cause(failed[0]))


def call(function: Callable[..., Iterator[Any]], *args: Any, **options: Any) -> list[Any]:
    """All that `stream` yields."""
    return list(stream(function, *args, **options))


def arriving(findings: Findings, function: Callable[..., Iterator[Any]], *args: Any, **options: Any) -> Iterator[Any]:
    """What `stream` yields; if a process fails, that is among the findings."""
    try:
        yield from stream(function, *args, **options)
    except ProcessFailed as error:
        findings.fail(str(error))


def each_of(cases: list[Any], made: Callable[..., dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For functions of `stream`: `case` and what is made of it, or `error`; then the next, whatever one raises."""
    for case in cases:
        try:
            found = made(*case)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        yield {"case": case, **found}


def start(
    arguments: list[str], setup: Setup, log: Path, on_cpu: bool = False, more: dict[str, str] | None = None
) -> subprocess.Popen:
    """A Python process of this part, its output in `log`."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**setup.environment(on_cpu), **(more or {})},
        )  # fmt: skip


def rank_variables(ranks: int) -> list[dict[str, str]]:
    """The variables by which a launcher tells each process which rank it is."""
    port = str(free_port())
    return [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
         "MASTER_PORT": port}
        for rank in range(ranks)
    ]  # fmt: skip


def _lines(processes: list[subprocess.Popen], files: list[Path]) -> Iterator[Any]:
    """The JSON lines of all files while the processes run; ends them if one fails."""
    read, deadline = [0] * len(files), float("inf")
    while True:
        ended = [process.poll() for process in processes]
        for i, file in enumerate(files):
            text = file.read_text() if file.exists() else ""
            *whole, _ = text[read[i] :].split("\n")
            read[i] += sum(len(line) + 1 for line in whole)
            yield from map(json.loads, whole)
        if None not in ended or time.monotonic() > deadline:
            return
        if any(ended) and deadline == float("inf"):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)


def _serve(module: str, name: str, folder: str) -> None:
    import torch

    from sdft_ds.distributed import shutdown

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    given = json.loads(Path(folder, "call.json").read_text())
    with shutdown.together(), open(Path(folder, f"yielded-{os.environ['RANK']}"), "w") as file:
        for made in getattr(importlib.import_module(module), name)(*given["args"], **given["kwargs"]):
            file.write(json.dumps(made) + "\n")
            file.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
