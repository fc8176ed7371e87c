"""A job that is asked to go: all ranks agree on the step, save it once, leave a marker and exit with a code.

Asked by SIGTERM or SIGUSR1 to any rank, or by a file named STOP in the output folder. The ranks agree by a collective
at safe points: after an optimizer step, and between a rollout and the training on it. Launchers lose exit codes
(torchrun always returns 1), so scripts go by the marker.
"""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from sdft_ds import ranks

MARKER = "PREEMPTED"
STOP = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Leaves the program with the exit code of preemption; what was trained is saved."""


class Preemption:
    """Notices requests while it is entered, and answers for all ranks whether to go.

    exit_code: of the program. deadline: seconds from the signal after which the process ends, saved or not.
    """

    def __init__(self, output_dir: str, exit_code: int, deadline: float, device: torch.device):
        self.folder = Path(output_dir)
        self.exit_code = exit_code
        self.deadline = deadline
        self.device = device
        self.requested: str | None = None  # on this rank
        self.agreed = False  # by all ranks
        self.before: dict[int, Any] = {}
        self.timer: threading.Timer | None = None

    def __enter__(self) -> "Preemption":
        self.requested, self.agreed = None, False  # as an earlier run left them
        if ranks.index() == 0:
            (self.folder / MARKER).unlink(missing_ok=True)
            (self.folder / STOP).unlink(missing_ok=True)
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._request) for number in SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.timer is not None:
            self.timer.cancel()

    def _request(self, number: int, frame: FrameType | None) -> None:
        """A signal came. A second one changes nothing: a save that has begun goes on to its end."""
        if self.requested is None:
            self.requested = signal.Signals(number).name
            self.timer = threading.Timer(self.deadline, self._give_up)
            self.timer.daemon = True
            self.timer.start()

    def _give_up(self) -> None:
        """The deadline passed: leave as preempted, with what was saved before."""
        self._mark(step=None)
        os._exit(self.exit_code)

    def agree(self) -> bool:
        """Whether any rank was asked to go. Every rank calls it at the same point."""
        if not self.agreed:
            asked = self.requested is not None or (ranks.index() == 0 and (self.folder / STOP).exists())
            self.agreed = ranks.largest(float(asked), self.device) > 0
        return self.agreed

    def leave(self, step: int) -> None:
        """Mark and exit; what is to be saved is saved. Every rank calls it."""
        if ranks.index() == 0:
            self._mark(step)
            (self.folder / STOP).unlink(missing_ok=True)
            print(f"sdft_ds: Asked to go, left after step {step} with exit code {self.exit_code}. A resume goes on.",
                  flush=True)  # fmt: skip
        ranks.barrier()
        raise Preempted(self.exit_code)

    def _mark(self, step: int | None) -> None:
        about = {"step": step, "by": self.requested or STOP, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        (self.folder / MARKER).write_text(json.dumps(about) + "\n")
