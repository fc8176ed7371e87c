"""The command line as a user types it: the demo under DeepSpeed, preview --score, and evaluate on what was saved."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.setup import ROOT, Setup
from sdft_ds.demo.run import BASELINE, LESSONS
from sdft_ds.demo.world import questions
from sdft_ds.doctor.subprocesses import cause

LAUNCHER = ["-m", "deepspeed.launcher.runner"]


def run(setup: Setup, findings: Findings) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, trained = Path(name), Path(name, "demo")
        # With its baselines the demo has runs on the CPU beside it, which say nothing about this device.
        gpus = ["--num_gpus", str(setup.ranks)]
        flags = ["--deepspeed", "ds_configs/zero2.json", "--output_dir", str(trained)]
        demo = [*LAUNCHER, *gpus, "launch/train.py", *flags, *setup.sized([], ["--max_steps", "2"])]
        if _works(setup, findings, "demo", demo, {BASELINE: "1"}):
            lessons = json.loads((trained / LESSONS).read_text())
            findings.figure("demo: share of right answers", lessons)
            if not setup.tiny:
                findings.check("the demo learns its facts", lessons["sdft"]["new_trained"] == 1, lessons["sdft"])
        _works(setup, findings, "preview --score", ["-m", "sdft_ds.preview", "--score", "--rows", "2"])
        if trained.exists():
            asked = [{"prompt": question.messages, "answer": question.answer} for question in questions()[:4]]
            (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
            _works(setup, findings, "evaluate",
                   ["-m", "sdft_ds.evaluate", str(trained), "--eval_tasks", str(folder / "asked.jsonl"),
                    "--max_completion_length", "16"])  # fmt: skip


def _works(
    setup: Setup, findings: Findings, name: str, arguments: list[str], more: dict[str, str] | None = None
) -> bool:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**setup.environment(), **(more or {})}, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    print(done.stdout, flush=True)
    right = done.returncode == 0
    findings.check(name, right, "" if right else cause(done.stdout))
    return right
