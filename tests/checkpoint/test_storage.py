"""A checkpoint is complete or is not one, wherever its save was killed and whatever happened to its files."""

import multiprocessing
import os
import signal

import pytest

from sdft_ds.checkpoint import storage


def save(folder, step: int, kill_at: str | None = None) -> None:
    if kill_at is not None:

        def reached(point):
            if point == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        storage.reached = reached
    with storage.writing(folder, step) as aside:
        with open(f"{aside}/weights", "wb") as file:
            file.write(bytes([step]) * 5000)
            if kill_at == "half written":
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        os.mkdir(f"{aside}/inner")
        with open(f"{aside}/inner/more", "w") as file:
            file.write("more")


@pytest.mark.parametrize("point", ["begun", "half written", "written", "checked", "listed"])
def test_what_a_killed_save_leaves_is_no_checkpoint(tmp_path, point):
    save(tmp_path, 1)
    child = multiprocessing.get_context("fork").Process(target=save, args=(tmp_path, 2, point))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in storage.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert storage.newest_complete(tmp_path) == (tmp_path / "checkpoint-1", [])
    save(tmp_path, 2)  # the leftovers are not in the way
    assert storage.newest_complete(tmp_path)[0] == tmp_path / "checkpoint-2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2"]


def test_after_the_rename_the_new_one_counts(tmp_path):
    save(tmp_path, 1)
    child = multiprocessing.get_context("fork").Process(target=save, args=(tmp_path, 2, "renamed"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert storage.newest_complete(tmp_path) == (tmp_path / "checkpoint-2", [])


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1" / "stale").write_text("")
    save(tmp_path, 1)
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    assert storage.problem(tmp_path / "checkpoint-1") is None


def test_a_rewrite_that_was_killed_between_its_two_renames_loses_nothing(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1").rename(tmp_path / ".replaced-checkpoint-1")
    assert storage.newest_complete(tmp_path) == (tmp_path / "checkpoint-1", [])


def truncate(folder):
    os.truncate(folder / "weights", 100)


def flip_a_bit(folder):
    data = bytearray((folder / "weights").read_bytes())
    data[2500] ^= 1
    (folder / "weights").write_bytes(data)


def remove(folder):
    (folder / "inner" / "more").unlink()


def spoil_the_manifest(folder):
    (folder / "manifest.json").write_text('{"files": ')


@pytest.mark.parametrize(
    "damage, words",
    [
        (truncate, "weights has 100 bytes instead of 5000"),
        (flip_a_bit, "weights is damaged: its checksum"),
        (remove, "inner/more is missing"),
        (spoil_the_manifest, "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing: the checkpoint was not"),
    ],
)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage, words):
    save(tmp_path, 9)
    save(tmp_path, 10)
    damage(tmp_path / "checkpoint-10")
    found, skipped = storage.newest_complete(tmp_path)
    assert found == tmp_path / "checkpoint-9" and len(skipped) == 1 and words in skipped[0]
    with pytest.raises(storage.DamagedCheckpoint, match="Resume from another checkpoint"):
        storage.require_complete(tmp_path / "checkpoint-10")


def test_nothing_there(tmp_path):
    assert storage.newest_complete(tmp_path / "none") == (None, [])
    with pytest.raises(storage.DamagedCheckpoint, match="does not exist"):
        storage.require_complete(tmp_path / "none")


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(storage.DamagedCheckpoint, match="folder of a run, not a checkpoint: give .*checkpoint-7"):
        storage.require_complete(tmp_path)


def test_a_step_counts_where_it_is_of_this_run(tmp_path):
    assert storage.step_in(tmp_path, tmp_path / "checkpoint-7") == 7
    assert storage.step_in(tmp_path, tmp_path / "other" / "checkpoint-7") is None
    assert storage.step_in(tmp_path, tmp_path / "renamed") is None
