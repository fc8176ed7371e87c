"""Python programs in processes of their own, within a time limit; whatever happens, nothing of them is left."""

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
    """Run them side by side until all have ended, one has failed, or `limit` seconds are over.

    For each: its exit status, None where it was ended from here, and what it said.
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
    """End it and what it started. Interrupted first, so that a build takes its lock away: others would wait for it."""
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
    """The last line of a program's output that names an error, or else its last line; at most `most` characters."""
    lines = output.strip().splitlines() or ["it said nothing"]
    named = [line for line in lines if re.search(r"\berror: |^[\w.]*(Error|Exception)\b", line)]
    return (named or lines)[-1][:most]
