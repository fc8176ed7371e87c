"""Straggler watchdog: each rank publishes its current phase; rank 0 reports which rank the others wait for.

Phases are published to the rendezvous store, not by a collective, so that a rank that is dead or hangs in a collective
can be named while the others still wait for it, before ddp_timeout ends them.
"""

import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

from sdft_ds.distributed import ranks

PATIENCE = 60.0  # seconds; an assumption: longer than most phases, and far below the usual ddp_timeout


@dataclass(frozen=True)
class RankPhase:
    """Current phase of a rank. entered: number of phases entered so far, equal for ranks at the same point."""

    entered: int
    phase: str
    step: int
    host: str

    def __str__(self) -> str:
        return f"{self.phase} of step {self.step}"


class StragglerWatchdog:
    """Context manager: prints one report when ranks have waited for others for more than `patience` seconds."""

    def __init__(self, ddp_timeout: float):
        self.patience = min(PATIENCE, ddp_timeout / 4)
        self.host = socket.gethostname()
        self.entered = 0
        self.store: Any = None
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def __enter__(self) -> "StragglerWatchdog":
        if ranks.world_size() > 1:
            self.store = torch.distributed.PrefixStore("sdft_ds/places", ranks.store())
            self.enter("start", 0)
            if ranks.rank() == 0:
                self.over.clear()
                self.thread = threading.Thread(target=self._watch, daemon=True)
                self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.over.set()
        if self.thread is not None:
            self.thread.join(timeout=1)
        self.store, self.thread = None, None

    def enter(self, phase: str, step: int) -> None:
        """Publish that this rank enters a phase."""
        if self.store is not None:
            self.entered += 1
            place = RankPhase(self.entered, phase, step, self.host)
            self.store.set(str(ranks.rank()), json.dumps(vars(place)))

    def _watch(self) -> None:
        names = [str(rank) for rank in range(ranks.world_size())]
        seen: list[RankPhase] = []
        since, told = time.monotonic(), False
        while not self.over.wait(self.patience / 4):
            if not self.store.check(names):
                continue
            places = [RankPhase(**json.loads(text)) for text in self.store.multi_get(names)]
            if places != seen:
                seen, since, told = places, time.monotonic(), False
            waited = time.monotonic() - since
            if not told and waited > self.patience and (report := straggler_report(places)):
                print(f"sdft_ds: {report} (for {waited:.0f} s)", flush=True)
                told = True


def straggler_report(places: list[RankPhase]) -> str | None:
    """`Waiting for rank 3 (host n2, in rollout of step 5); the furthest is in teacher of step 5`; None if no rank is
    behind."""
    furthest = max(place.entered for place in places)
    late = [rank for rank, place in enumerate(places) if place.entered < furthest]
    if not late:
        return None
    ahead = next(place for place in places if place.entered == furthest)
    last = min(late, key=lambda rank: places[rank].entered)
    more = f" and {len(late) - 1} more" if len(late) > 1 else ""
    return f"Waiting for rank {last} (host {places[last].host}, in {places[last]}){more}; the furthest is in {ahead}"
