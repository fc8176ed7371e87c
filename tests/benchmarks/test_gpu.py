"""The run on a GPU, on a CPU at a tiny size: only the device is new there."""

import importlib
import json
import subprocess
import sys
import time

import pytest

from benchmarks.gpu import page, runner
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.findings import FAILED, NOT_RUN, PASSED, SKIPPED, Findings
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.setup import ROOT, Setup
from benchmarks.gpu.sources import missing_names
from tests.cli.test_train import command


@pytest.fixture
def setup(tmp_path):
    return Setup("cpu", True, 1, str(tmp_path))


@pytest.mark.parametrize("name", ["loss", "draws"])
def test_a_part_in_this_process(setup, tmp_path, name):
    findings = Findings(tmp_path / "findings.json")
    importlib.import_module(f"benchmarks.gpu.parts.{name}").run(setup, findings)
    assert Findings.read(tmp_path / "findings.json").status == PASSED, findings


def test_a_part_that_fails_or_does_not_end_is_followed_by_the_next(setup, tmp_path):
    records = []
    parts = [Part("missing", 60, True, ""), Part("facts", 0.5 / runner.ON_CPU, True, ""), Part("facts", 60, True, "")]
    runner.run_all(parts[:2], setup, 120, tmp_path / "log", records.append)
    runner.run_all(parts[2:], setup, runner.LEAST / 2, tmp_path / "log", records.append)
    assert [record["status"] for record in records] == [FAILED, FAILED, NOT_RUN]
    assert "No module named 'benchmarks.gpu.parts.missing'" in records[0]["line"]
    assert records[1]["line"] == "no end within 0 s"
    text = page.render({"device": "CPU", "parts": records})
    assert all(record["line"] in text for record in records)


def test_what_a_part_has_started_ends_with_it(setup, tmp_path):
    program = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    with (
        open(tmp_path / "output", "w") as output,
        runner._group([sys.executable, "-c", program], setup, output) as part,
    ):
        part.wait(20)
    child = (tmp_path / "output").read_text().strip()
    for _ in range(50):
        state = subprocess.run(["ps", "-o", "stat=", "-p", child], capture_output=True, text=True).stdout.strip()
        if state in ("", "Z"):
            return
        time.sleep(0.1)
    raise AssertionError(f"{child} is {state}")


def test_what_was_found_before_a_crash_is_kept(tmp_path):
    findings = Findings(tmp_path / "findings.json")
    assert findings.status == SKIPPED
    findings.figure("ms", 1 / 3)
    findings.check("small", False, float("nan"))
    kept = Findings.read(tmp_path / "findings.json")
    assert kept.figures == {"ms": 0.3333} and kept.checks == [["small", False, "nan"]] and kept.status == FAILED
    assert kept.line() == "small: nan"


def test_this_torch_has_the_names_that_the_sources_take_from_it(tmp_path):
    (tmp_path / "module.py").write_text("import torch\ntorch.nn.Linear\ntorch.accelerator.teleport(1)\n")
    assert missing_names(tmp_path) == ["torch.accelerator.teleport"]
    assert not missing_names(ROOT / "sdft_ds") and not missing_names(ROOT / "benchmarks")


@pytest.mark.parametrize(
    "flags, words", [(["--device", "cpu"], "needs --tiny"), (["--ranks", "99"], "needs as many GPUs")]
)
def test_what_cannot_run_is_said_at_once(tmp_path, flags, words):
    with pytest.raises(SystemExit, match=words):
        main(["--out", str(tmp_path), *flags])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks, parts", [(1, list(PARTS)), (2, ["matrix", "swaps", "resume", "leaving"])])
def test_every_part_runs(tmp_path, ranks, parts):
    flags = ["--out", tmp_path, "--device", "cpu", "--tiny", "--budget", "1700", "--ranks", ranks, "--parts", *parts]
    done = command(sys.executable, "-m", "benchmarks.gpu", *flags, timeout=1750, check=False)
    results = json.loads((tmp_path / "results.json").read_text())
    assert done.returncode == 0, done.stdout + (tmp_path / "log.txt").read_text()
    assert [record["part"] for record in results["parts"]] == parts
    assert [line.split()[1] for line in done.stdout.splitlines()] == parts
    assert all(record["status"] == PASSED for record in results["parts"] if record["part"] != "vllm")
    assert all(f"## {name}" in (tmp_path / "results.md").read_text() for name in parts)
