import json
from pathlib import Path

import pytest

from sdft_ds import SDFTConfig
from sdft_ds.cli.arguments import parse
from sdft_ds.config.recipes import RECIPES, learning_rate_for, recipe

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


def test_trl_is_the_default_in_python_and_facts_on_the_command_line():
    assert resolved(SDFTConfig(**recipe("trl"))) == resolved(SDFTConfig())
    script, args, _ = parse(MINE, {})
    assert resolved(args) == golden("facts") and args.top_p == 0.6 and args.teacher_rollout_fraction == 1.0
    assert (script.recipe, script.recipe_unnamed, script.anchor_path) == ("facts", True, ["everyday"])
    assert not parse(["--recipe", "facts", *MINE], {})[0].recipe_unnamed
    script, args, _ = parse([], {"max_steps": 7})  # the demo has a recipe of its own
    assert script.recipe is None and resolved(args) == resolved(SDFTConfig(max_steps=7))
    assert parse(["--method", "sft", *MINE], {})[0].recipe is None


def test_a_recipe_that_nobody_named_gives_way_to_what_contradicts_it():
    args = parse([*MINE, "--distillation_topk", "20", "--distillation_add_tail", "true"], {})[1]
    assert (args.distillation_mode, args.distillation_topk, args.top_p) == ("topk_logits", 20, 0.6)
    for flags, kind in ((["--sync_ref_model", "true"], "ema"), (["--teacher_model_kind", "live"], "live")):
        script, args, _ = parse([*MINE, *flags], {})
        assert args.teacher_model_kind == kind and script.anchor_path is None
    own = parse([*MINE, "--teacher_model_kind", "live", "--anchor_path", "mine.jsonl"], {})[0]
    assert own.anchor_path == ["mine.jsonl"]  # which is refused later, by name


def test_the_learning_rate_of_facts_is_for_the_models_width_unless_given():
    assert learning_rate_for(576, adapter=False) == 1e-4
    assert learning_rate_for(3584, adapter=False) == 1.6e-5
    assert learning_rate_for(576, adapter=True) == learning_rate_for(576, True, "gemma3_text") == 1e-3
    assert learning_rate_for(640, False, "gemma3_text") == 1.8e-5 and learning_rate_for(640, False, "qwen3") == 9e-5
    assert parse(MINE, {})[0].rate_of_recipe and parse(["--recipe", "facts", *MINE], {})[0].rate_of_recipe
    assert not parse([*MINE, "--learning_rate", "3e-4"], {})[0].rate_of_recipe
    assert not parse(["--recipe", "paper", *MINE], {})[0].rate_of_recipe


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
    with pytest.raises(ValueError, match="no recipe 'papr'; there are facts, paper, trl"):
        call()
