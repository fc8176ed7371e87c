"""Settings are declared once: what else says something about them follows."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
from transformers import HfArgumentParser

from sdft_ds import SDFTConfig, SFTConfig
from sdft_ds.cli import settings_page
from sdft_ds.config import fields

ROOT = Path(__file__).parents[2]


def test_the_page_of_settings_is_made_from_them():
    made = settings_page.page()
    assert (ROOT / "docs" / "settings.md").read_text() == made, (
        "python -m sdft_ds.cli.settings_page > docs/settings.md"
    )
    for f in fields.own_fields(SDFTConfig):
        assert (f"`{f.name}`" in made) == ("unused" not in f.metadata)


@dataclasses.dataclass
class Example:
    some: int | None = fields.setting(None, "some", valid=fields.at_least(2), resume=fields.FREE)
    name: Literal["a", "b"] = fields.setting("a", "a name", resume=fields.FREE)
    other: str = fields.setting(
        "x", "another", choices=["x", "y"], resume=fields.FREE, read_by=("sdft",), otherwise="y"
    )
    hidden: str = fields.setting("", "hidden", secret=True, resume=fields.FREE)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"some": 1}, "some must be at least 2 or None, not 1"),
        ({"name": "c"}, "name must be one of a, b, not 'c'"),
        ({"other": "z"}, "other must be one of x, y, not 'z'"),
        ({"name": None}, "name must be one of a, b, not None"),
    ],
)
def test_what_is_refused_follows_from_the_declaration(values, words):
    fields.check_ranges(Example(some=2))
    fields.check_ranges(Example())
    with pytest.raises(ValueError, match=words):
        fields.check_ranges(Example(**values))


def test_flags_follow_from_the_declaration():
    (parsed,) = HfArgumentParser((Example,)).parse_args_into_dataclasses(["--some", "3", "--other", "y"])
    assert (parsed.some, parsed.other) == (3, "y")
    with pytest.raises(SystemExit):
        HfArgumentParser((Example,)).parse_args_into_dataclasses(["--other", "z"])


def test_what_methods_read_and_what_is_secret():
    assert fields.unread_by(Example, "sft") == {"other": "y"} and not fields.unread_by(Example, "sdft")
    assert fields.with_flag(Example, "secret") == {"hidden"}
    assert fields.unread_by(SFTConfig, "sft")["teacher_model_kind"] == "live"


def test_no_default_is_out_of_range(tmp_path):
    for kind in (SDFTConfig, SFTConfig):
        fields.check_ranges(kind(output_dir=str(tmp_path)))
