"""Folders through which weights reach vLLM's servers."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from sdft_ds.rollouts import vllm_server
from sdft_ds.rollouts.weight_files import LOCK, WeightFiles
from tests.helpers.trainers import make_trainer

HOLD = """
import sys, time
from sdft_ds.rollouts.weight_files import WeightFiles
from pathlib import Path
files = WeightFiles(Path(sys.argv[1]), sys.argv[2])
with files.written(1) as part:
    (part / "tensor").write_text("1")
print(files.folder, flush=True)
time.sleep(600)
"""


def other_run(parent: Path, output_dir: str) -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(parent), output_dir], stdout=subprocess.PIPE, text=True
    )
    return process, Path(process.stdout.readline().strip())


def test_the_next_run_removes_what_a_killed_one_has_left_and_nothing_of_a_living_one(tmp_path):
    (killed, left), (living, kept) = other_run(tmp_path, "killed"), other_run(tmp_path, "living")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert (left / "weights-1" / "tensor").exists() and (kept / "weights-1" / "tensor").exists()
        files = WeightFiles(tmp_path, "new")
        assert not left.exists() and (kept / "weights-1" / "tensor").exists()
        files.remove()
        assert os.listdir(tmp_path) == [kept.name]
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
            process.stdout.close()


def test_what_a_killed_run_has_left_does_not_take_the_room_of_the_next(tmp_path, monkeypatch):
    killed, left = other_run(tmp_path, "killed")
    killed.kill()
    killed.wait()
    killed.stdout.close()
    monkeypatch.setattr(vllm_server, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(
        vllm_server.shutil, "disk_usage", lambda _: SimpleNamespace(free=0 if left.exists() else 1 << 40)
    )
    trainer = make_trainer(use_vllm=True, vllm_mode="server", output_dir=str(tmp_path / "run"))
    assert trainer.rollouts._default_folder() == tmp_path


def test_two_generations_are_kept_and_an_unfinished_one_has_no_name(tmp_path):
    files = WeightFiles(tmp_path, "run")
    for generation in range(1, 4):
        with files.written(generation) as part:
            assert not files.path(generation).exists()
            (part / "tensor").write_text(str(generation))
    assert sorted(os.listdir(files.folder)) == [LOCK, "weights-2", "weights-3"]
    with pytest.raises(OSError, match="full"), files.written(4):
        raise OSError("full")
    assert not files.path(4).exists()


def test_a_failed_run_removes_what_would_outlive_it(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise RuntimeError("broken")

    trainer = make_trainer(output_dir=str(tmp_path / "run"), callbacks=[Fail()])
    files = WeightFiles(tmp_path / "weights", "run")
    trainer.rollouts.abandon = files.remove
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    assert os.listdir(tmp_path / "weights") == []
