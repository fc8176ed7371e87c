"""The screen, the JSON and the exit status."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdft_ds.doctor import __main__
from sdft_ds.doctor.checks import FAIL, OK, WARN, Finding

ROOT = Path(__file__).parents[2]
UNEVEN = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "3"}


def run(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100", **variables},
    )  # fmt: skip


def test_json_and_exit_status(tmp_path):
    done = run("-m", "sdft_ds.doctor", "--json", "--output_dir", tmp_path / "run")
    said = json.loads(done.stdout)
    assert [*said["checks"]] == [*__main__.all_checks(tmp_path)]
    statuses = {line["status"] for line in said["checks"].values()}
    assert statuses <= {OK, WARN, FAIL} and said["fit"] == (FAIL not in statuses) == (done.returncode == 0)
    assert all(line["remedy"] for line in said["checks"].values() if line["status"] != OK)
    assert f"free in {tmp_path}" in said["checks"]["disk"]["found"]


def test_the_screen_says_what_fails_and_what_to_do(monkeypatch, capsys):
    for name, value in {**UNEVEN, "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    todo = __main__.all_checks(Path("."))
    quick = {name: check for name, check in todo.items() if name not in ("operators", "communication")}
    monkeypatch.setattr(__main__, "all_checks", lambda output_dir: quick)
    monkeypatch.setattr(sys, "argv", ["doctor"])
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    [at] = [i for i, line in enumerate(lines) if line.startswith("fail  slurm")]
    assert "job 7: 2 nodes" in lines[at] and "-> Every node needs" in lines[at + 1]
    assert lines[-1].startswith("This machine cannot train")
    assert max(map(len, lines)) <= 100


def test_a_log_says_that_a_slow_check_is_under_way(monkeypatch, capsys):
    monkeypatch.setattr(__main__, "SLOW", 0.05)
    slow = {"fast": lambda: Finding(OK, "yes"), "slow": lambda: time.sleep(0.5) or Finding(OK, "yes")}
    __main__.show(slow)
    said = capsys.readouterr().out
    assert "slow: still at it" in said and "fast: still at it" not in said


@pytest.mark.full
def test_a_signal_ends_the_checks_processes_too():
    program = (
        "import sys; from sdft_ds.doctor import __main__ as d, subprocesses; "
        "sys.argv = ['doctor', '--json']; "
        "d.all_checks = lambda o: {'wait': lambda: subprocesses.run(['import time; time.sleep(77)'], 99)}; d.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def children() -> list[str]:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        return found.stdout.split()

    deadline = time.monotonic() + 120
    while not children() and time.monotonic() < deadline:
        time.sleep(0.2)
    [child] = children()
    process.terminate()
    assert process.wait(60) == 143
    assert not Path(f"/proc/{child}").exists()


def test_without_any_package_every_check_reports():
    done = run("-S", "-m", "sdft_ds.doctor")
    said = json.loads(done.stdout)["checks"]
    assert done.returncode == 1 and [*said] == [*__main__.all_checks(Path("."))]
    assert said["packages"]["found"].startswith("missing: ") and "torch==" in said["packages"]["remedy"]
    assert said["accelerator"]["found"] == "ModuleNotFoundError: No module named 'torch'"
    assert said["memory"]["found"].endswith("GiB free") and said["slurm"]["status"] == OK
