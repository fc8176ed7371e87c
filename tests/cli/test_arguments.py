import re
import warnings
from dataclasses import fields
from typing import get_type_hints

import pytest

from sdft_ds.cli import help_page
from sdft_ds.cli.arguments import ALIASES, KINDS, parse, resolve, without
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
        (["--model_name", "m"], "unknown setting --model_name; did you mean --model_name_or_path?"),
        (["--epochs=1"], "unknown setting --epochs; did you mean --num_train_epochs?"),
        (["--max-new-tokens", "4"], "unknown setting --max-new-tokens; did you mean --max_completion_length?"),
        (["--help", "model"], "--help takes nothing, or all; not 'model'"),
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


def switches() -> list[str]:
    """Every setting that is true or false, whatever else it may be."""
    hints = {name: hint for kind in KINDS for name, hint in get_type_hints(kind).items()}
    names = [f.name for kind in KINDS for f in fields(kind) if f.init]
    return [name for name in names if hints[name] in (bool, bool | None)] + ["resume_from_checkpoint"]


def test_a_switch_takes_a_value_or_none():
    names = switches()
    assert {"bf16", "use_peft", "disable_dropout", "tf32", "padding_free"} <= set(names)
    found = {
        words: resolve([word for name in names for word in (f"--{name}", *words)], {}).values
        for words in ((), ("true",), ("false",))
    }
    for name in names:
        on, said, off = (values[name] for values in found.values())
        assert on == said and off != on, name
        assert name == "resume_from_checkpoint" or (on, off) == (True, False)


def test_an_alias_is_the_setting_itself(tmp_path):
    """On the command line, with a dash, with =, and in a file."""
    own = ["--model_name_or_path", "m", "--dataset_path", "d", "e", "--learning_rate", "2e-4",
           "--per_device_train_batch_size", "3"]  # fmt: skip
    expected = resolve(own, {})
    assert expected.values["learning_rate"] == 2e-4 and expected.values["dataset_path"] == ["d", "e"]
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndataset: [d, e]\nlr: 2.0e-4\nbatch_size: 3\n")
    short = ["--model", "m", "--dataset", "d", "e"]
    for argv in ([*short, "--lr", "2e-4", "--batch_size", "3"], [*short, "--lr=2e-4", "--batch-size=3"]):
        assert resolve(argv, {}) == expected
    from_file = resolve(["--config", str(file)], {})
    assert from_file.values == expected.values | {"config": str(file)}
    assert resolve(["--config", str(file), "--lr", "1e-3"], {}).values["learning_rate"] == 1e-3
    file.write_text("lr: 2.0e-4\nlearning_rate: 1.0e-4\n")
    with pytest.raises(ValueError, match="learning_rate and another name of the same setting are both set"):
        parse(["--config", str(file)], RECIPE)


@pytest.mark.parametrize("flag", ["--lr", "--learning_rate", "--learning-rate"])
def test_a_learning_rate_that_is_given_is_not_the_recipes(flag):
    script, args, _ = parse([*OWN, flag, "1e-4"], {})
    assert args.learning_rate == 1e-4 and not script.rate_of_recipe
    assert parse(OWN, {})[0].rate_of_recipe


def test_settings_are_taken_out_of_a_line_by_any_name():
    line = ["--model", "m", "--batch-size=4", "--dataset", "d", "e", "--bf16", "--lr", "1e-4"]
    names = {"per_device_train_batch_size", "dataset_path", "bf16"}
    assert without(line, names) == ["--model", "m", "--lr", "1e-4"]


def test_only_the_first_rank_speaks(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as error:
        parse(["--learning_rat", "1"], RECIPE)
    assert error.value.code == 2 and capsys.readouterr().err == ""


def helped(capsys, *argv: str) -> list[str]:
    with pytest.raises(SystemExit) as error:
        parse(["--help", *argv], RECIPE)
    assert error.value.code == 0
    return capsys.readouterr().out.splitlines()


def test_help_is_one_screen_of_settings_that_exist(capsys):
    lines = helped(capsys)
    assert len(lines) <= 45 and max(map(len, lines)) < 80
    named = set(re.findall(r"--([a-z]\w+)", "\n".join(lines))) - {"help"}
    settings = {f.name for kind in KINDS for f in fields(kind)} | {*ALIASES, "config"}
    assert len(named) > 30 and named <= settings
    assert set(ALIASES) <= named


def test_help_all_has_every_setting_once(capsys):
    lines = helped(capsys, "all")
    named = [line.split(",")[0].split()[0] for line in lines if line.startswith("--") and line.strip("-")]
    settings = [f.name for kind in KINDS for f in fields(kind) if f.init]
    assert sorted(named) == sorted(f"--{name}" for name in [*settings, "config", "help"])
    assert max(map(len, lines)) < 80
    order = [lines.index(title) for title in ("Method and data", "Teacher", help_page.INHERITED)]
    assert order == sorted(order) and lines.index("--method sdft|sdpo|sft") < order[1]
    assert lines.index("--learning_rate, --lr X") > order[2] and "--bf16 [true|false]" in lines


def test_help_is_printed_by_one_rank(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert helped(capsys) == []


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
