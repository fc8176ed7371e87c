"""One folder, one run: what another one left in it is neither taken for its own, nor mixed with it, nor lost."""

import contextlib
import json
import logging

import pytest
from peft import LoraConfig

from sdft_ds.checkpoint import output_dir, storage
from sdft_ds.checkpoint.output_dir import OutputFolderInUse
from sdft_ds.checkpoint.storage import CannotResume
from sdft_ds.metrics import run_folder
from tests.distributed.scenarios.restarts import start
from tests.helpers import tiny
from tests.helpers.trainers import make_trainer

ANCHORS = [{"prompt": f"Anchor {i}"} for i in range(3)]


def adapter(target: str, alpha: int = 8) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", target_modules=[target], r=4, lora_alpha=alpha)


@pytest.fixture
def another_process(monkeypatch):
    """What follows is as if this process had begun none of the runs so far."""
    return lambda: monkeypatch.setattr(output_dir, "_begun", set())


def save(folder, step, run):
    with storage.writing(str(folder), step, run) as aside:
        with open(f"{aside}/weights", "w") as file:
            file.write(run or "")


def test_a_new_run_in_the_folder_of_another_is_refused_before_anything_is_touched(tmp_path, another_process):
    first = start(None, str(tmp_path), max_steps=2)
    another_process()
    left = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file() and path.name != "_lock"}
    with pytest.raises(OutputFolderInUse, match="the newest checkpoint-2.*resume_from_checkpoint.*another"):
        start(None, str(tmp_path), max_steps=1)
    assert left == {path: path.stat().st_mtime_ns for path in left}
    again = start(None, str(tmp_path), resume=True, max_steps=2)
    assert again["weights"] == first["weights"]


@pytest.mark.parametrize(
    "before, after, words",
    [
        ({"peft_config": adapter("q_proj")}, {"peft_config": adapter("o_proj")},
         "digest of the trained weights' names.*target_modules is .'o_proj'. and was .'q_proj'."),
        ({"peft_config": adapter("q_proj")}, {"peft_config": adapter("q_proj", 256)}, "lora_alpha is 256 and was 8"),
        ({"anchors": ANCHORS}, {}, "rows of the anchors is None and was 3"),
        ({}, {"anchors": ANCHORS}, "rows of the anchors is 3 and was None"),
        ({"anchors": ANCHORS}, {"anchors": ANCHORS[:2]}, "rows of the anchors is 2 and was 3"),
    ],
)  # fmt: skip
def test_a_resume_that_trains_something_else_is_refused(tmp_path, before, after, words):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "num_generations": 1,
                "teacher_model_kind": "base"}  # fmt: skip
    make_trainer(**settings, **before, max_steps=1).train()
    with pytest.raises(CannotResume, match=words):
        make_trainer(**settings, **after, max_steps=2).train(resume_from_checkpoint=True)
    make_trainer(**settings, **before, max_steps=2).train(resume_from_checkpoint=True)


def test_a_resume_on_another_base_model_says_so(tmp_path, capsys):
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1, "lora": True}
    for steps, name in enumerate(("first", "second"), start=1):
        model = tiny.llama()
        model.config._name_or_path = name
        make_trainer(model=model, max_steps=steps, **settings).train(resume_from_checkpoint=steps > 1)
    assert "Resuming with the model 'second'; the checkpoint was made with 'first'." in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_told_to_be_missing(tmp_path, caplog, monkeypatch, tied):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # which a test before may have silenced
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 1}
    make_trainer(model=tiny.llama(tie_word_embeddings=True), max_steps=1, **settings).train()
    model = tiny.llama(tie_word_embeddings=tied)
    trainer = make_trainer(model=model, max_steps=2, **settings)
    with contextlib.nullcontext() if tied else pytest.raises(CannotResume):
        trainer.train(resume_from_checkpoint=True)
    assert "missing keys" not in caplog.text
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert ("lm_head.weight" in caplog.text) is not tied


def test_a_run_that_this_process_began_may_be_started_anew(tmp_path):
    """As in a notebook: nothing of the first is taken for the second's, or deleted for it."""
    start(None, str(tmp_path), max_steps=4, save_steps=2)
    second = start(None, str(tmp_path), max_steps=3, save_steps=1, save_total_limit=1, learning_rate=0.02)
    assert second["checkpoints"] == ["checkpoint-3", "checkpoint-4"]
    resumed = start(None, str(tmp_path), resume=True, max_steps=3, learning_rate=0.02)
    assert resumed["step"] == 3 and resumed["weights"] == second["weights"]
    assert f"Skipped a checkpoint: {tmp_path}/checkpoint-4 was written by another run" not in resumed["said"]


def test_records_are_of_one_run(tmp_path):
    """A second run starts its own; the first's are kept beside, and a resume goes on with them."""
    settings = {"save_strategy": "no", "log_completions": 1}
    start(None, str(tmp_path), max_steps=3, **settings)
    first = (tmp_path / "metrics.jsonl").read_text()
    second = start(None, str(tmp_path), max_steps=2, **settings)
    run = run_folder.read(tmp_path)
    assert [line["step"] for line in run.log] == [1, 2] and sorted(run.completions) == [1, 2]
    (kept,) = (tmp_path / "_earlier_runs").iterdir()
    assert (kept / "metrics.jsonl").read_text() == first and len(list((kept / "completions").iterdir())) == 3
    assert f"The records of an earlier run in {tmp_path} were moved to {kept}." in second["said"]
    assert "this run replaces that one's model" not in second["said"]
    (tmp_path / "model.safetensors").write_text("")  # as a run leaves it that was saved at its end
    third = start(None, str(tmp_path), max_steps=2, **settings)
    assert "At its end this run replaces that one's model: to keep it, stop now and move it." in third["said"]


def test_a_resume_goes_on_with_the_records_that_are_there(tmp_path):
    start(None, str(tmp_path), max_steps=2)
    begun = json.loads((tmp_path / "run.json").read_text())
    start(None, str(tmp_path), resume=True, max_steps=3)
    start(None, str(tmp_path), resume=True, max_steps=3)
    run = run_folder.read(tmp_path)
    assert [line["step"] for line in run.log] == [1, 2, 3] and not (tmp_path / "_earlier_runs").exists()
    assert run.about["started"] == begun["started"] and run.about["config"]["max_steps"] == 3
    # The last start trained nothing: the time and the mean loss are those of the one before it.
    assert run.log[-1]["train_loss"] > 0 and run.log[-1]["train_steps_per_second"] > 0


def test_a_finished_run_keeps_what_says_how_it_was_trained(tmp_path):
    start(None, str(tmp_path), max_steps=2)
    left = (tmp_path / "run.json").read_text(), (tmp_path / "metrics.jsonl").read_text()
    start(None, str(tmp_path), resume=True, max_steps=2)
    assert left == ((tmp_path / "run.json").read_text(), (tmp_path / "metrics.jsonl").read_text())
    assert (tmp_path / "report.html").exists()


def test_an_evaluation_of_the_start_is_the_runs_own(tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path), max_steps=1, per_device_eval_batch_size=2)
    trainer.evaluate()
    assert not (tmp_path / "metrics.jsonl").exists()
    trainer.train()
    first, last = run_folder.read(tmp_path).log
    assert first["step"] == 0 and "eval_loss" in first and last["step"] == 1


def test_checkpoints_without_an_identity_are_resumed(tmp_path, another_process):
    """Those of versions that wrote none."""
    first = start(None, str(tmp_path), max_steps=2, save_steps=1)
    for folder in storage.checkpoints(tmp_path):
        about = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({name: about[name] for name in ("step", "files")}))
    (tmp_path / "_run").unlink()
    another_process()
    with pytest.raises(OutputFolderInUse, match="checkpoint-2"):
        start(None, str(tmp_path), max_steps=2)
    more = start(None, str(tmp_path), resume=True, max_steps=3, save_steps=1, save_total_limit=2)
    assert more["step"] == 3 and more["checkpoints"] == ["checkpoint-2", "checkpoint-3"]
    assert first["losses"] and len(run_folder.read(tmp_path).log) == 3


def test_the_newest_is_the_one_that_was_written_last(tmp_path):
    """After a resume from an earlier step those beyond it are of a branch that was left."""
    for step in (2, 4, 8, 6):
        save(tmp_path, step, "a")
    assert storage.newest_complete(tmp_path, "a") == (tmp_path / "checkpoint-6", [])
    storage.rotate(str(tmp_path), "a", 2, best=str(tmp_path / "checkpoint-2"))
    assert {path.name for path in storage.checkpoints(tmp_path)} == {"checkpoint-2", "checkpoint-6"}


def test_others_checkpoints_are_passed_over_and_not_deleted(tmp_path):
    save(tmp_path, 9, "theirs")
    for step in (1, 2, 3):
        save(tmp_path, step, "ours")
    save(tmp_path, 10, "theirs")
    found, skipped = storage.newest_complete(tmp_path, "ours")
    assert found == tmp_path / "checkpoint-3" and skipped == [f"{tmp_path}/checkpoint-10 was written by another run"]
    storage.rotate(str(tmp_path), "ours", 1, best=None)
    assert {path.name for path in storage.checkpoints(tmp_path)} == {
        "checkpoint-3",
        "checkpoint-9",
        "checkpoint-10",
    }


def test_the_lock_is_held_once_by_a_process(tmp_path):
    with output_dir.locked(str(tmp_path)), output_dir.locked(f"{tmp_path}/"):
        pass
    with output_dir.locked(str(tmp_path)):
        pass
