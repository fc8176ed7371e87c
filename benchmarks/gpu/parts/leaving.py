"""How a run ends that is told to: by SIGTERM in a rollout; and one whose weights are not numbers."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import models
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.processes import rank_variables, start
from benchmarks.gpu.setup import Setup
from sdft_ds.checkpoint.preemption import MARKER
from sdft_ds.config.sdft_config import SDFTConfig
from tests.faults.runs import as_json
from tests.helpers import tiny

UNCLEAN = ("device-side assert", "destroy_process_group() was not called", "CUDA error")


def run(setup: Setup, findings: Findings) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _terminated(setup, findings, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        _not_numbers(setup, findings, Path(folder))
    findings.say("a signal and NaN weights")


def finish(setup: Setup, commands: list[str], folder: Path, ranks: int) -> list[tuple[int, str]]:
    """(status, output) of each rank of a Python program."""
    variables = rank_variables(ranks)
    processes = [start(commands, setup, folder / f"log-{i}", more=each) for i, each in enumerate(variables)]
    statuses = [process.wait() for process in processes]
    outputs = [(folder / f"log-{i}").read_text(errors="replace") for i in range(ranks)]
    print("\n".join(outputs), flush=True)
    return list(zip(statuses, outputs, strict=True))


def _terminated(setup: Setup, findings: Findings, folder: Path) -> None:
    """Rank 0 gets the signal in the rollout of step 4, and its training is not begun; a resume ends the run."""
    run = folder / "run"
    run.mkdir()
    code = SDFTConfig.__dataclass_fields__["preemption_exit_code"].default
    settings: dict[str, Any] = {"stage": 2, "save_strategy": "no"}
    program = ["-m", "tests.faults.program", str(run)]
    told = as_json([("term", "rollout", 3, 0)], settings)
    ended = finish(setup, [*program, told], folder, setup.ranks)
    statuses = [status for status, _ in ended]
    findings.check(f"SIGTERM in a rollout: status {code}", statuses == [code] * setup.ranks, statuses)
    marker = run / MARKER
    step = json.loads(marker.read_text())["step"] if marker.exists() else None
    findings.check("with a checkpoint of the step before", step == 3 and (run / "checkpoint-3").exists(), step)
    ended += finish(setup, [*program, as_json([], {**settings, "resume": True})], folder, setup.ranks)
    findings.check("a resume ends the run", all(status == 0 for status, _ in ended[setup.ranks :]))
    _clean(findings, "both", ended)


def _not_numbers(setup: Setup, findings: Findings, folder: Path) -> None:
    model = models.make("tiny")
    with torch.no_grad():
        next(model.parameters())[5] = float("nan")  # one row of the embedding, which is the head as well
    model.save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny.rows())))
    flags = ["--model_name_or_path", folder / "model", "--dataset_path", folder / "rows.jsonl", "--output_dir",
             folder / "run", "--max_steps", 2, "--max_completion_length", 8, "--num_generations", 2,
             "--per_device_train_batch_size", 2, "--report_to", "none", "--recipe", "trl"]  # fmt: skip
    ended = finish(setup, ["launch/train.py", *map(str, flags)], folder, setup.ranks)
    named = [line for _, said in ended for line in said.splitlines() if "logits are NaN or infinite" in line]
    findings.check("NaN in a weight: one line that names it", len(named) > 0, named[:1] or ended[0][1][-200:])
    findings.check("NaN in a weight: status 1, no traceback",
                   all(status == 1 and "Traceback" not in said for status, said in ended))  # fmt: skip
    _clean(findings, "NaN in a weight", ended)


def _clean(findings: Findings, name: str, ended: list[tuple[int, str]]) -> None:
    found = [words for words in UNCLEAN if any(words in said for _, said in ended)]
    findings.check(f"{name}: no assert on the device, groups closed", not found, found or "")
