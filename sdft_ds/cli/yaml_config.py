"""YAML settings: read with --config; printed (if not at their default) and saved to config.yaml when training starts.

The saved file can be passed to --config to reproduce the run; secrets are excluded.
"""

from collections.abc import Iterable
from dataclasses import Field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.config import inherited
from sdft_ds.config.fields import default_of, unread_by, with_flag
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import launch

FILE = "config.yaml"
# Not printed, because transformers sets them itself.
SET_BY_OTHERS = {"accelerator_config", "dataloader_pin_memory", "debug", "disable_tqdm"}


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
    """When training starts, prints the non-default settings and writes all of them to config.yaml in output_dir, on
    rank 0."""

    def __init__(self, parts: Iterable[Any]):
        told = [(part, f) for part in parts for f in _told(part)]
        self.all = {f.name: _value(part, f) for part, f in told}
        self.changed = {
            f.name: self.all[f.name]
            for _, f in told
            if self.all[f.name] != _plain(default_of(f)) and f.name not in SET_BY_OTHERS
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            file = Path(args.output_dir, FILE)
            print(f"Settings that are not at their defaults (all of them: {file}):\n{_yaml(self.changed)}", flush=True)
            file.write_text(_yaml(self.all), encoding="utf-8")


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


def _yaml(settings: dict[str, Any]) -> str:
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=1000)
