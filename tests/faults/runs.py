"""Starts tests.faults.program as real processes, with a time limit, and says how each of them ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sdft_ds.distributed.launch import free_port

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "teacher_model_kind": "ema",
            "teacher_sync_steps": 1, "teacher_update_rate": 0.3}  # fmt: skip


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--no_local_rank", "--master_port"],
}
MODULE = {"torchrun": "-m", "deepspeed": "--module"}


def start(folder: Path, ranks: int = 1, faults=(), **settings: Any) -> list[subprocess.Popen]:
    """One process for each rank; faults: (what, when, step, rank)."""
    port, text = free_port(), as_json(faults, settings)
    processes = []
    for rank in range(ranks):
        environment = {}
        if ranks > 1:
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(_process(["-m", "tests.faults.program", str(folder), text], environment))
    return processes


def start_by(launcher: str, folder: Path, faults=(), **settings: Any) -> list[subprocess.Popen]:
    """A launcher that starts two ranks, in a process group of its own."""
    program = [MODULE[launcher], "tests.faults.program", str(folder), as_json(faults, settings)]
    return [_process([*LAUNCHERS[launcher], str(free_port()), *program], {})]


def as_json(faults, settings: dict[str, Any]) -> str:
    named = [dict(zip(("what", "when", "step", "rank"), fault, strict=True)) for fault in faults]
    return json.dumps({**SETTINGS, **settings, "faults": named})


def _process(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    """(exit code, output) of each; raises if one has not ended in time: no rank may hang."""
    deadline, ended = time.monotonic() + timeout, []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            ended.append((process.returncode, output))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return ended


def run(folder: Path, ranks: int = 1, timeout: float = 120, **settings: Any) -> list[tuple[int, str]]:
    return finish(start(folder, ranks, **settings), timeout)


def end(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"end-of-rank-{rank}.json").read_text())
