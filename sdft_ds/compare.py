"""Compare runs, e.g. SDFT and SFT, on one HTML page: accuracy before and after, overlaid curves, settings.

python -m sdft_ds.compare RUN_A RUN_B [RUN ...] [--output FILE]         writes compare.html
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from sdft_ds.metrics import run_folder
from sdft_ds.metrics.progress import PHASES, phase_seconds
from sdft_ds.metrics.run_folder import Run
from sdft_ds.report.charts import COLOURS, Series, lines, shares
from sdft_ds.report.curves import Chart, charts_of
from sdft_ds.report.page import document, grid, missing, table
from sdft_ds.report.run_page import before_after, facts

MOST = COLOURS


def write(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the page. Raises ValueError if a folder is not a run folder, or unless there are two to six of them."""
    if not 2 <= len(folders) <= MOST:
        raise ValueError(f"Name two to {MOST} run folders to compare, not {len(folders)}.")
    if len({Path(folder).resolve() for folder in folders}) < len(folders):
        raise ValueError("A run folder is named twice: name different ones.")
    output = Path(output)
    output.write_text(render([run_folder.read(folder) for folder in folders]), encoding="utf-8")
    return output


def render(runs: Sequence[Run]) -> str:
    """The page as HTML. Runs are labeled by folder name, or by full path if names coincide."""
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    named = dict(zip(names, runs, strict=True))
    title = " / ".join(names)
    entries = "".join(
        f'<li class="c{i}"><b>{escape(name)}</b> {escape(facts(run))}</li>'
        for i, (name, run) in enumerate(named.items())
    )
    sections = {"Before and after": before_after(named)}
    found = {name: phase_seconds(run.log) for name, run in named.items()}
    phases = [phase for phase in PHASES if any(phase in seconds for seconds in found.values())]
    times = {name: [seconds.get(phase, 0.0) for phase in phases] for name, seconds in found.items()}
    for heading, charts in _all_charts(runs).items():
        figures = [figure for chart in charts for figure in _overlaid(named, chart)]
        if heading == "Time" and any(sum(seconds) for seconds in times.values()):
            figures.insert(0, shares("Time of the whole run", "s", times, phases))
        if figures:
            sections[heading] = grid(figures)
    sections["Configuration"] = _differences(named, "config")
    sections["Environment"] = _differences(named, "environment", "versions")
    return document(title, f'<h1>{escape(title)}</h1><ul class="legend runs">{entries}</ul>', sections)


def _all_charts(runs: Sequence[Run]) -> dict[str, list[Chart]]:
    """The union of all runs' charts."""
    found: dict[str, dict[str, Chart]] = {}
    for run in runs:
        for heading, charts in charts_of(run).items():
            for chart in charts:
                other = found.setdefault(heading, {}).get(chart.title, chart)
                found[heading][chart.title] = replace(chart, curves=other.curves | chart.curves)
    return {heading: list(charts.values()) for heading, charts in found.items()}


def _overlaid(named: dict[str, Run], chart: Chart) -> list[str]:
    """A figure for each metric of the chart that any run logged, with one curve per run."""
    figures = []
    for metric, name in chart.curves.items():
        points = [run.series(metric) for run in named.values()]
        if any(steps for steps, _ in points):
            series = [
                Series(run_name if steps else f"{run_name}: not logged", steps, values, f"c{i}")
                for i, (run_name, (steps, values)) in enumerate(zip(named, points, strict=True))
            ]
            title = f"{chart.title}: {name}" if len(chart.curves) > 1 else chart.title
            figures.append(lines(title, chart.unit, series, chart.log))
    return figures


def _differences(named: dict[str, Run], *parts: str) -> str:
    """A table of the settings that differ between runs, and the number of equal ones."""
    found = {name: {k: v for part in parts for k, v in run.about.get(part, {}).items()} for name, run in named.items()}
    keys = sorted({key for settings in found.values() for key in settings})
    if not keys:
        return missing(f"No {parts[0]} was written: run.json is missing or has none.")
    rows = [[key, *(str(settings.get(key, "–")) for settings in found.values())] for key in keys]
    differ = [row for row in rows if len(set(row[1:])) > 1]
    note = f'<p class="note">{len(differ)} differ, {len(rows) - len(differ)} are the same.</p>'
    return note + (table(("setting", *named), differ, "settings") if differ else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="default: compare.html")
    args = parser.parse_args()
    try:
        written = write(args.runs, args.output)
    except (ValueError, OSError) as error:
        sys.exit(f"sdft_ds: {error}")
    print(f"Wrote {written}")


if __name__ == "__main__":
    main()
