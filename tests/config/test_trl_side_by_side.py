"""Where TRL is installed: the same script with TRL and with this project computes the same."""

import importlib.util
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed"),
]
RECIPES = {"1.5.1": "trl", "1.16.0": "trl-1.16"}
# What a script sets itself; the others are the version's defaults.
RUNS = {
    "defaults": {},
    "old rollouts": {"num_iterations": 2, "max_steps": 4},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "from the teacher": {"generate_from_teacher": True},
    "sampled token": {"distillation_alpha": 1.0, "num_loss_tokens_to_skip": 0},
    "full logits": {"distillation_alpha": 0.0},
    "ema": {},
    "plain text": {"plain_text": True},
}
# In the words of each version.
MORE = {
    "trl": {
        "sampled token": {"distillation_topk": None},
        "full logits": {"distillation_topk": None, "full_logit_distillation": True},
        # A live teacher scores a generation batch once here, and in TRL at each use.
        "old rollouts": {"sync_ref_model": True},
        "ema": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    },
    "trl-1.16": {
        "sampled token": {"distillation_mode": "sampled_token"},
        "full logits": {"distillation_mode": "full_logits"},
        "ema": {"teacher_model_kind": "ema", "teacher_update_rate": 0.5},
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{library: {run: losses and events}}."""
    folder = tmp_path_factory.mktemp("runs")
    # TRL's disable_dropout leaves the dropout of attention on.
    tiny.llama(attention_dropout=0.0).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    name = RECIPES[version("trl")]
    settings = json.dumps({run: {**given, **MORE[name].get(run, {})} for run, given in RUNS.items()})
    found = {}
    for library, recipe in (("trl.experimental.sdft", []), ("sdft_ds", [name])):
        command = [sys.executable, "-m", "tests.helpers.trl_run", library, folder / "model", folder / library]
        subprocess.run([*command, settings, *recipe], check=True, cwd=Path(__file__).parents[2])
        found[library] = torch.load(folder / library, weights_only=False)
    return found["trl.experimental.sdft"], found["sdft_ds"]


@pytest.mark.parametrize("run", RUNS)
def test_the_losses_are_equal(runs, run):
    theirs, ours = (of_library[run]["losses"] for of_library in runs)
    assert len(ours) == RUNS[run].get("max_steps", 3)
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_callbacks_are_given_the_same(runs, run):
    theirs, ours = (of_library[run]["events"] for of_library in runs)
    assert [event for event, _ in theirs] == [event for event, _ in ours]
    for (event, given), (_, here) in zip(theirs, ours, strict=True):
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                real = given["completion_ids"] != 257  # padding has values of its own
                assert here[name].dtype == value.dtype
                torch.testing.assert_close(here[name] * real, value * real)
            elif isinstance(value, torch.Tensor):
                assert here[name].dtype == value.dtype and torch.equal(here[name], value), (event, name)
            elif name != "generation_prompt_text" or value is not None:  # None in 1.16
                assert here[name] == value, (event, name)
