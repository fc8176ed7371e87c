"""Kills, full disks, damage, signals and bad numbers, on real processes with a time limit."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sdft_ds.checkpoint import storage
from tests.faults.runs import ROOT, end, finish, run, start, start_by

SAVED = 99


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("checkpoint"))


# What a rank says that leaves a process group which others still use, or that was never closed.
LEFT_BADLY = re.compile("SIGABRT|terminate called|destroy_process_group|Connection (closed|reset)|exitcode")


def succeeded(ended):
    said = "\n".join(output for _, output in ended)
    assert [code for code, _ in ended] == [0] * len(ended) and not LEFT_BADLY.search(said), said


def wait_for(path, processes, seconds=90, ended=False):
    """ended: the first process may have ended before."""
    given_up = time.monotonic() + seconds
    while not path.exists():
        assert (ended or processes[0].poll() is None) and time.monotonic() < given_up
        time.sleep(0.2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The end of a run that nothing happened to, for each (ranks, stage)."""
    made = {}

    def get(ranks, stage=None, **settings):
        key = (ranks, stage, *settings.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            succeeded(run(folder, ranks, stage=stage, **settings))
            made[key] = [end(folder, rank) for rank in range(ranks)]
        return made[key]

    return get


POINTS = ["begun", "written", "checked", "listed", "renamed", "rotated"]


@pytest.mark.full
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_save_costs_the_steps_since_the_last_one(tmp_path, whole, point, rank):
    """SIGKILL to one rank at each point of the save of step 4, then a resume: the end is that of an unbroken run."""
    if point == "listed" and rank == 1:
        pytest.skip("rank 1 lists nothing")
    ended = run(tmp_path, 2, faults=[("kill", point, 4, rank)])
    assert all(code != 0 for code, _ in ended)
    complete, _ = storage.newest_complete(tmp_path)
    assert complete is not None and complete.name in ("checkpoint-2", "checkpoint-4")
    succeeded(run(tmp_path, 2, resume=True))
    assert [end(tmp_path, rank) for rank in (0, 1)] == whole(2)


@pytest.mark.full
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    """Files may not grow beyond 9 kB from the second save on; nothing is rotated away."""
    ended = run(tmp_path, 2, faults=[("small files", "begun", 4, 0)], save_total_limit=1)
    assert all(code != 0 for code, _ in ended)
    assert names(tmp_path) == ["checkpoint-2"] and storage.problem(tmp_path / "checkpoint-2") is None


FILES = ["teacher-rank-0.safetensors", "model.safetensors", "optimizer.pt", "rng_state.pth"]


@pytest.mark.full
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_is_named_and_the_one_before_is_resumed_from(tmp_path, whole, pattern):
    succeeded(run(tmp_path, max_steps=4))
    path = next((tmp_path / "checkpoint-4").glob(pattern))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)
    ((code, output),) = run(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert code != 0 and f"{path} is damaged" in output
    path.unlink()
    ((code, output),) = run(tmp_path, resume=True)
    assert code == 0 and f"Skipped a checkpoint: {path} is missing" in output and "Resuming from" in output
    assert end(tmp_path) == whole(1)[0]


@pytest.mark.full
@pytest.mark.parametrize("stage", [None, 3])
@pytest.mark.parametrize("what", ["term", "usr1", "stop file"])
def test_a_signal_to_one_rank_saves_the_same_step_on_all(tmp_path, whole, stage, what):
    faulty = 0 if what == "stop file" else 1
    ended = run(tmp_path, 2, stage=stage, faults=[(what, "step", 3, faulty)])
    assert [code for code, _ in ended] == [SAVED, SAVED], "\n".join(output for _, output in ended)
    marker = json.loads((tmp_path / "PREEMPTED").read_text())
    assert marker["step"] == 3 and names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    succeeded(run(tmp_path, 2, stage=stage, resume=True))
    assert not (tmp_path / "PREEMPTED").exists() and not (tmp_path / "STOP").exists()
    assert [end(tmp_path, rank) for rank in (0, 1)] == whole(2, stage)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_ctrl_c_of_one_rank_saves_the_same_step_on_all(tmp_path, whole, ranks):
    ended = run(tmp_path, ranks, faults=[("int", "step", 3, ranks - 1)], save_steps=10)
    assert [code for code, _ in ended] == [130] * ranks, "\n".join(output for _, output in ended)
    assert "Stopped by Ctrl-C after step 3" in ended[0][1] and not (tmp_path / "PREEMPTED").exists()
    assert names(tmp_path) == ["checkpoint-3"]
    succeeded(run(tmp_path, ranks, resume=True, save_steps=10))
    assert [end(tmp_path, rank) for rank in range(ranks)] == whole(ranks, save_steps=10)


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_ctrl_c_under_a_launcher(tmp_path, launcher):
    """As a terminal sends it, to all processes; launchers send another signal to the ranks."""
    processes = start_by(launcher, tmp_path, faults=[("hang a little", "step", 3, 0)], save_steps=10)
    wait_for(tmp_path / "hanging", processes)
    os.killpg(processes[0].pid, signal.SIGINT)
    wait_for(tmp_path / "checkpoint-3", processes, ended=True)
    ((code, output),) = finish(processes)
    assert code != 0 and "Stopped by Ctrl-C after step 3" in output
    assert storage.problem(tmp_path / "checkpoint-3") is None


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("to", ["one rank", "all processes"])
def test_preemption_under_a_launcher(tmp_path, whole, launcher, to):
    """Launchers lose the exit code; the marker tells, and the same command goes on."""
    faults = [("term", "step", 3, 1)] if to == "one rank" else [("hang a little", "step", 3, 0)]
    processes = start_by(launcher, tmp_path, faults=faults, save_steps=10)
    if to == "all processes":
        wait_for(tmp_path / "hanging", processes)
        os.killpg(processes[0].pid, signal.SIGTERM)
    ((code, output),) = finish(processes)
    assert code != 0 and json.loads((tmp_path / "PREEMPTED").read_text())["step"] == 3, output
    assert names(tmp_path) == ["checkpoint-3"]
    ((code, output),) = finish(start_by(launcher, tmp_path, resume=True, save_steps=10))
    assert code == 0, output
    assert [end(tmp_path, rank) for rank in (0, 1)] == whole(2, save_steps=10)


@pytest.mark.full
def test_a_signal_during_a_rollout_is_obeyed_before_the_training_that_follows(tmp_path, whole):
    """What was rolled out is saved with the weights, and used after the resume."""
    ((code, output),) = run(tmp_path, faults=[("term", "rollout", 3, 0)], save_steps=10)
    assert code == SAVED, output
    assert json.loads((tmp_path / "PREEMPTED").read_text())["step"] == 3
    assert (tmp_path / "checkpoint-3" / "generation-batch-rank-0.json").exists()
    succeeded(run(tmp_path, resume=True, save_steps=10))
    assert end(tmp_path) == whole(1, save_steps=10)[0]


@pytest.mark.full
def test_a_second_signal_during_the_save_changes_nothing(tmp_path):
    ((code, output),) = run(tmp_path, faults=[("term", "step", 3, 0), ("term", "written", 3, 0)])
    assert code == SAVED, output
    assert storage.problem(tmp_path / "checkpoint-3") is None


def test_the_deadline_ends_a_save_that_hangs(tmp_path):
    settings = {"preemption_deadline_seconds": 3.0, "preemption_exit_code": 77}
    ((code, output),) = run(
        tmp_path, faults=[("term", "step", 3, 0), ("hang", "written", 3, 0)], timeout=60, **settings
    )
    assert code == 77, output
    assert json.loads((tmp_path / "PREEMPTED").read_text())["step"] is None
    assert storage.newest_complete(tmp_path)[0].name == "checkpoint-2"


def test_one_rank_that_raises_ends_all(tmp_path):
    ended = run(tmp_path, 2, faults=[("raise", "rollout", 3, 1)], ddp_timeout=20, timeout=90)
    assert all(code not in (0, SAVED) for code, _ in ended) and "on purpose" in ended[1][1]


@pytest.mark.full
def test_the_first_rank_may_take_long_at_the_end(tmp_path):
    """As when it uploads a model: the others wait for it, also beyond ddp_timeout."""
    succeeded(run(tmp_path, 2, max_steps=1, save_strategy="no", ddp_timeout=20, faults=[("linger", "end", 1, 0)]))


@pytest.mark.full
def test_a_rank_that_fails_at_the_end_takes_the_others_along(tmp_path):
    ended = run(tmp_path, 2, max_steps=1, save_strategy="no", timeout=90, faults=[("raise", "end", 1, 0)])
    assert all(code not in (0, SAVED) for code, _ in ended) and "on purpose" in ended[0][1]
    assert "Another rank has failed" in ended[1][1]


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
@pytest.mark.parametrize("stage", [None, 2, 3])
def test_runs_that_save_and_succeed_end_with_success(tmp_path, launcher, stage):
    """Every time: each of them and its resume, 36 programs of two ranks in all."""
    for i in range(3):
        folder = tmp_path / str(i)
        succeeded(finish(start_by(launcher, folder, stage=stage, max_steps=2)))
        succeeded(finish(start_by(launcher, folder, stage=stage, max_steps=4, resume=True)))


@pytest.mark.full
def test_a_second_job_in_the_same_folder_is_refused(tmp_path):
    first = start(tmp_path, faults=[("hang", "rotated", 2, 0)])
    wait_for(tmp_path / "checkpoint-2", first)
    ((code, output),) = run(tmp_path)
    assert code != 0 and f"in use by another job (host {os.uname().nodename}, pid {first[0].pid})" in output
    first[0].send_signal(signal.SIGKILL)
    finish(first)
    ((code, output),) = run(tmp_path, resume=True)  # the lock of a dead process is free
    assert code == 0, output


@pytest.mark.full
def test_another_runs_checkpoint_is_refused_and_a_change_is_told(tmp_path):
    succeeded(run(tmp_path, max_steps=2))
    ((code, output),) = run(tmp_path, resume=True, seed=6, num_generations=1)
    assert code != 0 and "num_generations is 1 and was 2" in output and "seed is 6 and was 5" in output
    ((code, output),) = run(tmp_path, resume=True, learning_rate=0.02)
    assert code == 0 and "learning_rate = 0.02; the checkpoint was made with 0.01" in output


# (stage, ranks) before and after.
MOVES = [((2, 2), (2, 1)), ((3, 2), (3, 1)), ((1, 1), (1, 2)), ((3, 1), (3, 2)), ((0, 2), (0, 1)), ((1, 2), (2, 2)),
         ((2, 2), (1, 1)), ((None, 2), (None, 1))]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("before, after", MOVES)
def test_a_resume_on_another_number_of_ranks_or_stage(tmp_path, whole, before, after):
    """The run that was not interrupted, up to rounding, its teacher included; each step has as many rows."""
    (stage, ranks), (new_stage, new_ranks) = before, after
    settings = {"logging_steps": 1, "gradient_accumulation_steps": 2 if ranks == 1 else 1, "weight_decay": 0.1}
    succeeded(run(tmp_path, ranks, max_steps=4, stage=stage, **settings))
    folder = tmp_path / "checkpoint-4"
    if stage:
        ended = run(tmp_path, new_ranks, resume=True, stage=new_stage, **settings)
        command = f"python -m sdft_ds.checkpoint universal {folder}"
        assert all(code != 0 for code, _ in ended) and command in ended[0][1], ended[0][1]
        subprocess.run([sys.executable, *command.split()[1:]], check=True, cwd=ROOT, capture_output=True)
        assert storage.problem(folder) is None
    succeeded(run(tmp_path, new_ranks, resume=True, stage=new_stage, **settings))
    expected = whole(ranks, stage, **settings)[0]
    assert end(tmp_path)["losses"] == pytest.approx(expected["losses"], rel=2e-5)


@pytest.mark.full
def test_what_cannot_go_on_elsewhere_is_refused(tmp_path):
    """Rows of a step that the ranks do not divide, and an optimizer of another kind."""
    succeeded(run(tmp_path, max_steps=2, per_device_train_batch_size=2))
    ended = run(tmp_path, 2, resume=True, per_device_train_batch_size=2)
    assert (
        all(code != 0 for code, _ in ended) and "2 ranks x per_device_train_batch_size=2 do not divide" in ended[0][1]
    )
    ((code, output),) = run(tmp_path, resume=True, per_device_train_batch_size=2, stage=2)
    assert code != 0 and "was made without DeepSpeed, and this run is at ZeRO stage 2" in output


@pytest.mark.full
def test_without_a_complete_checkpoint_a_resume_starts_from_the_beginning(tmp_path, whole):
    ((code, output),) = run(tmp_path, resume=True)
    assert code == 0 and "No complete checkpoint" in output and end(tmp_path) == whole(1)[0]
