"""Starts tests.faults.program as real processes, with a time limit, and says how each of them ended."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SETTINGS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "teacher_model_kind": "ema",
            "teacher_sync_steps": 1, "teacher_update_rate": 0.3}  # fmt: skip


def start(folder: Path, ranks: int = 1, faults=(), **settings: Any) -> list[subprocess.Popen]:
    """One process for each rank; faults: (what, when, step, rank)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    named = [dict(zip(("what", "when", "step", "rank"), fault, strict=True)) for fault in faults]
    text = json.dumps({**SETTINGS, **settings, "faults": named})
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, "-m", "tests.faults.program", str(folder), text]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str]]:
    """(exit code, output) of each; raises if one has not ended in time: no rank may hang."""
    deadline, ended = time.monotonic() + timeout, []
    try:
        for process in processes:
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            ended.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
    return ended


def run(folder: Path, ranks: int = 1, timeout: float = 120, **settings: Any) -> list[tuple[int, str]]:
    return finish(start(folder, ranks, **settings), timeout)


def end(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"end-of-rank-{rank}.json").read_text())
