"""Runs Python programs in subprocesses with a time limit; none is left running afterwards."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import TextIO


def run(programs: list[str], limit: float) -> list[tuple[int | None, str]]:
    """Runs programs concurrently until all have exited, one has failed, or `limit` seconds have passed.

    Returns for each its exit status (None if it was killed here) and its output.
    """
    outputs = [tempfile.TemporaryFile("w+", errors="replace") for _ in programs]
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=output, stderr=output, start_new_session=True)
        for program, output in zip(programs, outputs, strict=True)
    ]
    deadline = time.monotonic() + limit
    statuses: list[int | None] = [None] * len(programs)
    try:
        while None in statuses and not any(statuses) and time.monotonic() < deadline:
            time.sleep(0.05)
            statuses = [process.poll() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                _end(process)
    return [(status, _content(output)) for status, output in zip(statuses, outputs, strict=True)]


def _end(process: subprocess.Popen, grace: float = 5) -> None:
    """Kills a process and its children. SIGINT first, so that a build removes its lock: later builds wait for it."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)


def _content(file: TextIO) -> str:
    with file:
        file.seek(0)
        return file.read()


def cause(output: str, most: int = 300) -> str:
    """The last line of the output that names an error, else the last line; at most `most` characters."""
    lines = output.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.search(r"\berror: |^[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1][:most]
