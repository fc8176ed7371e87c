"""YAML settings: read with --config, and saved to config.yaml when training starts.

The saved file can be passed to --config to reproduce the run; secrets are excluded.
"""

import json
from collections.abc import Sequence
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.config import inherited
from sdft_ds.config.fields import unread_by, with_flag
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import launch

FILE = "config.yaml"


class _Loader(yaml.SafeLoader):
    """A SafeLoader that rejects duplicate keys instead of taking the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read(path: str) -> dict[str, Any]:
    """The mapping in a file. Raises ValueError or OSError, naming the file."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: a mapping of settings is needed, found {type(content).__name__}.")
    return content


class SavedSettings(TrainerCallback):
    """Writes all settings to config.yaml in output_dir when training starts, on rank 0. parts: what `parse` returned.

    given: one line for each setting that was given, on the command line or, other than the default, in a file.
    """

    def __init__(self, parts: Sequence[Any]):
        self.all = {f.name: _value(part, f) for part in parts for f in _told(part)}
        given = {name: self.all[name] for name in parts[0].given if name in self.all}
        self.given = [f"{name}: {_in_one_line(value)}" for name, value in given.items()]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            Path(args.output_dir, FILE).write_text(_yaml(self.all), encoding="utf-8")


def _told(part: Any) -> list[Field]:
    """Fields to print and save: not secret, not derived from others, and read by the run's method."""
    apart = inherited.SECRETS | inherited.DERIVED | with_flag(type(part), "secret") | with_flag(type(part), "derived")
    unread = unread_by(type(part), part.method) if isinstance(part, SDFTConfig) else {}
    return [f for f in fields(part) if f.init and f.name not in {*apart, *unread}]


def _value(part: Any, f: Field) -> Any:
    value = _plain(getattr(part, f.name))
    # Without an accelerator use_cpu was not a choice.
    return False if f.name == "use_cpu" and launch.no_accelerator() else value


def _plain(value: Any) -> Any:
    """Convert to types that YAML can represent."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.to_dict() if hasattr(value, "to_dict") else value


def _yaml(settings: Any, **style: Any) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, **{"width": 1000, **style})


def _in_one_line(value: Any) -> str:
    text = _yaml(value, default_flow_style=True, width=float("inf")).removesuffix("...\n").strip()
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text
