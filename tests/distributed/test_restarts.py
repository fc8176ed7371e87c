"""What a start finds that others left: all done, more or fewer steps asked for, other settings, the best model."""

import dataclasses
import math

import pytest
import torch

from sdft_ds import SDFTConfig
from sdft_ds.checkpoint import resume_settings
from sdft_ds.config.fields import APPLIED, FREE, own_fields
from tests.distributed.scenarios.restarts import (
    FOLLOWING,
    best_then_evaluated,
    checkpoint_with_stale_listings,
    saved,
    start,
    starts,
)
from tests.helpers.trainers import DS_CONFIGS

STAGES = [None, pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.full),
          pytest.param(2, marks=pytest.mark.full), 3]  # fmt: skip
AGAIN = {"resume": True}


def on(ranks, stage, function, *arguments, **settings):
    """The results of all ranks: of this process alone without DeepSpeed, which is quick."""
    if stage is None:
        return [function(stage, *arguments, **settings)]
    return ranks.run(function, stage, *arguments, **settings)


@pytest.mark.parametrize("stage", [None, *(pytest.param(stage, marks=pytest.mark.full) for stage in range(4))])
def test_a_finished_run_ends_at_once_and_goes_on_when_more_is_asked_for(two_ranks, tmp_path, stage):
    """In the middle of an epoch, twice; then two more steps, which are those of a run that was not interrupted."""
    settings = {"teacher_model_kind": "ema", "teacher_sync_steps": 1}
    each = [{"max_steps": 4}, {"max_steps": 4, **AGAIN}, {"max_steps": 3, **AGAIN}, {"max_steps": 6, **AGAIN}]
    results = on(two_ranks, stage, starts, str(tmp_path / "parts"), each, **settings)
    whole = [run for (run,) in on(two_ranks, stage, starts, str(tmp_path / "whole"), [{"max_steps": 6}], **settings)]
    for unbroken, (first, again, fewer, more) in zip(whole, results, strict=True):
        for finished in (again, fewer):
            assert finished["step"] == 4 and not finished["losses"] and not finished["completions"]
            for what in ("weights", "teacher", "checkpoints"):
                assert finished[what] == first[what], what
        assert more["step"] == 6 and first["losses"] + more["losses"] == unbroken["losses"]
        assert more["weights"] == unbroken["weights"] and more["teacher"] == unbroken["teacher"]
        assert more["steps since"] == [1, 1] and not (again["steps since"] or fewer["steps since"])
    said = [start["said"] for start in results[0]]
    assert "All 4 steps are done" in said[1] and "Raise max_steps" in said[1] and "All 3 steps are done" in said[2]
    assert "are done" not in said[0] + said[3]


# Every setting that a checkpoint fixes, with another value, and a schedule whose rate is another at each step.
BEFORE = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "lr_scheduler_type": "linear", "eval_steps": 1,
          "eval_strategy": "steps", "per_device_eval_batch_size": 2}  # fmt: skip
AFTER = {"max_steps": 8, "save_steps": 4, "logging_steps": 2, "eval_steps": 5, "learning_rate": 0.03,
         "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 2,
         "weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2}  # fmt: skip


def test_settings_that_a_checkpoint_fixes_are_put_in_its_place(one_rank, tmp_path):
    """Without DeepSpeed and at ZeRO-2 and -3: the rates of the new schedule, the hyperparameters, the intervals;
    and the weights that they lead to, which are the same everywhere."""
    values = {}
    for stage in (None, 2, 3):
        each = [BEFORE, {**BEFORE, **AFTER, **AGAIN}]
        _, other = on(one_rank, stage, starts, str(tmp_path / str(stage)), each)[0]
        values[stage] = other["values"]
        # A cosine from 0.03 at step 2 to a tenth at step 8. Lines stand for steps 4, 6 and 8, and tell the last rate.
        cosine = [0.03 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 6)) / 2) for step in range(8)]
        assert other["rates"] == pytest.approx([cosine[3], cosine[5], cosine[7]], rel=1e-6)
        assert other["logged"] == [1, 2, 3, 4, 6, 8] and other["steps since"] == [1, 2, 2]
        assert other["evaluated"] == [1, 2, 3, 5, 8]
        assert other["checkpoints"] == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-8"]
        decayed, others = other["groups"]
        assert decayed["weight_decay"] == 0.5 and others["weight_decay"] == 0.0
        assert decayed["betas"] == others["betas"] == (0.5, 0.9) and decayed["eps"] == others["eps"] == 1e-2
        for name in AFTER:
            assert f"Resuming with {name} = " in other["said"], name
    for stage in (2, 3):
        for one, another in zip(values[None], values[stage], strict=True):
            torch.testing.assert_close(one, another, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_the_step_after_a_resume_has_the_rate_of_the_longer_schedule(two_ranks, tmp_path, stage):
    each = [{"max_steps": 2}, {"max_steps": 4, **AGAIN}]
    for rank in on(two_ranks, stage, starts, str(tmp_path), each, lr_scheduler_type="linear", learning_rate=0.01):
        first, more = rank
        assert first["rates"] == [0.01, 0.005] and more["rates"] == pytest.approx([0.005, 0.0025])


@pytest.mark.full
@pytest.mark.parametrize("stage", ["2", "3"])
def test_the_optimizer_moves_to_the_host_and_back_on_a_resume(one_rank, tmp_path, stage):
    configs = [str(DS_CONFIGS / f"zero{stage}{name}.json") for name in ("", "_offload", "")]
    each = [{"max_steps": 2 * (i + 1), "resume": i > 0, "deepspeed": path} for i, path in enumerate(configs)]
    parts = one_rank.run(starts, None, str(tmp_path / "parts"), each)[0]
    whole = one_rank.run(starts, int(stage), str(tmp_path / "whole"), [{"max_steps": 6}])[0]
    losses = [loss for part in parts for loss in part["losses"]]
    assert losses == pytest.approx(whole[0]["losses"], rel=1e-5)


@pytest.mark.parametrize(
    "stage, before, after, words",
    [
        (None, {}, {"optim": "sgd"}, "optim is 'sgd' and was 'adamw_torch_fused'"),
        (None, {}, {"lora": True}, "trained weights is [0-9]+ and was [0-9]+"),
        (None, {}, {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1,
                    "metric_for_best_model": "loss", "per_device_eval_batch_size": 2},
         "lr_scheduler_type is 'reduce_lr_on_plateau' and was 'constant'"),
        (2, {"bf16": True}, {"bf16": False}, "bf16 is False and was True"),
    ],
)  # fmt: skip
def test_what_an_optimizers_state_cannot_follow_is_refused(one_rank, tmp_path, stage, before, after, words):
    with pytest.raises(AssertionError if stage else ValueError, match=words):
        on(one_rank, stage, starts, str(tmp_path), [{"max_steps": 1, **before}, {"max_steps": 2, **AGAIN, **after}])


def test_what_has_no_effect_is_said(tmp_path):
    """The settings of an optimizer, where one was handed over; what is over after the first step."""
    saved = {"config": {"learning_rate": 0.1, "logging_first_step": False}, "versions": {}, "zero_stage": None,
             "what makes a step": {}}  # fmt: skip
    now = {**saved, "config": {"learning_rate": 0.2, "logging_first_step": True}}
    for own, about_the_rate in (
        (True, "Resuming with learning_rate = 0.2; the checkpoint was made with 0.1."),
        (False, "learning_rate = 0.2 has no effect: the optimizer was handed to the trainer. The checkpoint was made "
                "with 0.1."),
    ):  # fmt: skip
        said = []
        resume_settings.compare(saved, now, own, said.append)
        assert said[0] == about_the_rate and said[1].startswith("logging_first_step = True has no effect: ")


def test_every_setting_states_what_a_resume_does():
    inherited = {f.name for f in dataclasses.fields(SDFTConfig)} - {f.name for f in own_fields(SDFTConfig)}
    assert resume_settings.ON_RESUME.keys() == inherited
    assert all(f.metadata["resume"] is not None for f in own_fields(SDFTConfig))
    on_resume = {f.name: resume_settings.on_resume(f.name) for f in dataclasses.fields(SDFTConfig)}
    applied = {name for name, done in on_resume.items() if done.kind == APPLIED and done is not FREE}
    tested = {*AFTER, "num_train_epochs", "metric_for_best_model", "greater_is_better"}
    assert applied == tested


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["ema", pytest.param("base", marks=pytest.mark.full)])
def test_the_best_model_comes_with_its_teacher(two_ranks, tmp_path, stage, kind):
    settings = {"teacher_model_kind": kind, "metric_for_best_model": "loss", "greater_is_better": True}
    for rank in on(two_ranks, stage, best_then_evaluated, str(tmp_path), **settings):
        assert rank["best"] < 3 and len(set(rank["losses"])) == 3  # another step than the last
        assert rank["now"] == pytest.approx(max(rank["losses"]), rel=1e-6)


def test_a_best_model_without_its_teacher_is_refused(tmp_path):
    settings = {**BEFORE, "save_steps": 1, "load_best_model_at_end": True, "save_only_model": True}
    with pytest.raises(ValueError, match="ema teacher, too, which save_only_model leaves out"):
        start(None, str(tmp_path), **settings, **FOLLOWING)


def test_the_best_is_sought_anew_by_another_metric(tmp_path):
    settings = {**BEFORE, "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    first, more = starts(None, str(tmp_path), [{}, {"max_steps": 4, "greater_is_better": True, **AGAIN}], **settings)
    # The loss falls at step 4, too: the lowest one so far would stay the best.
    assert first["best"] == (3, "checkpoint-3") and more["best"] == (4, "checkpoint-4")


def test_a_finished_run_whose_best_model_came_earlier_is_known(tmp_path):
    """With one checkpoint kept beside the best one, which transformers would leave alone at the end."""
    settings = {**BEFORE, "save_steps": 1, "load_best_model_at_end": True, "greater_is_better": True,
                "metric_for_best_model": "loss", "save_total_limit": 1}  # fmt: skip
    first, again = starts(None, str(tmp_path), [{}, AGAIN], **settings)
    assert first["best"][0] < 3 and first["checkpoints"] == again["checkpoints"] == [first["best"][1], "checkpoint-3"]
    assert again["step"] == 3 and not again["losses"] and again["weights"] == first["weights"]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.full), pytest.param(1, marks=pytest.mark.full), 2]
)
def test_a_tied_head_is_written_once(one_rank, tmp_path, stage):
    tied, untied = (one_rank.run(saved, stage, str(tmp_path / str(tied)), tied=tied)[0] for tied in (True, False))
    assert "lm_head.weight" in untied["names"] and "lm_head.weight" not in tied["names"]
    assert tied["size"] < untied["size"] and tied["off"] == untied["off"] == 0.0


def test_the_model_at_the_end_is_whole_whatever_is_gathered_for_checkpoints(two_ranks, tmp_path):
    settings = {"ungathered": True, "save_strategy": "steps"}
    for rank in two_ranks.run(saved, 3, str(tmp_path), **settings):
        assert rank["off"] == 0.0
    assert not (tmp_path / "checkpoint-1" / "model.safetensors").exists()


def test_a_manifest_lists_what_only_its_writer_sees(two_ranks, tmp_path):
    """As on a network file system whose listings lag behind."""
    results = two_ranks.run(checkpoint_with_stale_listings, str(tmp_path))
    assert results[0]["listed"] != results[1]["listed"]
    for rank in results:
        assert rank["manifest"] == [f"rank-{r}-{i}" for r in (0, 1) for i in range(3)] and rank["problem"] is None
