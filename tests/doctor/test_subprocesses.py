"""Programs end within their limit, and nothing of them is left."""

import time
from pathlib import Path

import pytest

from sdft_ds.doctor import subprocesses


def test_status_and_output_of_each():
    ended = subprocesses.run(["print('one')", "import sys; print('two', file=sys.stderr)"], 30)
    assert ended == [(0, "one\n"), (0, "two\n")]


def test_who_waits_for_a_failed_one_is_ended():
    start = time.monotonic()
    (first, _), (second, said) = subprocesses.run(["import time; time.sleep(600)", "raise ValueError('no')"], 300)
    assert (first, second) == (None, 1) and said.endswith("ValueError: no\n")
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("deaf", [pytest.param(False, marks=pytest.mark.full), True])
def test_after_the_limit_nothing_runs(tmp_path, deaf):
    pid = tmp_path / "pid"
    ignore = "signal.signal(signal.SIGINT, signal.SIG_IGN)" if deaf else ""
    program = f"import signal, subprocess; {ignore}\nsubprocess.run(['sh', '-c', 'echo $$ > {pid}; exec sleep 600'])"
    start = time.monotonic()
    [(status, _)] = subprocesses.run([program], 5)
    assert status is None and time.monotonic() - start < 5 + 15
    stat = Path(f"/proc/{int(pid.read_text())}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":  # until somebody asks after it, a dead one is a zombie
        assert time.monotonic() - start < 60
        time.sleep(0.1)


def test_the_cause_is_the_line_that_names_an_error():
    assert subprocesses.cause("Traceback:\n  x\nRuntimeError: broken pipe\n  frame 0\n") == "RuntimeError: broken pipe"
    assert subprocesses.cause("RuntimeError: build\na.cpp:1:2: fatal error: b.h: No such file\nstopped\n").startswith(
        "a.cpp"
    )
    assert subprocesses.cause("killed\n") == "killed" and subprocesses.cause("") == "it said nothing"
