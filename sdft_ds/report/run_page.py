"""The HTML report of a run: verdict, evaluations, curves, completions, time, configuration and environment."""

from html import escape
from pathlib import Path
from statistics import median

from sdft_ds.metrics import run_folder
from sdft_ds.metrics.progress import PHASES, phase_seconds
from sdft_ds.metrics.run_folder import Run
from sdft_ds.metrics.verdict import verdict
from sdft_ds.report.charts import Series, histogram, lines, stack
from sdft_ds.report.curves import charts_of
from sdft_ds.report.page import InlinePage, document, duration, grid, missing, moment, settings, table, tiles
from sdft_ds.report.scales import number
from sdft_ds.report.token_view import completions

KEYS = ("step", "task", "rows")  # of a line of evaluations.jsonl; the rest are its measures


def write(output_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the report of a run, to OUTPUT_DIR/report.html by default. Raises ValueError if there is no run."""
    output = Path(output or Path(output_dir, "report.html"))
    output.write_text(render(run_folder.read(output_dir)), encoding="utf-8")
    return output


def inline(output_dir: str | Path) -> InlinePage:
    """The report of a run as the output of a notebook's cell. Raises ValueError if there is no run."""
    run = run_folder.read(output_dir)
    return InlinePage(render(run), f"Report of {run.folder.resolve().name}: {facts(run)}")


def render(run: Run) -> str:
    """The report as text. Missing data is reported in its place."""
    title = run.folder.resolve().name
    head = f'<h1>{escape(title)}</h1><p class="facts">{escape(facts(run))}</p>'
    sections = {
        "Verdict": _verdict(run),
        "Summary": tiles(_figures(run)) + "".join(missing(note) for note in run.notes),
        "Before and after": before_after({"": run}),
        **_curves(run),
        "Completions": completions(run),
        "Configuration": _settings(run, "config"),
        "Environment": _settings(run, "environment", "versions"),
    }
    return document(title, head, sections)


def _verdict(run: Run) -> str:
    said = verdict(run)
    found = "".join(f"<li>{escape(sentence)}</li>" for sentence in said.found)
    advice = "".join(f'<li class="advice">{escape(sentence)}</li>' for sentence in said.advice)
    return f'<ul class="verdict">{found}{advice}</ul>'


def _curves(run: Run) -> dict[str, str]:
    """{heading: its charts and a list of those not logged}."""
    if not run.log:
        return {"Curves": missing("No metrics were logged: metrics.jsonl is missing or empty.")}
    sections = {}
    for heading, charts in charts_of(run).items():
        drawn = [(chart, chart.of(run)) for chart in charts]
        figures = [lines(chart.title, chart.unit, series, chart.log) for chart, series in drawn if series]
        absent = [f"{chart.title}{chart.absent}" for chart, series in drawn if not series]
        if heading == "Time":
            figures = _time(run) + figures
        elif heading == "Length":
            figures += _length_histogram(run)
        if figures or absent:
            sections[heading] = grid(figures) + (missing(f"Not logged: {', '.join(absent)}.") if absent else "")
    return sections


def facts(run: Run) -> str:
    """Method, model, teacher, start time and duration, as far as they are known."""
    about, config = run.about, run.about.get("config", {})
    method, teacher = about.get("method", ""), config.get("teacher_model_kind")
    said = [method.upper(), about.get("model"), f"teacher {teacher}" if teacher and method != "sft" else None]
    if "started" in about:
        said.append(f"started {moment(about['started'])}")
        finished = about.get("finished")
        said.append(f"took {duration(finished - about['started'])}" if finished else "not finished")
    return " · ".join(filter(None, said))


def before_after(runs: dict[str, Run]) -> str:
    """A table per measure of the evaluations, with a row per task and, for each {name: run}, the value before the
    first step, the last value, and the change."""
    found = [evaluation for run in runs.values() for evaluation in run.evaluations]
    if not found:
        return missing("No evaluations were written: evaluations.jsonl is missing or empty.")
    head = ["task", "rows", *["before", "after", "change"] * len(runs)]
    groups = [("", 2), *((name, 3) for name in runs)] if len(runs) > 1 else []
    blocks = []
    for measure in dict.fromkeys(key for evaluation in found for key in evaluation if key not in KEYS):
        tasks = {e["task"]: e.get("rows", "") for e in found if measure in e}
        rows = [
            [task, str(count), *(cell for run in runs.values() for cell in _change(run, task, measure))]
            for task, count in tasks.items()
        ]
        blocks.append(f"<div><h3>{escape(measure.replace('_', ' '))}</h3>{table(head, rows, 'figures', groups)}</div>")
    return f'<div class="tables">{"".join(blocks)}</div>'


def _change(run: Run, task: str, measure: str) -> list[str]:
    by_step = {e["step"]: e[measure] for e in run.evaluations if e["task"] == task and measure in e}
    before, last = by_step.get(0), max(by_step, default=0)
    after = by_step[last] if last else None
    change = None if before is None or after is None else after - before
    return [_figure(before), _figure(after), ("+" if change and change > 0 else "") + _figure(change)]


def _figure(value: float | None) -> str:
    """Three decimals, so that columns align; four significant digits for values that would round to zero."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else number(value)


def _figures(run: Run) -> dict[str, str]:
    """The key figures at the top, from what was logged."""
    found = {}
    _, values = run.series("sdft/distillation_loss")
    if values:
        found["Divergence, first → last, nats/token"] = f"{values[0]:.3g} → {values[-1]:.3g}"
    if run.log:
        found["Steps"] = f"{run.log[-1]['step']:,}"
    seconds = phase_seconds(run.log)
    if whole := sum(seconds.values()):
        phase = max(seconds, key=seconds.__getitem__)
        found["Seconds per step"] = number(whole / run.log[-1]["step"])
        found["Most time in"] = f"{phase}, {100 * seconds[phase] / whole:.0f} %"
    _, rates = run.series("tokens/per_second")
    if rates:
        found["Tokens per second, median"] = number(median(rates))
    _, peaks = run.series("memory/peak_gib")
    if peaks:
        found["Peak memory, GiB"] = f"{max(peaks):.3g}"
    return found


def _time(run: Run) -> list[str]:
    """Seconds per step, phases stacked; the legend has each phase's share of the whole run."""
    log = [line for line in run.log if any(f"seconds/{phase}" in line for phase in PHASES)]
    if not log:
        return []
    steps = [line["step"] for line in log]
    totals = phase_seconds(log)
    whole = sum(totals.values()) or 1.0
    layers = []
    for phase, seconds in totals.items():
        values = [line.get(f"seconds/{phase}", 0.0) for line in log]
        layers.append(Series(f"{phase} {100 * seconds / whole:.0f} %", steps, values, f"c{len(layers)}"))
    return [stack("Time of a step", "s/step", steps, layers)]


def _length_histogram(run: Run) -> list[str]:
    lengths, truncated = run.lengths()
    if not lengths:
        return []
    split: dict[str, list[int]] = {"ended": [], "cut off": []}
    for length, cut in zip(lengths, truncated, strict=True):
        split["cut off" if cut else "ended"].append(length)
    return [histogram("Lengths of logged completions", "tokens", split)]


def _settings(run: Run, *parts: str) -> str:
    values = {name: value for part in parts for name, value in run.about.get(part, {}).items()}
    return settings(values) if values else missing(f"No {parts[0]} was written: run.json is missing or has none.")
