"""The table of charts in a run's report: which metrics share a chart, their labels, and the section headings."""

import re
from dataclasses import dataclass

from sdft_ds.metrics.meters import METRICS
from sdft_ds.metrics.progress import PHASES
from sdft_ds.metrics.run_folder import Run
from sdft_ds.report.charts import COLOURS, Series


@dataclass(frozen=True)
class Chart:
    """curves: metric -> label in the legend. log: allow a logarithmic axis. ordered: the curves form a sequence, with
    colours to match. absent: appended to the title when the chart is listed as not logged."""

    title: str
    unit: str
    curves: dict[str, str]
    log: bool = True
    ordered: bool = False
    absent: str = ""

    def of(self, run: Run) -> list[Series]:
        """The curves for which the run has values."""
        colour = "o" if self.ordered else "c"
        series = [
            Series(name, *run.series(m), f"{colour}{i % COLOURS}") for i, (m, name) in enumerate(self.curves.items())
        ]
        return [s for s in series if s.x]


CHARTS = {
    "Divergence": [
        Chart("Divergence from the teacher", "nats/token", {"sdft/distillation_loss": "divergence"}),
        Chart("Divergence of single tokens", "nats", {
            "divergence/p99": "99 % are below", "divergence/p90": "90 % are below", "divergence/p50": "median"}),
        Chart("Divergence by position", "nats/token", {
            "divergence/position_0_4": "tokens 0–3", "divergence/position_4_16": "4–15",
            "divergence/position_16_64": "16–63", "divergence/position_64_256": "64–255",
            "divergence/position_256_up": "256 and on"}, ordered=True),
    ],
    "Student and teacher": [
        Chart("Entropy", "nats/token", {"entropy/student": "student", "entropy/teacher": "teacher"}),
        Chart("Same most likely token", "share", {"agreement/argmax": "agreement"}, log=False),
        Chart("Teacher drift", "distance to the student / of the student from its start", {
            "teacher/distance": "drift"}, absent=" (a live teacher has none)"),
        Chart("Probability on the student's top-k", "share", {
            "topk/student_mass": "student's", "topk/teacher_mass": "teacher's"}, log=False),
    ],
    "Optimization": [
        Chart("Loss", "", {"loss": "loss"}),
        Chart("Gradient norm", "", {"grad_norm": "norm"}),
        Chart("Learning rate", "", {"learning_rate": "rate"}, log=False),
    ],
    "Length": [
        Chart("Completion length", "tokens", {
            "completions/max_length": "longest", "completions/mean_length": "mean",
            "completions/min_length": "shortest"}, log=False),
        Chart("Cut off, or empty", "share", {
            "completions/clipped_ratio": "cut off", "completions/empty_ratio": "empty"}, log=False),
    ],
    "Time": [
        Chart("Throughput", "tokens/s", {"tokens/per_second": "throughput"}, log=False),
        Chart("Peak memory of the largest rank", "GiB", {"memory/peak_gib": "peak"}, log=False),
        Chart("Padding in the student's forwards", "share", {"tokens/padding_share": "padding"}, log=False),
    ],
}  # fmt: skip
TASK = re.compile(r"tasks/(?P<task>.+)/(?P<figure>[^/]+)")
ELSEWHERE = {f"seconds/{phase}" for phase in PHASES}  # in the stacked area chart
# Totals of a run or of one evaluation, whose prefix may name its data set; also an evaluation's copy of the task
# figures, which have charts of their own.
SUMMARIES = re.compile(
    r"total_flos|train_loss|(train|eval)(_.+)?_(runtime|samples_per_second|steps_per_second)|eval_tasks/.+"
)


def charts_of(run: Run) -> dict[str, list[Chart]]:
    """CHARTS, plus a chart per FIGURE of the logged tasks/NAME/FIGURE, and under "Other" one per remaining metric."""
    placed = {metric for charts in CHARTS.values() for chart in charts for metric in chart.curves}
    known = placed | ELSEWHERE
    rest = [name for name in run.metrics() if name not in known and not SUMMARIES.fullmatch(name)]
    tasks: dict[str, dict[str, str]] = {}
    for name in rest:
        if asked := TASK.fullmatch(name):
            tasks.setdefault(asked["figure"], {})[name] = asked["task"]
    others = [Chart(name, _unit(name), {name: name}) for name in rest if not TASK.fullmatch(name)]
    figures = [Chart(figure.replace("_", " "), "by task", curves, log=False) for figure, curves in tasks.items()]
    return CHARTS | {"Tasks": figures, "Other": others}


def _unit(name: str) -> str:
    """A metric's unit. In an evaluation its name has a prefix: eval_, or eval_ and the data set's name."""
    return next((metric.unit for known, metric in METRICS.items() if f"_{name}".endswith(f"_{known}")), "")
