"""Sequential continual learning: trains one task after another, each stage from the previous stage's model, and
evaluates all tasks after each stage.

    python launch/sequential.py --stage NAME=TRAIN_FILE,TASK_FILE[:SCORER] --stage ... \\
        [--launcher 'deepspeed --num_gpus 8'] [--output_dir DIR] [--dry-run] -- --model_name_or_path MODEL FLAGS

FLAGS are those of launch/train.py, for every stage. DIR/1-NAME, DIR/2-NAME ... are the runs; DIR/matrix.json and
DIR/matrix.html report accuracy after each stage, and forgetting. The same command again resumes where it stopped.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_ds.checkpoint.preemption import MARKER
from sdft_ds.cli import arguments, dataset_loading
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.evaluation.tasks import RETENTION, read_tasks
from sdft_ds.files import atomic_write
from sdft_ds.merge import merge
from sdft_ds.metrics import run_folder
from sdft_ds.report.charts import COLOURS, Series, lines
from sdft_ds.report.page import document, grid, table

FINISHED = "stages.json"
START = "start"
OWN_FLAGS = ("dataset_path", "dataset_name", "output_dir", "eval_tasks", "resume_from_checkpoint")


class StageFailed(RuntimeError):
    """A stage did not finish. status: the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Stage:
    """A task. train: training file; questions: evaluation file, as in --eval_tasks without the name."""

    name: str
    train: str
    questions: str

    @classmethod
    def parse(cls, text: str) -> "Stage":
        parts = re.fullmatch(r"([\w.-]+)=([^,]+),([^,]+)", text)
        if parts is None or parts[1] in (RETENTION, START):
            raise ValueError(
                f"--stage {text}: expected NAME=TRAIN_FILE,TASK_FILE or NAME=TRAIN_FILE,TASK_FILE:SCORER, with a "
                f"NAME other than {RETENTION} and {START}."
            )
        if not Path(parts[2]).exists():
            raise FileNotFoundError(f"--stage {text}: {parts[2]} does not exist.")
        return cls(*parts.groups())


@dataclass(frozen=True)
class Plan:
    """All stages. train: launch command shared by the stages; flags: training flags given by the user."""

    stages: list[Stage]
    output: Path
    train: list[str]
    flags: list[str]

    def folder(self, i: int) -> Path:
        return self.output / f"{i + 1}-{self.stages[i].name}"

    def command(self, i: int) -> list[str]:
        """The training command of stage `i`. A stage after an adapter starts from the merged model."""
        start = ["--model_name_or_path", str(_merged(self.folder(i - 1)))] if i else []
        own = ["--dataset_path", self.stages[i].train, "--output_dir", str(self.folder(i)), *start]
        asked = [f"{stage.name}={stage.questions}" for stage in self.stages]
        return [*self.train, *self.flags, *own, "--eval_tasks", *asked, "--resume_from_checkpoint", "true"]

    def run(self) -> None:
        """Train unfinished stages, and write the matrix after each stage. Raises StageFailed, and ValueError if a
        finished stage differs from the given one."""
        self.output.mkdir(parents=True, exist_ok=True)
        record = self.output / FINISHED
        finished = json.loads(record.read_text()) if record.exists() else []
        self._check_data(len(finished))
        for i, stage in enumerate(self.stages):
            about = {"name": stage.name, "train": stage.train, "flags": self.flags}
            if i < len(finished):
                if finished[i] != about:
                    raise ValueError(
                        f"Stage {i + 1} in {self.output} was {finished[i]}, and now is {about}: give another "
                        "--output_dir, or the stages and flags of then."
                    )
                continue
            print(f"Stage {i + 1} of {len(self.stages)}: {stage.name}", flush=True)
            self._train(i)
            finished.append(about)
            _write(record, json.dumps(finished, indent=1))
            self.report(i + 1)

    def _check_data(self, first: int) -> None:
        """Read the training rows of all stages from `first` on. Raises ValueError, naming the stage."""
        for i in range(first, len(self.stages)):
            script = arguments.resolve(self.command(i)[len(self.train) :], {}).made(ScriptArguments)
            try:
                dataset_loading.load(script, evaluates=False, seed=0)
            except (ValueError, OSError) as error:
                raise ValueError(f"Stage {self.stages[i].name}: {error}") from None

    def _train(self, i: int) -> None:
        status = subprocess.run(self.command(i)).returncode
        if status or (self.folder(i) / MARKER).exists():
            raise StageFailed(f"Stage {self.stages[i].name} has not finished; the same command continues it.", status)
        if (self.folder(i) / "adapter_config.json").exists() and not (self.folder(i) / "merged").exists():
            merge(self.folder(i), self.folder(i) / "merged")

    def report(self, count: int) -> None:
        """Write matrix.json and matrix.html for the first `count` stages, and print the matrix."""
        names = [stage.name for stage in self.stages]
        runs = [run_folder.read(self.folder(i)).evaluations for i in range(count)]
        rows = {START: _accuracies(runs[0], 0)}
        rows |= {names[i]: _accuracies(run, max(line["step"] for line in run)) for i, run in enumerate(runs)}
        lost = forgotten(names, list(rows.values()))
        found = {"tasks": names, "after": [{"stage": name, **values} for name, values in rows.items()]}
        _write(self.output / "matrix.json", json.dumps({**found, "forgotten": lost}, indent=1) + "\n")
        cells = [[f"after {n}" if n in names else n, *_shown(names, values)] for n, values in rows.items()]
        cells.append(["forgotten", *_shown(names, lost)])
        printed = Table("", *names, title="Accuracy in each task")
        for row in cells:
            printed.add_row(*row)
        Console().print(printed)
        sections = {
            "Accuracy in each task": table(("", *names), cells, "figures"),
            "While it was trained": grid([lines("Accuracy", "share", curves(names, runs), may_log=False)]),
        }
        title = " → ".join(names)
        _write(self.output / "matrix.html", document(title, f"<h1>{title}</h1>", sections))


def forgotten(names: list[str], rows: list[dict[str, float]]) -> dict[str, float]:
    """For each task trained before the last one: its best accuracy from its own stage on, minus its latest.

    rows: accuracies by task, at the start and after each stage so far.
    """
    found = {}
    for i, name in enumerate(names[: len(rows) - 2]):
        since = [row[name] for row in rows[i + 1 :] if name in row]
        found[name] = max(since) - since[-1]
    return found


def curves(names: list[str], runs: list[list[dict[str, Any]]]) -> list[Series]:
    """The accuracy in each task over the concatenated optimizer steps of all stages."""
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in names}
    before = 0
    for i, run in enumerate(runs):
        for line in run:
            # A later stage's step 0 repeats the end of the previous stage.
            if line["task"] in points and (line["step"] > 0 or i == 0):
                points[line["task"]].append((before + line["step"], line["accuracy"]))
        before += max(line["step"] for line in run)
    return [
        Series(name, [x for x, _ in found], [y for _, y in found], f"c{i % COLOURS}")
        for i, (name, found) in enumerate(points.items())
    ]


def _merged(folder: Path) -> Path:
    return folder / "merged" if (folder / "merged").exists() else folder


def _accuracies(run: list[dict[str, Any]], step: int) -> dict[str, float]:
    return {line["task"]: line["accuracy"] for line in run if line["step"] == step and "accuracy" in line}


def _shown(names: list[str], values: dict[str, float]) -> list[str]:
    return [f"{values[name]:.3f}" if name in values else "–" for name in names]


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as aside:
        aside.write_text(text, encoding="utf-8")


def plan(args: argparse.Namespace, train_script: Path) -> Plan:
    """Returns the validated plan. Raises ValueError or FileNotFoundError, naming the flag and the fix."""
    stages = [Stage.parse(text) for text in args.stage]
    read_tasks([f"{stage.name}={stage.questions}" for stage in stages])
    for flag in args.flags:
        if not arguments.without([flag], OWN_FLAGS):
            raise ValueError(f"{flag.split('=')[0]} is each stage's own: leave it out after the --.")
    return Plan(stages, Path(args.output_dir), [*shlex.split(args.launcher), str(train_script)], args.flags)


def main(train_script: Path, argv: Sequence[str] | None = None) -> None:
    """Train all stages with `train_script`. Invalid arguments print one line and exit with status 1; a failed stage
    exits with its own status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", action="append", required=True, metavar="NAME=TRAIN_FILE,TASK_FILE[:SCORER]")
    parser.add_argument("--launcher", default=shlex.quote(sys.executable), help="what starts launch/train.py")
    parser.add_argument("--output_dir", default="runs/sequence", help="default: runs/sequence")
    parser.add_argument("--dry-run", action="store_true", help="print the commands of the stages")
    parser.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: those of launch/train.py")
    args = parser.parse_args(argv)
    try:
        planned = plan(args, train_script)
        if args.dry_run:
            print("\n".join(shlex.join(planned.command(i)) for i in range(len(planned.stages))))
        else:
            planned.run()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sdft_ds: {error}")
    except StageFailed as error:
        print(f"sdft_ds: {error}", file=sys.stderr)
        sys.exit(error.status or 1)
