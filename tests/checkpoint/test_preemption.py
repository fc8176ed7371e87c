import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import TrainerCallback

from sdft_ds.checkpoint.preemption import INTERRUPTED, MARKER, Preemption
from sdft_ds.distributed.shutdown import Preempted
from tests.faults.runs import ROOT
from tests.helpers.trainers import make_trainer

WAITING = """
import sys, time, torch
from sdft_ds.checkpoint.preemption import Preemption
with Preemption(sys.argv[1], 99, 300.0, torch.device("cpu")):
    print("ready", flush=True)
    time.sleep(60)
    time.sleep(60)
"""


@contextmanager
def waiting(folder):
    """A process that is where it catches requests; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()


class Signal(TrainerCallback):
    """Sends a signal to this process when a step is done."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number, by, code", [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 99)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, capfd, number, by, code):
    before = signal.getsignal(number)
    trainer = make_trainer(output_dir=str(tmp_path), callbacks=[Signal(number, 1)])
    trainer.preemption.go_on = "the command"
    with pytest.raises(Preempted) as left:
        trainer.train()
    assert left.value.code == code and signal.getsignal(number) is before
    said = capfd.readouterr()
    assert f"{by}: the run ends after this rollout or step, and saves it first." in said.err
    saved = (
        f"Stopped by {by} after step 1, with exit code {code}. Saved {tmp_path}/checkpoint-1. To go on: the command"
    )
    assert saved in said.out
    assert (tmp_path / "checkpoint-1").exists() and (tmp_path / MARKER).exists() == (number == signal.SIGTERM)


def test_before_the_first_step_nothing_is_saved_and_it_says_so(tmp_path, capsys):
    class AtFirst(TrainerCallback):
        def on_generation_prompts_selected(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(output_dir=str(tmp_path), callbacks=[AtFirst()])
    with pytest.raises(Preempted):
        trainer.train()
    assert "after step 0, with exit code 130. Nothing was saved, because no step was done." in capsys.readouterr().out
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_second_ctrl_c_ends_the_process_at_once(tmp_path):
    with waiting(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n" and "A second Ctrl-C ends it at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)  # the same key, which a launcher has passed on as well
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == INTERRUPTED and "Ended at once, unsaved." in process.stderr.read()


def test_the_first_ctrl_c_after_another_signal_does_not_end_at_once(tmp_path):
    with waiting(tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == INTERRUPTED and "the run is ending already" in process.stderr.read()


def test_any_ranks_ctrl_c_is_all_ranks(tmp_path, monkeypatch):
    """The exit code is that of the rank that was interrupted, whatever the others were asked for."""
    preemption = Preemption(str(tmp_path), 99, 300.0, torch.device("cpu"))
    monkeypatch.setattr("sdft_ds.distributed.ranks.all_reduce_max", lambda value, device: max(value, 2.0))
    with preemption:
        assert preemption.agree() and preemption.interrupted
        with pytest.raises(Preempted) as left:
            preemption.leave(3, "Saved.")
    assert left.value.code == INTERRUPTED and not (tmp_path / MARKER).exists()
