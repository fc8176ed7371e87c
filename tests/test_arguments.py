import pytest

from sdft_ds.arguments import parse

RECIPE = {
    "max_steps": 250,
    "use_peft": True,
    "lora_target_modules": ["all-linear"],
    "report_to": "none",
    "bf16": False,
}


def test_the_recipe_applies_where_nothing_is_named_and_flags_win_over_it():
    script, args, model = parse([], RECIPE)
    assert args.max_steps == 250 and model.use_peft and model.peft_config().target_modules == "all-linear"
    assert parse(["--max_steps", "3", "--use_peft", "false"], RECIPE)[1].max_steps == 3


@pytest.mark.parametrize("named", [["--model_name_or_path", "m"], ["--dataset_path", "d"], ["--dataset_name", "d"]])
def test_the_recipe_does_not_apply_to_a_model_or_data_of_ones_own(named):
    script, args, model = parse(named, RECIPE)
    assert args.max_steps == -1 and not model.use_peft and args.bf16


def test_yaml_settings_and_the_command_line_over_them(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: m\ndataset_path: d\nlearning_rate: 1.0e-4\nmax_steps: 7\nlora_target_modules: [q, v]\n"
        "generation_kwargs: {typical_p: 0.9}\nuse_peft: true\ndistillation_topk: null\nfull_logit_distillation: true\n"
    )
    script, args, model = parse(["--config", str(file), "--max_steps", "9"], RECIPE)
    assert (model.model_name_or_path, args.learning_rate, args.max_steps) == ("m", 1e-4, 9)
    assert sorted(model.peft_config().target_modules) == ["q", "v"] and args.generation_kwargs == {"typical_p": 0.9}
    assert args.distillation_mode == "full_logits"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--learning_rat", "1"], "unknown setting --learning_rat; did you mean --learning_rate?"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["stray"], "unexpected value 'stray'"),
        (["--loss_type", "mean"], "invalid choice: 'mean'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as error:
        parse(argv, RECIPE)
    assert error.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", "did you mean --learning_rate"),
        ("- a\n- b", "a mapping of settings is needed, found list"),
        ("max_steps: many", "invalid int value"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_line(capsys, tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--config", str(file)], RECIPE)
    assert words in capsys.readouterr().err


def test_yaml_cannot_make_objects(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: !!python/object/apply:os.getcwd []")
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse(["--config", str(file)], RECIPE)


def test_numbers_can_be_none():
    assert parse(["--distillation_topk", "none", "--distillation_alpha", "1"], {})[1].distillation_topk is None


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], RECIPE)
    text = capsys.readouterr().out
    assert "data:" in text and "model and adapter:" in text and "Train a LoRA adapter" in text


def test_code_of_others_is_not_trusted_unless_asked():
    _, args, model = parse([], RECIPE)
    assert not model.trust_remote_code and not model.init_kwargs(args)["trust_remote_code"]
