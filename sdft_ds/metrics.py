"""Every metric of a run: its name, its unit and how ranks and steps are joined, in one table."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.paired_batch import PairedBatch, Rollout


@dataclass(frozen=True)
class Metric:
    """reduction: mean (weighted by what was counted), norm ratio (the root of one), max, min, sum, rate (sum per
    second of wall-clock), or slowest (largest rank's sum per step)."""

    unit: str
    reduction: str
    meaning: str


METRICS = {
    "sdft/distillation_loss": Metric("nats/token", "mean", "divergence of a loss token, before any weighting"),
    "completions/mean_length": Metric("tokens", "mean", "length of a completion, end-of-sequence token included"),
    "completions/min_length": Metric("tokens", "min", "shortest completion"),
    "completions/max_length": Metric("tokens", "max", "longest completion"),
    "completions/clipped_ratio": Metric("share", "mean", "completions that hit max_completion_length"),
    "completions/empty_ratio": Metric("share", "mean", "completions that ended at once; they have no loss"),
    "completions/loss_tokens": Metric("tokens", "sum", "loss tokens trained on since the last log, over all ranks"),
    "prompts/student_cut": Metric("rows", "sum", "student prompts cut to max_prompt_length since the last log"),
    "prompts/teacher_cut": Metric("rows", "sum", "teacher prompts cut to max_teacher_prompt_length"),
    "teacher/distance": Metric(
        "ratio", "norm ratio", "|teacher - student| / |student - start|, estimated on 65,536 values"
    ),
    "tokens/per_second": Metric("tokens/s", "rate", "completion tokens made and trained on, over all ranks"),
    "tokens/padding_share": Metric("share", "mean", "positions of the student's forwards that are padding"),
    "memory/peak_gib": Metric("GiB", "max", "peak of the largest rank so far: device memory, or on a CPU resident"),
    "steps/nonfinite": Metric("steps", "sum", "steps left out since the last log: their gradient was not finite"),
    "seconds/rollout": Metric("s/step", "slowest", "generation, per optimizer step, on the slowest rank"),
    "seconds/teacher": Metric("s/step", "slowest", "teacher scoring, swaps included"),
    "seconds/student": Metric("s/step", "slowest", "student forward, loss and backward"),
    "seconds/optimizer": Metric("s/step", "slowest", "optimizer step"),
}


class Meters:
    """Collects values on this rank and joins them with the other ranks' when a log line is due.

    reduce: (tensor, "sum" | "max") -> the tensor joined over the ranks, in place or not.
    """

    def __init__(self, reduce: Callable[[Tensor, str], Tensor], device: torch.device):
        self.reduce = reduce
        self.device = device
        self.inner_seconds = 0.0  # of the phases inside the one that runs
        self.reset()

    def reset(self) -> None:
        self.since = time.perf_counter()
        self.sums = {name: [0.0, 0.0] for name in METRICS}
        self.extremes = {name: float("-inf") for name in METRICS}

    def add(self, name: str, total: float | Tensor, count: float = 1.0) -> None:
        """Add a value (max, min) or a sum of `count` values (mean, sum, slowest). Tensors are not waited for."""
        reduction = METRICS[name].reduction
        if reduction in ("max", "min"):
            self.extremes[name] = max(self.extremes[name], total if reduction == "max" else -total)
        else:
            self.sums[name][0] += total
            self.sums[name][1] += count

    def count_completions(self, rollouts: list[Rollout]) -> None:
        """Add the completions' metrics of the rollouts that count."""
        for rollout in rollouts:
            if rollout.counted:
                for name in ("mean", "min", "max"):
                    self.add(f"completions/{name}_length", len(rollout.completion.ids))
                self.add("completions/clipped_ratio", rollout.completion.truncated)
                self.add("completions/empty_ratio", rollout.empty)
                self.add("tokens/per_second", len(rollout.completion.ids))

    def count_positions(self, batch: PairedBatch) -> None:
        """Add how much of a micro-batch is padding."""
        self.add("tokens/padding_share", batch.padding, batch.student.input_ids_LT.numel())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds/<name>`, those of a phase within it to that one alone; waits for
        the device, where there is one."""
        start, self.inner_seconds, outer = self._now(), 0.0, self.inner_seconds
        yield
        seconds = self._now() - start
        self.add(f"seconds/{name}", seconds - self.inner_seconds, 0.0)
        self.inner_seconds = outer + seconds

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def collect(self, steps: int) -> dict[str, float]:
        """The joined values since the last call; `steps` optimizer steps were made. Every rank must call it."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        self.add("memory/peak_gib", _peak_bytes(self.device) / 2**30)
        sums = torch.tensor(
            [[float(total), float(count)] for total, count in self.sums.values()],
            dtype=torch.float64,
            device=self.device,
        )
        slowest = self.reduce(sums[:, 0].clone(), "max").tolist()
        sums = self.reduce(sums, "sum").tolist()
        extremes = self.reduce(
            torch.tensor(list(self.extremes.values()), dtype=torch.float64, device=self.device), "max"
        ).tolist()
        self.reset()
        values = {}
        for i, (name, metric) in enumerate(METRICS.items()):
            total, count = sums[i]
            if metric.reduction in ("max", "min"):
                if extremes[i] > float("-inf"):
                    values[name] = extremes[i] if metric.reduction == "max" else -extremes[i]
            elif metric.reduction in ("mean", "norm ratio"):
                if count:
                    values[name] = total / count if metric.reduction == "mean" else (total / count) ** 0.5
            elif metric.reduction == "slowest":
                values[name] = slowest[i] / max(1, steps)
            elif metric.reduction == "rate":
                values[name] = total / elapsed
            else:
                values[name] = total
        return values


def _peak_bytes(device: torch.device) -> int:
    """The largest amount of device memory so far; without a device, of this process's resident memory."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
