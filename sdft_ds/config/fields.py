"""Declares settings: each once, as a dataclass field with metadata.

A field created by `setting` specifies default, help, valid values, how a resume handles a changed value, which methods
read it, and whether the model card shows it. The command line, validation, config.yaml, resume and docs/settings.md
are derived from that.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

# ---- valid values of a setting --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """words: the requirement, as in "must be {words}"."""

    holds: Callable[[Any], bool]
    words: str


def at_least(least: float) -> Range:
    return Range(lambda value: value >= least, f"at least {least}")


def within(least: float, most: float) -> Range:
    return Range(lambda value: least <= value <= most, f"in [{least:g}, {most:g}]")


def positive(remedy: str = "") -> Range:
    return Range(lambda value: value > 0, f"positive{remedy}")


def finite() -> Range:
    """Of each value of a list."""
    return Range(lambda values: all(map(math.isfinite, values)), "finite numbers")


# ---- how a resume handles a setting whose value differs from the checkpoint's ---------------------------------------


@dataclass(frozen=True)
class OnResume:
    """kind: one of those below; reason: why, or how it is handled."""

    kind: str
    reason: str = ""


APPLIED, NO_EFFECT, NOT_COMPARED = "applied", "without effect", "not compared"
REFUSED, REFUSED_BY_DEEPSPEED = "refused", "refused with DeepSpeed"
# Read during the run: the new value applies from the next step or generation batch on.
FREE = OnResume(APPLIED, "counts from the next step on")
ANOTHER_RUN = OnResume(REFUSED, "with another value it would be another run")
# Specifies where and how a run is launched, not what it computes.
UNCOMPARED = OnResume(NOT_COMPARED)
COMPARED_AS_ROWS = OnResume(NOT_COMPARED, "compared as rows of an optimizer step and of a generation batch")
OF_THE_TRAINER = OnResume(APPLIED, "set in the Trainer's state")
OF_ONE_PRECISION = OnResume(REFUSED_BY_DEEPSPEED, "its files are those of one precision")

# ---- which methods read a setting -----------------------------------------------------------------------------------

WITH_TEACHER = ("sdft", "sdpo")
WITH_REWARDS = ("sdpo",)

# ---- fields ---------------------------------------------------------------------------------------------------------


class _Metadata(dict):
    """Metadata by name; `keys` lists only argparse's options, because HfArgumentParser passes on all listed keys."""

    def keys(self) -> list[str]:
        return [name for name in ("help", "choices") if name in self]


def setting(
    default: Any,
    help: str,
    *,
    valid: Range | None = None,
    choices: Sequence[str] | None = None,
    only_with: tuple[str, ...] = (),
    resume: OnResume | None = None,
    read_by: tuple[str, ...] | None = None,
    otherwise: Any = MISSING,
    card: bool | str = False,
    secret: bool = False,
    derived: bool = False,
) -> Any:
    """A dataclass field that HfArgumentParser turns into a flag.

    valid: range of a value that is not None. choices: valid names; omitted for a Literal. only_with: the settings
    without which it has no effect, each NAME or NAME=VALUE, or alternatives joined by " or ". resume: see OnResume.
    read_by: methods that read it, None for all; otherwise: its value under the other methods, by default its default.
    card: shown on the model card; a string: only for that kind of teacher. secret: never printed or saved. derived:
    computed from other settings, so not saved.
    """
    about = {"valid": valid, "resume": resume, "read_by": read_by, "card": card, "secret": secret, "derived": derived}
    about["only_with"] = only_with
    about["otherwise"] = default if otherwise is MISSING else otherwise
    shown = {} if choices is None else {"choices": choices}
    return field(default=default, metadata=_Metadata(help=help, **shown, **about))


def redeclared(config_class: type, name: str, default: Any) -> Any:
    """The setting of a base class with another default."""
    return field(default=default, metadata=config_class.__dataclass_fields__[name].metadata)


def unused(default: Any, reason: str) -> Any:
    """A field of the TRL interface that self-distillation never reads: any value but its default is refused, because
    a setting without effect misleads."""
    help = "Accepted at its default only; see docs/trl.md."
    return field(default=default, metadata=_Metadata(help=help, unused=reason, resume=FREE, read_by=None))


def default(config: Any, name: str) -> Any:
    """The declared default of a setting."""
    return default_of(type(config).__dataclass_fields__[name])


def default_of(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def choices_of(config_class: type, f: Field) -> tuple[str, ...] | None:
    """The valid names of a setting, or None if it is not restricted to names."""
    if "choices" in f.metadata:
        return tuple(f.metadata["choices"])
    hint = _hints(config_class)[f.name]
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return get_args(part)
    return None


def may_be_none(config_class: type, f: Field) -> bool:
    return NoneType in get_args(_hints(config_class)[f.name])


@cache
def _hints(config_class: type) -> dict[str, Any]:
    """Cached: evaluating a class's hints once per field would take longer than the rest of making a configuration."""
    return get_type_hints(config_class)


def own_fields(config_class: type) -> list[Field]:
    """The fields declared by this package, without those inherited from transformers."""
    return [f for f in fields(config_class) if "read_by" in f.metadata]


def with_flag(config_class: type, flag: str) -> set[str]:
    """Names of the settings whose metadata sets `flag`: secret or derived."""
    return {f.name for f in fields(config_class) if f.metadata.get(flag)}


def unread_by(config_class: type, method: str) -> dict[str, Any]:
    """Settings that a method does not read -> their fixed values there."""
    return {f.name: f.metadata["otherwise"] for f in own_fields(config_class) if not is_read_by(method, f)}


def is_read_by(method: str, f: Field) -> bool:
    return f.metadata["read_by"] is None or method in f.metadata["read_by"]


def check_ranges(config: Any) -> None:
    """Raises ValueError for a value that its field does not allow."""
    kind = type(config)
    for f in own_fields(kind):
        value, valid, choices = getattr(config, f.name), f.metadata.get("valid"), choices_of(kind, f)
        optional = may_be_none(kind, f)
        if value is None and optional:
            continue
        if choices is not None and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, not {value!r}.")
        if valid is not None and (value is None or isinstance(value, str) or not valid.holds(value)):
            words = f"{valid.words} or None" if optional else valid.words
            raise ValueError(f"{f.name} must be {words}, not {value!r}.")


def without_effect(
    config_class: type, given: Mapping[str, Any], values: Mapping[str, Any], dashes: str = ""
) -> Iterator[str]:
    """Yields a sentence for each setting that is given (not at its default) without those it needs.

    values: of the settings in effect, those of other classes included. dashes: before a name on the command line.
    """
    for f in own_fields(config_class):
        if given[f.name] == default_of(f):
            continue
        missing = [needed for needed in f.metadata.get("only_with", ()) if not _is_met(needed, values)]
        if missing:
            named = " and ".join(" or ".join(dashes + name for name in each.split(" or ")) for each in missing)
            yield f"{dashes}{f.name}={given[f.name]!r} has no effect without {named}."


def _is_met(needed: str, values: Mapping[str, Any]) -> bool:
    """Whether one of the alternatives is set; for NAME=VALUE, to that value."""
    for each in needed.split(" or "):
        name, _, value = each.partition("=")
        if str(values[name]) == value if value else values[name] not in (None, False, 0, "", "no", []):
            return True
    return False
