"""Every field of TRL's SDFTConfig: the page about them, and that what it says is so."""

import importlib.util
import warnings
from pathlib import Path

import pytest

from sdft_ds import SDFTConfig, recipe
from sdft_ds.cli import trl_page
from sdft_ds.config.fields import default_of

ROOT = Path(__file__).parents[2]
RECIPES = {"1.5.1": "trl", "1.16.0": "trl-1.16"}
# What TRL, too, computes from other settings when it makes a configuration.
COMPUTED = {"bf16", "generation_batch_size", "steps_per_generation"}


def test_the_page_is_made_from_the_fields():
    made = trl_page.page()
    assert (ROOT / "docs" / "trl_fields.md").read_text() == made, "python -m sdft_ds.cli.trl_page > docs/trl_fields.md"
    for version in trl_page.known().values():
        for name in version:
            assert made.count(f"\n| `{name}` |") == 1, name
    said = [*trl_page.NEWER_NAMES, *trl_page.OTHER_DEFAULTS, *trl_page.REMARKS]
    assert set(said) <= {name for version in trl_page.known().values() for name in version}


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")
def test_the_fields_are_those_of_the_installed_trl():
    version, found = trl_page.installed()
    assert trl_page.known()[version] == found, "python -m sdft_ds.cli.trl_page --read > docs/trl_fields.md"


@pytest.mark.parametrize("version", RECIPES)
def test_the_recipe_of_a_version_has_its_defaults(version):
    made = SDFTConfig(**recipe(RECIPES[version]))
    theirs = trl_page.known()[version]
    found = {name: getattr(made, name) for name in theirs if name not in COMPUTED}
    assert made.activation_checkpointing
    assert found == {name: default for name, default in theirs.items() if name in found}


@pytest.mark.parametrize("version", RECIPES)
def test_a_configuration_that_spells_out_every_default_is_taken_without_a_warning(version):
    theirs = trl_page.known()[version]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`gradient_checkpointing`", FutureWarning)
        made = SDFTConfig(**theirs)
    assert made.activation_checkpointing
    found = {name: getattr(made, name) for name in theirs if name not in COMPUTED}
    assert found == {name: default for name, default in theirs.items() if name in found}


def test_each_status_is_so():
    """For fields that are accepted and refused tests/config/test_sdft_config.py and test_inherited.py have values."""
    for version, theirs in trl_page.known().items():
        made = SDFTConfig()
        for name, default in theirs.items():
            f, status = SDFTConfig.__dataclass_fields__[name], trl_page.status(name)
            assert ("unused" in f.metadata) == (status == trl_page.REFUSED)
            if status == trl_page.SAME and default_of(f) != default:  # unset here, and computed
                assert name in trl_page.REMARKS and default_of(f) is None, name
                ema = SDFTConfig(teacher_model_kind="ema")
                assert default in (getattr(made, name), getattr(ema, name)), (version, name)
            if status == trl_page.RENAMED:
                assert getattr(made, name) == default, (version, name)
    assert SDFTConfig(sync_ref_model=True).ref_model_mixup_alpha == 0.6
    assert SDFTConfig(sync_ref_model=True).teacher_model_kind == "ema"
    assert SDFTConfig(distillation_topk=None, full_logit_distillation=True).distillation_mode == "full_logits"
