"""Preemption: all ranks agree on a step, save it once, write a marker file and exit with a configurable code.

Requested by SIGTERM or SIGUSR1 to any rank, or by a file named STOP in output_dir. The ranks agree by an all-reduce
at safe points: after an optimizer step, and between a rollout and training on it. Launchers lose exit codes
(torchrun always returns 1), so scripts check for the marker.

A Ctrl-C (SIGINT) is obeyed in the same way, but with exit code 130 and without the marker, by which jobs are started
again. A second one ends the process at once.
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
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
INTERRUPTED = 128 + signal.SIGINT  # exit code, that of shells
ONE_KEY = 1.0  # seconds: torchrun passes on the Ctrl-C that the terminal has sent to the ranks as well


class Preemption:
    """Context manager that catches preemption requests; `agree` returns the same answer on all ranks.

    exit_code: of the program, except after a Ctrl-C. deadline: seconds after the signal at which the process exits,
    saved or not. go_on: how the user resumes the run, for the last message.
    """

    def __init__(self, output_dir: str, exit_code: int, deadline: float, device: torch.device):
        self.folder = Path(output_dir)
        self.exit_code = exit_code
        self.deadline = deadline
        self.device = device
        self.go_on = "trainer.train(resume_from_checkpoint=True)"
        self.requested: str | None = None  # on this rank
        self.interrupted_at: float | None = None  # by the first Ctrl-C
        self.agreed = False  # by all ranks
        self.interrupted = False  # whether by a Ctrl-C
        self.before: dict[int, Any] = {}
        self.timer: threading.Timer | None = None

    def __enter__(self) -> "Preemption":
        # An earlier run may have set them.
        self.requested, self.interrupted_at, self.agreed, self.interrupted = None, None, False, False
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
        """Signal handler. A second signal is ignored, so that a save in progress completes; but not a Ctrl-C."""
        now, key = time.monotonic(), number == signal.SIGINT
        first = self.interrupted_at is None
        if key and first:
            self.interrupted_at = now
        if self.requested is None:
            self.requested = signal.Signals(number).name
            self._say(
                f"{'Ctrl-C' if key else self.requested}: the run ends after this rollout or step, and saves it first."
                + (" A second Ctrl-C ends it at once, unsaved." if key else "")
            )
            self.timer = threading.Timer(self.deadline, self._give_up)
            self.timer.daemon = True
            self.timer.start()
        elif key and first:
            self._say("Ctrl-C: the run is ending already, and saves first. A second Ctrl-C ends it at once, unsaved.")
        elif key and now - self.interrupted_at > ONE_KEY:
            self._say(f"Ended at once, unsaved. From the newest checkpoint, if there is one: {self.go_on}")
            os._exit(INTERRUPTED)

    def _give_up(self) -> None:
        """The deadline has passed: exit as preempted, with the last saved checkpoint."""
        self._say(
            f"preemption_deadline_seconds={self.deadline:g} are over: ended, unsaved. From the newest checkpoint, if "
            f"there is one: {self.go_on}"
        )
        self._mark(step=None)
        os._exit(self._code(self.requested == signal.SIGINT.name))

    def agree(self) -> bool:
        """Whether preemption was requested on any rank. Collective."""
        if not self.agreed:
            asked = self.requested is not None or (ranks.rank() == 0 and (self.folder / STOP).exists())
            how = ranks.all_reduce_max(2.0 if self.requested == signal.SIGINT.name else float(asked), self.device)
            self.agreed, self.interrupted = how > 0, how > 1
        return self.agreed

    def leave(self, step: int, saved: str) -> None:
        """Write the marker and exit; the checkpoint is already saved. saved: what can be resumed from, in words.
        Collective."""
        code = self._code(self.interrupted)
        if ranks.rank() == 0:
            self._mark(step)
            (self.folder / STOP).unlink(missing_ok=True)
        by = "Ctrl-C" if self.interrupted else self.requested or STOP
        ranks.tell(f"Stopped by {by} after step {step}, with exit code {code}. {saved}")
        ranks.barrier()
        raise Preempted(code)

    def _code(self, interrupted: bool) -> int:
        return INTERRUPTED if interrupted else self.exit_code

    def _say(self, text: str) -> None:
        """From a signal handler, which may have interrupted a print."""
        if ranks.rank() == 0:
            os.write(2, f"\nsdft_ds: {text}\n".encode())

    def _mark(self, step: int | None) -> None:
        if self.interrupted or self.requested == signal.SIGINT.name:
            return
        about = {"step": step, "by": self.requested or STOP, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        (self.folder / MARKER).write_text(json.dumps(about) + "\n")
