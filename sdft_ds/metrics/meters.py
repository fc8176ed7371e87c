"""Table of all metrics (name, unit, reduction), and the meters that reduce them across ranks and steps.

Between log lines nothing waits for the device: values stay on it, and phases are timed by events on its stream.
"""

import math
import resource
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sdft_ds.data.batch import MicroBatch, Rollout
from sdft_ds.loss.diagnostics import TokenDiagnostics


@dataclass(frozen=True)
class Metric:
    """reduction: mean (weighted by count), norm ratio (square root of a mean), max, min, sum, rate (sum per second of
    wall-clock time), slowest (largest rank's sum per step), quantile (over all ranks' tokens). training_only: not
    reported in an evaluation. optional: not reported where it is 0."""

    unit: str
    reduction: str
    meaning: str
    training_only: bool = False
    optional: bool = False


METRICS = {
    "sdft/distillation_loss": Metric("nats/token", "mean", "divergence of a loss token, importance weight included"),
    **{
        f"divergence/{name}": Metric("nats/token", "mean", f"that of completion tokens {first} to {last}")
        for name, first, last in (
            ("position_0_4", "0", "3"),
            ("position_4_16", "4", "15"),
            ("position_16_64", "16", "63"),
            ("position_64_256", "64", "255"),
            ("position_256_up", "256", "the last"),
        )
    },
    "divergence/p50": Metric("nats/token", "quantile", "half of the loss tokens lie below, to 4 %"),
    "divergence/p90": Metric("nats/token", "quantile", "90 % of the loss tokens lie below"),
    "divergence/p99": Metric("nats/token", "quantile", "99 % of the loss tokens lie below"),
    "entropy/student": Metric("nats/token", "mean", "of the student's distribution, at `inspect_tokens` tokens"),
    "entropy/teacher": Metric("nats/token", "mean", "of the teacher's distribution, at the same"),
    "agreement/argmax": Metric("share", "mean", "of these, where the most likely token of both is the same"),
    "topk/student_mass": Metric("share", "mean", "the student's probability of its top-k, there"),
    "topk/teacher_mass": Metric("share", "mean", "the teacher's probability of the student's top-k, there"),
    "is/ratio": Metric(
        "ratio",
        "mean",
        "student's probability now to when it was sampled, there; older rollouts only",
        training_only=True,
    ),
    "is/clip_share": Metric("share", "mean", "of these, where the ratio is clipped", training_only=True),
    "rollout/logprob_diff": Metric(
        "nats/token",
        "mean",
        "|sampler's log-probability of a token - the student's|, while the weights are those it was sampled from",
    ),
    "rollout/logprob_diff_max": Metric("nats/token", "max", "largest of these"),
    "completions/mean_length": Metric("tokens", "mean", "length of a completion, end-of-sequence token included"),
    "completions/min_length": Metric("tokens", "min", "shortest completion"),
    "completions/max_length": Metric("tokens", "max", "longest completion"),
    "completions/clipped_ratio": Metric("share", "mean", "completions that hit max_completion_length"),
    "completions/empty_ratio": Metric("share", "mean", "completions that ended at once; they have no loss"),
    "completions/repeated_ratio": Metric(
        "share", "mean", "4-grams of a completion that occurred in it before; above 0.5 it repeats itself"
    ),
    "completions/loss_tokens": Metric("tokens", "sum", "loss tokens trained on since the last log, over all ranks"),
    "anchors/distillation_loss": Metric(
        "nats/token", "mean", "divergence of an anchor's loss token; all other metrics of tokens are without anchors"
    ),
    "anchors/mean_length": Metric("tokens", "mean", "length of an anchor's completion"),
    "rewards/mean": Metric("reward", "mean", "reward of a completion, where it is known"),
    "rewards/std": Metric("reward", "mean", "standard deviation of the rewards of a prompt's completions"),
    "rewards/success_share": Metric("share", "mean", "prompts with a successful completion"),
    "rewards/unknown": Metric(
        "completions", "sum", "completions whose reward function failed since the last log", optional=True
    ),
    "policy/loss": Metric("loss/token", "mean", "policy loss of a token, where distillation_weight is below 1"),
    "policy/clip_share": Metric("share", "mean", "of these, where the probability ratio is clipped"),
    "contexts/made_share": Metric("share", "mean", "completions whose context was made after the rollout"),
    "contexts/missing_share": Metric("share", "mean", "completions without a context; they are not in the loss"),
    "prompts/student_cut": Metric("rows", "sum", "student prompts cut to max_prompt_length since the last log"),
    "prompts/teacher_cut": Metric("rows", "sum", "teacher prompts cut to max_teacher_prompt_length"),
    "teacher/distance": Metric(
        "ratio",
        "norm ratio",
        "|teacher - student| / |student - start|, estimated on 65,536 values",
        training_only=True,
    ),
    "tokens/per_second": Metric("tokens/s", "rate", "completion tokens made and trained on, over all ranks"),
    "tokens/padding_share": Metric("share", "mean", "positions of the student's forwards that are padding"),
    "memory/peak_gib": Metric("GiB", "max", "peak of the largest rank so far: device memory, or on a CPU resident"),
    "steps/nonfinite": Metric(
        "steps", "sum", "steps skipped since the last log: their gradient was not finite", training_only=True
    ),
    "seconds/rollout": Metric("s/step", "slowest", "generation, per optimizer step, on the slowest rank"),
    "seconds/feedback": Metric(
        "s/step", "slowest", "rewards and contexts made after the rollout, where there are any", optional=True
    ),
    "seconds/teacher": Metric("s/step", "slowest", "teacher scoring, swaps included"),
    "seconds/student": Metric("s/step", "slowest", "student forward, loss and backward"),
    "seconds/optimizer": Metric("s/step", "slowest", "optimizer step", training_only=True),
}


POSITIONS = (0, 4, 16, 64, 256)  # first positions of the buckets of divergence by position
QUANTILES = {"divergence/p50": 0.5, "divergence/p90": 0.9, "divergence/p99": 0.99}
# Histogram of the divergences: logarithmic bins from LEAST to MOST nats; the outer bins include all values beyond.
BINS, LEAST, MOST = 256, 1e-7, 1e2
Span = tuple[Any, Any]  # two moments: see Meters._now
MANY_SPANS = 1024
LATE = 1.5  # a rank slower than this many times the others' mean is reported as straggler


class Meters:
    """Accumulates values on this rank and reduces them across ranks when a log line is due.

    reduce: (tensor, "sum" | "max") -> the all-reduced tensor, in place or not. enter: called with the name of each
    phase that begins. rank, ranks: this rank and the world size. training: whether to report training_only metrics.
    """

    def __init__(
        self,
        reduce: Callable[[Tensor, str], Tensor],
        device: torch.device,
        enter: Callable[[str], None] = lambda phase: None,
        rank: int = 0,
        ranks: int = 1,
        training: bool = True,
    ):
        self.reduce = reduce
        self.device = device
        self.enter = enter
        self.rank = rank
        self.ranks = ranks
        self.training = training
        self.straggler: str | None = None  # after `collect`: the rank that the others waited for, and its phase
        self.nested: list[Span] = []  # phases within the current one
        self.reset()

    def reset(self) -> None:
        self.since = time.perf_counter()
        self.sums = {name: [0.0, 0.0] for name in METRICS}
        self.extremes: dict[str, float | Tensor] = {name: float("-inf") for name in METRICS}
        self.spans: list[tuple[str, Span, list[Span]]] = []  # phases since then, each with those nested in it
        self.histogram = torch.zeros(BINS, dtype=torch.float64, device=self.device)

    def add(self, name: str, total: float | Tensor, count: float = 1.0) -> None:
        """Add a value (max, min) or a sum of `count` values (mean, sum, slowest). Tensors are not synchronized."""
        reduction = METRICS[name].reduction
        if reduction in ("max", "min"):
            self.extremes[name] = _larger(self.extremes[name], total if reduction == "max" else -total)
        else:
            self.sums[name][0] += total
            self.sums[name][1] += count

    def count_completions(self, rollouts: list[Rollout]) -> None:
        """Add the completion metrics of the rollouts that count."""
        for rollout in rollouts:
            if rollout.counted and rollout.prompts.anchor:
                self.add("anchors/mean_length", len(rollout.completion.ids))
                self.add("tokens/per_second", len(rollout.completion.ids))
            elif rollout.counted:
                for name in ("mean", "min", "max"):
                    self.add(f"completions/{name}_length", len(rollout.completion.ids))
                self.add("completions/clipped_ratio", rollout.completion.truncated)
                self.add("completions/empty_ratio", rollout.empty)
                self.add("completions/repeated_ratio", _repeated(rollout.completion.ids))
                self.add("tokens/per_second", len(rollout.completion.ids))

    def count_positions(self, batch: MicroBatch) -> None:
        """Add the padding share of a micro-batch."""
        self.add("tokens/padding_share", batch.padding, batch.student.input_ids_LT.numel())

    def add_divergences(self, per_token_N: Tensor, offsets_N: Tensor, anchor_N: Tensor | None = None) -> None:
        """Add the divergences of loss tokens, those of anchors apart. offsets_N: their positions in their completions;
        anchor_N: see MicroBatch."""
        counted_N = torch.ones_like(per_token_N)
        if anchor_N is not None:  # without selecting tokens, which would wait for their number
            counted_N = (~anchor_N).to(per_token_N.dtype)
            self.add("anchors/distillation_loss", per_token_N.masked_fill(~anchor_N, 0.0).sum(), anchor_N.sum())
            per_token_N = per_token_N.masked_fill(anchor_N, 0.0)
        count = len(per_token_N) if anchor_N is None else (~anchor_N).sum()
        self.add("sdft/distillation_loss", per_token_N.sum(), count)
        self.add("completions/loss_tokens", count)
        bucket_N = sum(offsets_N >= first for first in POSITIONS[1:]).long()
        zeros = torch.zeros(len(POSITIONS), device=per_token_N.device)
        sums, counts = zeros.index_add(0, bucket_N, per_token_N), zeros.index_add(0, bucket_N, counted_N)
        for i, name in enumerate(name for name in METRICS if name.startswith("divergence/position")):
            self.add(name, sums[i], counts[i])
        per_token_N = per_token_N.double().nan_to_num(nan=MOST)
        share_N = (per_token_N.clamp(LEAST, MOST) / LEAST).log() / math.log(MOST / LEAST)
        bins_N = (share_N * BINS).long().clamp(max=BINS - 1)
        self.histogram.index_add_(0, bins_N, counted_N.double())

    def add_mismatch(self, differences_N: Tensor) -> None:
        """Add the differences between the sampler's and the student's log-probabilities of tokens."""
        if len(differences_N):
            size_N = differences_N.abs()
            self.add("rollout/logprob_diff", size_N.sum(), len(size_N))
            self.add("rollout/logprob_diff_max", size_N.max())

    def add_diagnostics(self, seen: TokenDiagnostics, old_log_probs_M: Tensor | None, clip: float | None) -> None:
        """Add the diagnostics of student and teacher at a sample of tokens."""
        count = len(seen)
        for name, side in (("student", seen.student), ("teacher", seen.teacher)):
            self.add(f"entropy/{name}", side.entropy_M.sum(), count)
            self.add(f"topk/{name}_mass", side.mass_M.sum(), count)
        self.add("agreement/argmax", seen.agree_M.sum(), count)
        if old_log_probs_M is not None and clip is not None:
            ratio_M = (seen.log_prob_M - old_log_probs_M).exp()
            self.add("is/ratio", ratio_M.sum(), count)
            self.add("is/clip_share", (ratio_M >= clip).sum(), count)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `seconds/<name>`, excluding nested phases, which count for themselves.
        On a device it is the time that its stream takes. A phase that raises adds nothing."""
        self.enter(name)
        start, outer, self.nested = self._now(), self.nested, []
        try:
            yield
            span = (start, self._now())
            self.spans.append((name, span, self.nested))
            if len(self.spans) % MANY_SPANS == 0:  # without log lines nothing else adds them up
                self._add_spans(wait=False)
            outer.append(span)
        finally:
            self.nested = outer

    def _now(self) -> Any:
        """This moment: seconds, or on a device an event on its stream."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def _add_spans(self, wait: bool = True) -> None:
        """Add the time of the phases so far. wait: for their end, too; else only of those that have ended."""
        left = []
        for name, span, nested in self.spans:
            if wait or _has_ended(span):
                self.add(f"seconds/{name}", _seconds(span) - sum(map(_seconds, nested)), 0.0)
            else:
                left.append((name, span, nested))
        self.spans = left

    def _on_device(self, values: Iterable[float | Tensor]) -> Tensor:
        """The values as one tensor, fp64, in one transfer."""
        values = list(values)
        found = torch.tensor(
            [0.0 if isinstance(value, Tensor) else float(value) for value in values], dtype=torch.float64
        ).to(self.device)
        for i, value in enumerate(values):
            if isinstance(value, Tensor):
                found[i] = value
        return found

    def collect(self, steps: int) -> dict[str, float]:
        """The reduced values since the last call, over `steps` optimizer steps. Collective."""
        elapsed = max(time.perf_counter() - self.since, 1e-9)
        self.add("memory/peak_gib", _peak_bytes(self.device) / 2**30)
        self._add_spans()
        sums = self._on_device(value for pair in self.sums.values() for value in pair).view(-1, 2)
        mine = sums[:, 0].clone()
        slowest = self.reduce(mine.clone(), "max")
        # The rank with the largest sum; the last one if tied.
        slowest_rank = self.reduce(torch.where(mine == slowest, float(self.rank), -1.0), "max")
        sums = self.reduce(sums, "sum")
        histogram = self.reduce(self.histogram, "sum")
        extremes = self.reduce(self._on_device(self.extremes.values()), "max")
        found = torch.cat([slowest, slowest_rank, extremes, sums.flatten(), histogram]).tolist()
        n = len(METRICS)
        slowest, slowest_rank, extremes = found[:n], found[n : 2 * n], found[2 * n : 3 * n]
        sums, histogram = (
            list(zip(found[3 * n : 5 * n : 2], found[3 * n + 1 : 5 * n : 2], strict=True)),
            found[5 * n :],
        )
        self.reset()
        self.straggler = None
        values = _quantiles(histogram)
        for i, (name, metric) in enumerate(METRICS.items()):
            total, count = sums[i]
            if metric.training_only and not self.training:
                continue
            if metric.reduction in ("max", "min"):
                if extremes[i] > float("-inf"):
                    values[name] = extremes[i] if metric.reduction == "max" else -extremes[i]
            elif metric.reduction in ("mean", "norm ratio"):
                if count:
                    values[name] = total / count if metric.reduction == "mean" else (total / count) ** 0.5
            elif metric.optional and total == 0:
                continue
            elif metric.reduction == "slowest":
                values[name] = slowest[i] / max(1, steps)
                self._note_straggler(name, slowest[i], total, int(slowest_rank[i]), elapsed)
            elif metric.reduction == "rate":
                values[name] = total / elapsed
            elif metric.reduction == "sum":
                values[name] = total
        return values

    def _note_straggler(self, name: str, most: float, total: float, rank: int, elapsed: float) -> None:
        """Record the first phase in which one rank takes far longer than the others' average, if that costs time: in
        later phases the others wait."""
        others = (total - most) / max(1, self.ranks - 1)
        if (
            self.straggler is None
            and self.ranks > 1
            and most > LATE * others
            and most - others > max(1.0, 0.2 * elapsed)
        ):
            self.straggler = f"rank {rank} took {most:.3g} s in {name.removeprefix('seconds/')}, others {others:.3g} s"


def _repeated(tokens: list[int], n: int = 4) -> float:
    """Share of a text's n-grams that occurred in it before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def _larger(a: float | Tensor, b: float | Tensor) -> float | Tensor:
    """The larger of two numbers, each on the host or on the device."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        tensor, number = (a, b) if isinstance(a, Tensor) else (b, a)
        return tensor.clamp(min=number)
    return max(a, b)


def _has_ended(span: Span) -> bool:
    return isinstance(span[1], float) or span[1].query()


def _seconds(span: Span) -> float:
    start, end = span
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _quantiles(histogram: list[float]) -> dict[str, float]:
    """The quantiles in nats, each as the midpoint of its bin."""
    cumulated = list(accumulate(histogram))
    if not cumulated[-1]:
        return {}
    found = {name: bisect_left(cumulated, share * cumulated[-1]) for name, share in QUANTILES.items()}
    return {name: LEAST * (MOST / LEAST) ** ((bin + 0.5) / BINS) for name, bin in found.items()}


def _peak_bytes(device: torch.device) -> int:
    """Peak device memory so far; without a device, peak resident memory of this process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
