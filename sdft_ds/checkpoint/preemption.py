"""Preemption: all ranks agree on a step, save it once, write a marker file and exit with a configurable code.

Requested by SIGTERM or SIGUSR1 to any rank, or by a file named STOP in output_dir. The ranks agree by an all-reduce
at safe points: after an optimizer step, and between a rollout and training on it. Launchers lose exit codes
(torchrun always returns 1), so scripts check for the marker.
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

from sdft_ds.distributed import ranks
from sdft_ds.distributed.shutdown import Preempted

MARKER = "PREEMPTED"
STOP = "STOP"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Context manager that catches preemption requests; `agree` returns the same answer on all ranks.

    exit_code: of the program. deadline: seconds after the signal at which the process exits, saved or not.
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
        self.requested, self.agreed = None, False  # an earlier run may have set them
        if ranks.rank() == 0:
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
        """Signal handler. A second signal is ignored, so that a save in progress completes."""
        if self.requested is None:
            self.requested = signal.Signals(number).name
            self.timer = threading.Timer(self.deadline, self._give_up)
            self.timer.daemon = True
            self.timer.start()

    def _give_up(self) -> None:
        """The deadline has passed: exit as preempted, with the last saved checkpoint."""
        self._mark(step=None)
        os._exit(self.exit_code)

    def agree(self) -> bool:
        """Whether preemption was requested on any rank. Collective."""
        if not self.agreed:
            asked = self.requested is not None or (ranks.rank() == 0 and (self.folder / STOP).exists())
            self.agreed = ranks.all_reduce_max(float(asked), self.device) > 0
        return self.agreed

    def leave(self, step: int) -> None:
        """Write the marker and exit; the checkpoint is already saved. Collective."""
        if ranks.rank() == 0:
            self._mark(step)
            (self.folder / STOP).unlink(missing_ok=True)
            print(f"sdft_ds: Stopped on request after step {step} with exit code {self.exit_code}. Resume with "
                  "resume_from_checkpoint=True.", flush=True)  # fmt: skip
        ranks.barrier()
        raise Preempted(self.exit_code)

    def _mark(self, step: int | None) -> None:
        about = {"step": step, "by": self.requested or STOP, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        (self.folder / MARKER).write_text(json.dumps(about) + "\n")
