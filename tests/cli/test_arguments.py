import warnings

import pytest

from sdft_ds.cli.arguments import parse
from sdft_ds.trainer import TRAINERS

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
        (["--model", "m"], "unknown setting --model; did you mean --model_name_or_path?"),
        (["--lr=1"], "unknown setting --lr; did you mean --learning_rate?"),
        (["--batch-size", "4"], "unknown setting --batch-size; did you mean --per_device_train_batch_size?"),
        (["--vllm_mod", "4"], "unknown setting --vllm_mod"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["stray"], "unexpected value 'stray'"),
        (["--loss_type", "mean"], "invalid choice: 'mean'"),
        (["--lora_target_modules"], "expected at least one argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(capsys, argv, words):
    with pytest.raises(SystemExit) as error:
        parse(argv, RECIPE)
    said = capsys.readouterr().err
    assert error.value.code == 2 and words in said and said.startswith("sdft_ds: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", "did you mean --learning_rate"),
        ("max_steps: many", "invalid int value"),
        ("max_steps: null", "max_steps cannot be null"),
        ("max_steps: true", "invalid int value: 'True'"),
        ("max_steps: [1, 2]", "max_steps: one value is needed, found a list"),
        ("max_steps: []", "max_steps: one value is needed, found a list"),
        ("run_name: yes", "run_name: a text is needed, found True; quote it"),
        ("output_dir: {a: 1}", "output_dir: a dict is not a valid value"),
        ("eval_tasks: [[a]]", "eval_tasks: a list is not a valid value"),
        ("use_peft: perhaps", "Truthy value expected"),
        ("config: other.yaml", "unknown setting --config"),
        ("help: me", "unknown setting --help"),
        ("1: 2", "unknown setting --1"),
    ],
)
def test_a_mistake_in_the_yaml_file_is_one_line(capsys, tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse(["--config", str(file)], RECIPE)
    said = capsys.readouterr().err
    assert words in said and said.startswith("sdft_ds: ") and said.count("\n") == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("- a\n- b", "a mapping of settings is needed, found list"),
        ("", "found NoneType"),
        ("max_steps: [1", "run.yaml cannot be read: while parsing"),
        ("max_steps: 1\nmax_steps: 2", "max_steps is set twice"),
        ("max_steps: " + "[" * 3000, "run.yaml cannot be read"),
        ("a: &a [x, x]\nb: &b [*a, *a]\n? *b\n: 1", "cannot be read: .*unhashable"),
    ],
)
def test_a_file_that_is_no_yaml_of_settings(tmp_path, text, words):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        parse(["--config", str(file)], RECIPE)
    assert "\n" not in str(error.value)


def test_what_yaml_says_in_its_own_way(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "save_strategy: no\nresume_from_checkpoint: true\nuse_peft: true\nlora_target_modules: null\n"
        'teacher_prompt_template: "--{prompt} {privileged_context}"\nreport_to: []\nmodel_revision: 2024-01-01\n'
    )
    script, args, model = parse(["--config", str(file)], RECIPE)
    assert args.save_strategy == "no" and args.resume_from_checkpoint == "True" and args.report_to == []
    assert args.teacher_prompt_template == "--{prompt} {privileged_context}" and model.model_revision == "2024-01-01"
    assert model.lora_target_modules is None  # over the recipe's
    assert parse(["--config", str(file), "--lora_target_modules", "q"], RECIPE)[2].lora_target_modules == ["q"]


def test_yaml_cannot_make_objects(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: !!python/object/apply:os.getcwd []")
    with pytest.raises(Exception, match="could not determine a constructor"):
        parse(["--config", str(file)], RECIPE)


def test_numbers_can_be_none_where_they_may(capsys):
    assert parse(["--distillation_topk", "none", "--distillation_alpha", "1"], {})[1].distillation_topk is None
    with pytest.raises(SystemExit):
        parse(["--max_steps", "none"], {})
    assert "invalid int value: 'none'" in capsys.readouterr().err


OWN = ["--model_name_or_path", "m", "--dataset_path", "d"]


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([*OWN, "--lora_r=8"], "--lora_r=8 has no effect without --use_peft."),
        (
            [*OWN, "--lora_dropout=0.2"],
            "--lora_dropout=0.2 has no effect without --use_peft and --disable_dropout=False.",
        ),
        ([*OWN, "--bnb_4bit_quant_type=fp4"], "--bnb_4bit_quant_type='fp4' has no effect without --load_in_4bit."),
        ([*OWN, "--eval_num_prompts=3"], "--eval_num_prompts=3 has no effect without --eval_strategy."),
        (
            [*OWN, "--recipe=facts", "--generate_from_teacher"],
            "teacher_rollout_fraction=1.0 has no effect: generate_from_teacher=True rolls out every row from the "
            "teacher's prompt.",
        ),
        (
            [*OWN, "--recipe=trl", "--full_logit_distillation"],
            "full_logit_distillation=True has no effect without distillation_topk=None.",
        ),
        (["--dtype=float16"], "--dtype='float16' has no effect without --model_name_or_path."),
        (["--prompt_column=q"], "--prompt_column='q' has no effect without --dataset_path or --dataset_name."),
        ([*OWN, "--max_bad_rows=3"], "max_bad_rows=3 has no effect without bad_rows=skip."),
        ([*OWN, "--eval_steps=3"], "eval_steps=3.0 has no effect: eval_strategy is no; set it to steps."),
    ],
)
def test_a_flag_without_what_it_needs_is_warned_about(argv, sentence):
    with pytest.warns(UserWarning) as told:
        parse(argv, {})
    assert [str(each.message) for each in told] == [sentence]


def test_a_flag_with_what_it_needs_or_set_by_a_recipe_is_not_warned_about():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse([*OWN, "--use_peft", "--lora_r=8", "--lora_dropout=0.2", "--disable_dropout", "false"], {})
        parse([*OWN, "--bad_rows=skip", "--max_bad_rows=3", "--eval_strategy=steps", "--eval_num_prompts=3"], {})
        parse([*OWN, "--generate_from_teacher"], {})
        parse(["--recipe", "paper"], RECIPE)  # which sets demonstration_template, and the demo reads none


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--lora_r=0", "lora_r must be at least 1, not 0."),
        ("--lora_dropout=1", r"lora_dropout must be in \[0, 1\), not 1.0."),
        ("--eval_fraction=1.5", r"eval_fraction must be in \(0, 1\) or None, not 1.5."),
        ("--eval_task_rows=0", "eval_task_rows must be at least 1 or None, not 0."),
        ("--eval_tasks_steps=0", "eval_tasks_steps must be at least 1 or None, not 0."),
        ("--eval_num_prompts=-1", "eval_num_prompts must be at least 0 or None, not -1."),
    ],
)
def test_the_range_of_a_flag_is_enforced_as_that_of_a_field(flag, words):
    with pytest.raises(ValueError, match=words):
        parse([*OWN, flag], {})


def test_the_methods_are_those_that_have_a_trainer(capsys):
    assert list(TRAINERS) == ["sdft", "sdpo", "sft"]
    for method, trainer in TRAINERS.items():
        _, args, _ = parse(["--method", method, *OWN], {})
        assert type(args) is trainer.config_class and args.method == method
    with pytest.raises(SystemExit):
        parse(["--method", "dpo"], {})
    assert "invalid choice: 'dpo' (choose from 'sdft', 'sdpo', 'sft')" in capsys.readouterr().err


def test_a_switch_needs_no_value():
    assert parse([*OWN, "--bf16"], {})[1].bf16 is True and parse([*OWN, "--bf16", "false"], {})[1].bf16 is False


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as error:
        parse(["--learning_rat", "1"], RECIPE)
    assert error.value.code == 2 and capsys.readouterr().err == ""


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"], RECIPE)
    text = capsys.readouterr().out
    assert "data:" in text and "model and adapter:" in text and "Train a LoRA adapter" in text


def test_code_of_others_is_not_trusted_unless_asked():
    _, args, model = parse([], RECIPE)
    assert not args.trust_remote_code
    _, args, model = parse(["--trust_remote_code"], RECIPE)
    assert args.trust_remote_code


def test_methods_with_other_defaults_have_them_on_the_command_line():
    _, args, _ = parse(["--method", "sdpo", "--reward", "choice", *OWN], {})
    assert (args.distillation_alpha, args.distillation_topk, args.teacher_model_kind) == (1.0, None, "ema")
    _, args, _ = parse(["--method", "sdpo", *OWN, "--distillation_topk", "20", "--scale_rewards", "batch"], {})
    assert (args.distillation_mode, args.distillation_topk, args.scale_rewards) == ("topk_logits", 20, "batch")
    _, args, _ = parse([*OWN, "--recipe", "trl"], {})
    assert (args.distillation_alpha, args.distillation_topk) == (0.5, 100)


def test_rewards_are_of_methods_that_have_some():
    with pytest.raises(ValueError, match="--reward is of --method sdpo; --method sdft has no rewards"):
        parse([*OWN, "--reward", "choice"], {})
    with pytest.warns(UserWarning, match="has no rewards, and does not read max_reprompt_len"):
        parse([*OWN, "--max_reprompt_len", "5"], {})


def test_a_recipe_that_nobody_named_gives_way_to_contexts_made_after_the_rollout():
    assert parse(OWN, {})[1].teacher_rollout_fraction == 1.0
    assert parse([*OWN, "--privileged_context_fn", "mine:comment"], {})[1].teacher_rollout_fraction == 0.0
