"""Command line parser: flags in addition to SDFTConfig's, and precedence of recipe, YAML file and command line."""

import argparse
import difflib
import json
import os
import warnings
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sdft_ds.cli import help_page, yaml_config
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.config import recipes
from sdft_ds.config.fields import default_of, unread_by, without_effect
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.trainer import TRAINERS

# Other name of a setting -> its own, on the command line and in a YAML file.
ALIASES = {
    "model": "model_name_or_path",
    "dataset": "dataset_path",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
}
# Name of a flag elsewhere -> its name here, to be suggested.
COMMON_NAMES = {
    "model_name": "model_name_or_path",
    "data": "dataset_path",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "max_length": "max_completion_length",
    "max_new_tokens": "max_completion_length",
    "lora": "use_peft",
    "resume": "resume_from_checkpoint",
    "output": "output_dir",
}
# Of TRL's interface, refused unless at their default: not to be suggested.
UNUSED = {f.name for f in fields(SDFTConfig) if "unused" in f.metadata}

Parsed = tuple[ScriptArguments, SDFTConfig, ModelArguments]
KINDS = (ScriptArguments, SDFTConfig, ModelArguments)


@dataclass(frozen=True)
class Resolved:
    """Values of all settings by name. given: those of the command line and the YAML file, defaults elsewhere. typed,
    in_file: names of the settings that were given there. recipe_unnamed: it applies because none was named."""

    values: dict[str, Any]
    given: dict[str, Any]
    typed: tuple[str, ...]
    in_file: tuple[str, ...]
    recipe_unnamed: bool

    def made(self, kind: type) -> Any:
        """An object of one of the kinds of settings, with these values."""
        return kind(**{f.name: self.values[f.name] for f in fields(kind) if f.init})

    @property
    def names(self) -> frozenset[str]:
        return frozenset({*self.typed, *self.in_file})


def parse(argv: Sequence[str], demo: dict[str, Any]) -> Parsed:
    """Parse settings; see `resolve`. Raises ValueError for an invalid YAML file, and for invalid values."""
    found = resolve(argv, demo)
    config = TRAINERS[found.values["method"]].config_class
    script, args, model = map(found.made, (ScriptArguments, config, ModelArguments))
    for kind in (ScriptArguments, ModelArguments):  # SDFTConfig has warned of its own
        for sentence in without_effect(kind, found.given, found.values, "--"):
            warnings.warn(sentence, stacklevel=2)
    facts = args.method == "sdft" and script.recipe == recipes.OF_OWN_DATA
    script.rate_of_recipe = facts and "learning_rate" not in found.names
    script.recipe_unnamed = found.recipe_unnamed
    script.given = _given(found, (ScriptArguments, config, ModelArguments))
    return script, args, model


def resolve(argv: Sequence[str], demo: dict[str, Any]) -> Resolved:
    """The values of all settings, highest precedence first: command line, YAML file (--config), recipe (--recipe), and
    `demo` if neither a model nor a data set is given.

    Prints one line and exits with status 2 for an unknown flag or key, or a value of the wrong type; raises ValueError
    for an invalid YAML file.
    """
    parser = _parser()
    file = parser.parse_known_args(argv)[0].config
    from_file = _read_file(file, parser) if file else {}
    tokens = [token for name, value in from_file.items() for token in _tokens(name, value, parser)] + list(argv)
    given, unknown = parser.parse_known_args(tokens)
    if unknown:
        parser.error(_unknown(unknown, parser))
    is_own = given.model_name_or_path or given.dataset_name or given.dataset_path
    below = {} if is_own else dict(demo)
    recipe = given.recipe or (recipes.OF_OWN_DATA if is_own and given.method == "sdft" else None)
    if recipe is not None:
        below |= recipes.recipe(recipe) | recipes.OF_THE_COMMAND_LINE[recipe] | {"recipe": recipe}
    if recipe != given.recipe:
        _give_way(below, given)
    config = TRAINERS[given.method].config_class
    if given.reward and given.method != "sdpo":
        raise ValueError(f"--reward is of --method sdpo; --method {given.method} has no rewards.")
    flags = SDFTConfig.__dataclass_fields__  # the parser's; a method may have other defaults
    below = {f.name: f.default for f in fields(config) if f.default != flags[f.name].default} | below
    # Settings that the method does not read are warned about if given, not if they come from recipe or demo.
    below = {name: value for name, value in below.items() if name not in unread_by(config, given.method)}
    # null and empty lists count as given too, but cannot be expressed as tokens.
    below |= {name: value for name, value in from_file.items() if value is None or value == []}
    parser.set_defaults(**below)
    typed = (_setting_of(token, parser) for token in argv)
    return Resolved(
        values=vars(parser.parse_args(tokens)),
        given=vars(given),
        typed=tuple(dict.fromkeys(name for name in typed if name is not None)),
        in_file=tuple(_setting_of(f"--{name}", parser) for name in from_file),
        recipe_unnamed=recipe != given.recipe,
    )


def without(argv: Sequence[str], names: Container[str]) -> list[str]:
    """The command line without these settings, by whichever name, and without their values."""
    parser, kept, dropping = _parser(), [], False
    for token in argv:
        if token.startswith("--"):
            dropping = _setting_of(token, parser) in names
        if not dropping:
            kept.append(token)
    return kept


def _setting_of(token: str, parser: argparse.ArgumentParser) -> str | None:
    """The setting that a word of the command line names, if any."""
    action = parser._option_string_actions.get(token.split("=")[0])
    return None if action is None else action.dest


def _given(found: Resolved, kinds: Iterable[type]) -> tuple[str, ...]:
    defaults = {f.name: default_of(f) for kind in kinds for f in fields(kind)}
    in_file = (name for name in found.in_file if name not in found.typed and found.values[name] != defaults[name])
    return (*found.typed, *in_file)


def _give_way(recipe: dict[str, Any], given: argparse.Namespace) -> None:
    """Take out of a recipe that nobody named what contradicts the settings that were given."""
    support = ("distillation_topk", "distillation_add_tail", "distillation_support", "full_logit_distillation")
    if any(getattr(given, name) != SDFTConfig.__dataclass_fields__[name].default for name in support):
        del recipe["distillation_mode"]
    if given.generate_from_teacher or given.privileged_context_fn:
        del recipe["teacher_rollout_fraction"]
    if given.sync_ref_model:
        del recipe["teacher_model_kind"]
    if given.sync_ref_model or given.teacher_model_kind not in (None, "base"):  # not the start, to which anchors hold
        del recipe["anchor_path"]


class _Parser(HfArgumentParser):
    """Prints errors as one line on rank 0, instead of after the usage text on all ranks."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"sdft_ds: {message}\n" if os.environ.get("RANK", "0") == "0" else None)


def is_demo(script: ScriptArguments, model: ModelArguments) -> bool:
    """Whether neither a model nor a data set is given. Raises ValueError if only one of the two is."""
    data_set = script.dataset_name is not None or script.dataset_path is not None
    if data_set and model.model_name_or_path is None:
        raise ValueError("A data set is named, but no model: set --model_name_or_path.")
    if model.model_name_or_path is not None and not data_set:
        raise ValueError("A model is named, but no data set: set --dataset_path or --dataset_name.")
    return not data_set


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(KINDS, prog="train.py", allow_abbrev=False, add_help=False)
    parser.add_argument("-h", "--help", action=_Help, nargs="?", const="", default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE.yaml", help="Settings from a YAML file; the command line wins.")
    optional = _fields_that_may_be(NoneType)
    for action in parser._actions:
        # An optional number accepts none: --distillation_topk none.
        if action.type in (int, float) and action.dest in optional:
            action.type = _optional(action.type)
        elif action.type is string_to_bool and action.nargs is None:  # a switch that is on or off by itself if unset
            action.nargs, action.const = "?", True
        elif action.dest == "resume_from_checkpoint":  # a folder, or a switch
            action.nargs, action.const = "?", "true"
    for alias, name in ALIASES.items():
        action = parser._option_string_actions[f"--{name}"]
        for option in dict.fromkeys((f"--{alias}", f"--{alias.replace('_', '-')}")):
            parser._option_string_actions[option] = action
    return parser


class _Help(argparse.Action):
    """Prints the settings, on rank 0, and ends the program: the most used ones, or with `all` every one."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> NoReturn:
        if values not in ("", "all"):
            parser.error(f"--help takes nothing, or all; not {values!r}")
        if os.environ.get("RANK", "0") == "0":
            print(help_page.every_setting(parser, ALIASES) if values else help_page.MOST_USED, end="")
        parser.exit(0)


def _fields_that_may_be(kind: type) -> set[str]:
    """The settings whose type is or includes `kind`."""
    hints = {name: hint for part in KINDS for name, hint in get_type_hints(part).items()}
    return {
        name for name, hint in hints.items() if kind in {get_origin(each) or each for each in (hint, *get_args(hint))}
    }


def _optional(convert: type) -> Any:
    def parse_value(text: str) -> Any:
        return None if text.lower() in ("none", "null") else convert(text)

    parse_value.__name__ = convert.__name__
    return parse_value


def _read_file(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in yaml_config.read(path).items():
        name = ALIASES.get(key, key)
        if name in content:
            raise ValueError(f"--config {path}: {key} and another name of the same setting are both set.")
        content[name] = value
    known = {f.name for kind in KINDS for f in fields(kind) if f.init}
    optional = _fields_that_may_be(NoneType)
    for key, value in content.items():
        if key not in known:
            parser.error(f"--config {path}: " + _unknown([f"--{key}"], parser))
        if value is None and key not in optional:
            parser.error(f"--config {path}: {key} cannot be null")
    return content


def _tokens(name: str, value: Any, parser: argparse.ArgumentParser) -> list[str]:
    """A setting as command line tokens. Exits the program for a value of the wrong type."""
    action = parser._option_string_actions[f"--{name}"]
    if value is None or (value == [] and name in _fields_that_may_be(list)):
        return []
    if value is False and action.choices and "no" in action.choices:  # YAML parses `no` as False
        value = "no"
    scalars = value if isinstance(value, list) else [value]
    a_dict = isinstance(value, dict) and name in SDFTConfig._VALID_DICT_FIELDS
    if isinstance(value, list) and action.nargs not in ("+", "*"):
        parser.error(f"{name}: one value is needed, found a list")
    if not a_dict and not all(isinstance(each, str | int | float | date) for each in scalars):
        parser.error(f"{name}: a {type(scalars[0]).__name__} is not a valid value")
    if isinstance(value, bool) and action.type is str and name != "resume_from_checkpoint":
        parser.error(f"{name}: a text is needed, found {value}; quote it if it is one")
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}={json.dumps(value) if a_dict else value}"]


def _unknown(tokens: list[str], parser: argparse.ArgumentParser) -> str:
    flag = next((token.split("=")[0] for token in tokens if token.startswith("-")), None)
    if flag is None:
        return f"unexpected value {tokens[0]!r}"
    name = flag.removeprefix("--").replace("-", "_")
    used = [option for option in parser._option_string_actions if option.removeprefix("--") not in UNUSED]
    close = [f"--{COMMON_NAMES[name]}"] if name in COMMON_NAMES else difflib.get_close_matches(flag, used, n=1)
    return f"unknown setting {flag}" + (f"; did you mean {close[0]}?" if close else "")
