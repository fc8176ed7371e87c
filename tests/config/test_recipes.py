import json
from pathlib import Path

import pytest

from sdft_ds import SDFTConfig
from sdft_ds.cli.arguments import parse
from sdft_ds.config.recipes import RECIPES, recipe

GOLDEN = Path(__file__).parent / "golden"
MINE = ["--model_name_or_path", "m", "--dataset_path", "d"]


def golden(name: str) -> dict:
    """The fields that decide what is learned; not those that depend on the machine or say how to compute."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def resolved(args: SDFTConfig) -> dict:
    return {name: getattr(args, name) for name in golden("paper")}


@pytest.mark.parametrize("name", RECIPES)
def test_the_resolved_configuration_is_the_golden_one(name):
    assert resolved(SDFTConfig(**recipe(name))) == golden(name)
    script, args, _ = parse(["--recipe", name, *MINE], {})
    assert resolved(args) == golden(name) and script.recipe == name


def test_trl_is_the_default():
    assert resolved(parse(MINE, {})[1]) == resolved(SDFTConfig(**recipe("trl"))) == resolved(SDFTConfig())
    trl, default = (parse([*how, *MINE], {})[0] for how in (["--recipe", "trl"], []))
    assert trl.demonstration_template == default.demonstration_template


def test_flags_and_the_yaml_file_win_over_a_recipe_and_it_over_the_demo(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: paper\nteacher_update_rate: 0.05\nlearning_rate: 1.0e-5\n")
    script, args, _ = parse(["--config", str(file), "--learning_rate", "3e-5"], {"num_generations": 4, "max_steps": 7})
    assert (args.learning_rate, args.teacher_update_rate) == (3e-5, 0.05)
    assert (args.num_generations, args.max_steps, args.num_loss_tokens_to_skip) == (1, 7, 3)
    assert script.recipe == "paper" and script.demonstration_template == "$output_text"
    assert parse(["--config", str(file), "--recipe", "trl"], {})[1].num_loss_tokens_to_skip == 0
    older = ["--distillation_topk", "none", "--full_logit_distillation", "--ref_model_sync_steps", "3"]
    args = parse(["--recipe", "trl", *older], {})[1]
    assert (args.distillation_mode, args.teacher_sync_steps) == ("full_logits", 3)


def test_in_python_what_is_beside_a_recipe_wins():
    assert SDFTConfig(**{**recipe("paper"), "warmup_steps": 3}).warmup_steps == 3
    recipe("paper")["warmup_steps"] = 5
    assert recipe("paper")["warmup_steps"] == 10


@pytest.mark.parametrize("call", [lambda: recipe("papr"), lambda: parse(["--recipe", "papr"], {})])
def test_an_unknown_recipe_names_the_known_ones(call):
    with pytest.raises(ValueError, match="no recipe 'papr'; there are paper, trl"):
        call()
