"""The teacher in a checkpoint: each rank writes its own shards, as safetensors, and any number of ranks reads them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdft_ds.distributed import engines, ranks
from sdft_ds.teacher.protocol import Teacher


def save(folder: str, teacher: Teacher, engine: nn.Module) -> None:
    """Write this rank's pieces of the teacher, named `vector@offset`; the first's alone where each rank holds all."""
    if not teacher.has_state or (engines.is_replicated(engine) and ranks.rank() > 0):
        return
    pieces = {f"{name}@{offset}": tensor.contiguous().cpu() for name, offset, tensor in teacher.state(engine)}
    save_file(pieces, Path(folder, f"teacher-rank-{ranks.rank()}.safetensors"))


def load(folder: str, teacher: Teacher, engine: nn.Module) -> None:
    """Read the teacher back, however many ranks it was saved by. Raises FileNotFoundError where it is missing: a
    teacher that starts anew would be another one."""
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
        """Elements offset ... offset + numel of a flat vector, from the pieces that cover them; 0 where none does."""
        values = torch.zeros(numel)
        for start, handle, key in found.get(name, []):
            part = handle.get_slice(key)
            (length,) = part.get_shape()
            low, high = max(offset, start), min(offset + numel, start + length)
            if low < high:
                values[low - offset : high - offset] = part[low - start : high - start].float()
        return values

    teacher.load(engine, read)
