"""Every metric of a run: its name, its unit and how ranks and steps are joined, in one table."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdft_ds.paired_batch import Rollout


@dataclass(frozen=True)
class Metric:
    """reduction: mean (weighted by what was counted), norm ratio (the root of one), max, min, sum, or slowest (largest
    rank's sum per step)."""

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
        "ratio", "norm ratio", "|teacher - student| / |student - start|, estimated on 65,536 values of each rank"
    ),
    "seconds/rollout": Metric("s/step", "slowest", "generation, per optimizer step, on the slowest rank"),
    "seconds/teacher": Metric("s/step", "slowest", "teacher scoring, swaps included"),
    "seconds/student": Metric("s/step", "slowest", "student forward"),
}


class Meters:
    """Collects values on this rank and joins them with the other ranks' when a log line is due.

    reduce: (tensor, "sum" | "max") -> the tensor joined over the ranks, in place or not.
    """

    def __init__(self, reduce: Callable[[Tensor, str], Tensor], device: torch.device):
        self.reduce = reduce
        self.device = device
        self.reset()

    def reset(self) -> None:
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

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to `seconds/<name>`; waits for the device, where there is one."""
        start = self._now()
        yield
        self.add(f"seconds/{name}", self._now() - start, 0.0)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def collect(self, steps: int) -> dict[str, float]:
        """The joined values since the last call; `steps` optimizer steps were made. Every rank must call it."""
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
            else:
                values[name] = total
        return values
