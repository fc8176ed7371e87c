"""Teacher checkpoint: each rank saves its own shards as safetensors; any number of ranks can load them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdft_ds.distributed import engines, ranks
from sdft_ds.teacher.protocol import Teacher


def save(folder: str, teacher: Teacher, engine: nn.Module) -> None:
    """Save this rank's shards of the teacher, named `vector@offset`; rank 0 only if every rank holds all of it."""
    if not teacher.has_state or (engines.is_replicated(engine) and ranks.rank() > 0):
        return
    pieces = {f"{name}@{offset}": tensor.contiguous().cpu() for name, offset, tensor in teacher.state(engine)}
    save_file(pieces, Path(folder, f"teacher-rank-{ranks.rank()}.safetensors"))


def load(folder: str, teacher: Teacher, engine: nn.Module) -> None:
    """Load the teacher, saved by any number of ranks. Raises FileNotFoundError if it is missing, and KeyError for a
    part that is: a newly initialized teacher would be a different one."""
    if not teacher.has_state:
        return
    files = sorted(Path(folder).glob("teacher-rank-*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no teacher: the checkpoint was made with another teacher_model_kind. Resume with the "
            "settings that it was made with."
        )
    found: dict[str, list[tuple[int, Any, str]]] = {}
    handles = [safe_open(path, framework="pt") for path in files]
    for handle in handles:
        for key in handle.keys():
            name, _, offset = key.rpartition("@")
            found.setdefault(name, []).append((int(offset), handle, key))

    def read(name: str, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of a flat vector, from the shards that cover them; 0 elsewhere."""
        values = torch.zeros(numel)
        for start, handle, key in found[name] if numel else []:
            part = handle.get_slice(key)
            (length,) = part.get_shape()
            low, high = max(offset, start), min(offset + numel, start + length)
            if low < high:
                values[low - offset : high - offset] = part[low - start : high - start].float()
        return values

    teacher.load(engine, read)
