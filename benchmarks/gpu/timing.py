"""Seconds of a call on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def seconds(run: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def median_seconds(run: Callable[[], Any], times: int = 5) -> float:
    """After one call that is not counted."""
    run()
    return statistics.median(seconds(run) for _ in range(times))
