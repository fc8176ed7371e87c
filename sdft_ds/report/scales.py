"""Axes, ticks, thinning, moving averages and number formatting for charts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

LOG_FROM = 30.0  # positive values that span at least this ratio get a logarithmic axis


@dataclass(frozen=True)
class Axis:
    """Maps values low..high to pixels start..end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False  # ticks at whole numbers only

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, whole=self.whole)

    def __call__(self, value: float) -> float:
        scale = math.log10 if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return round(self.start + share * (self.end - self.start), 1)


def value_axis(values: Sequence[float], start: float, end: float, may_log: bool = False, whole: bool = False) -> Axis:
    """An axis that covers all finite values; starts at 0 if the smallest is less than half of the largest or all are
    equal; logarithmic, if may_log, where all are positive and span a factor of 30."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if may_log and low > 0 and high / low >= LOG_FROM:
        return Axis(low / 1.2, high * 1.2, start, end, log=True)
    if low == high or 0 <= low < 0.5 * high:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = (high - low) * 0.05 or 1.0
    return Axis(low - pad if low else 0.0, high + pad if high or not low else 0.0, start, end, whole=whole)


def step_axis(steps: Sequence[float], start: float, end: float) -> Axis:
    """An axis from the first to the last step; at least one step wide."""
    low, high = min(steps, default=0), max(steps, default=1)
    return Axis(low, high if high > low else low + 1, start, end, whole=True)


def thin(x: Sequence[float], y: Sequence[float], columns: int) -> tuple[list[float], list[float]]:
    """Keeps at most five points of each pixel column: first, last, smallest, largest and one non-finite. The drawn
    curve covers the same pixels."""
    if len(x) <= 2 * columns:
        return list(x), list(y)
    span = (x[-1] - x[0]) or 1
    kept = []
    for _, column in groupby(range(len(x)), key=lambda i: int((x[i] - x[0]) / span * columns)):
        column = list(column)
        finite = [i for i in column if math.isfinite(y[i])]
        keep = {column[0], column[-1], *[i for i in column if not math.isfinite(y[i])][:1]}
        if finite:
            keep |= {min(finite, key=y.__getitem__), max(finite, key=y.__getitem__)}
        kept += sorted(keep)
    return [x[i] for i in kept], [y[i] for i in kept]


def averages(y: Sequence[float]) -> list[float]:
    """Centered moving average of the finite values; the window is a 25th of all points, at least three, and shorter
    at the ends; nan where no value in it is finite."""
    window = np.ones(2 * max(1, len(y) // 50) + 1)
    finite = np.isfinite(y)
    # Not by differences of cumulative sums: after a value of 1e20 the others would be rounded away.
    sums, counts = (np.convolve(values, window, "same") for values in (np.where(finite, y, 0.0), finite.astype(float)))
    return np.divide(sums, counts, out=np.full(len(y), np.nan), where=counts > 0).tolist()


def ticks(low: float, high: float, most: int = 6, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within low..high, at most `most` + 1."""
    step = step_of((high - low) / most, whole)
    return [round(i * step, 12) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high; plus 2 and 5 times them if there are fewer than three, every n-th if there are
    more than seven."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    tens = [10.0**e for e in exponents[:: math.ceil(len(exponents) / 7)]]
    inside = [t for t in tens if low <= t <= high]
    return inside if len(inside) > 2 else [t * m for t in tens for m in (1, 2, 5) if low <= t * m <= high]


def number(value: float) -> str:
    """Four significant digits, without needless zeros: 0.0123, 1,234, 2.5e-06, nan."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def step_of(rough: float, whole: bool) -> float:
    if rough <= 0:
        return 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return max(1, round(step)) if whole else step


def tick(value: float) -> str:
    """1500000 -> 1.5M, 20000 -> 20k, 0.0003 -> 3e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    if 0 < abs(value) < 1e-3:
        exponent = math.floor(math.log10(abs(value)) + 1e-9)
        return f"{value / 10.0**exponent:.3g}e{exponent}"
    return f"{value:g}"


def as_json_number(value: float) -> float | str:
    """Six significant digits; non-finite values, which JSON lacks, as a string."""
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
