"""What a resume needs beyond transformers' and DeepSpeed's own files: the teacher, one file for each rank."""

import os
from pathlib import Path

from safetensors.torch import load_file, save_file

from sdft_ds.teacher import Teacher


def teacher_file(folder: str, rank: int, world_size: int) -> Path:
    return Path(folder, f"teacher-rank-{rank}-of-{world_size}.safetensors")


def save_teacher(folder: str, teacher: Teacher, rank: int, world_size: int) -> None:
    """Write this rank's part of the teacher; nothing for a kind that has no state of its own."""
    state = {name: tensor.contiguous().cpu() for name, tensor in teacher.state().items()}
    if state:
        os.makedirs(folder, exist_ok=True)  # rank 0 makes it, and may not have come to it yet
        save_file(state, teacher_file(folder, rank, world_size))


def load_teacher(folder: str, teacher: Teacher, rank: int, world_size: int) -> None:
    """Read it back. Raises FileNotFoundError where it is missing: a teacher that starts anew would be another one."""
    if not teacher.has_state:
        return
    path = teacher_file(folder, rank, world_size)
    if not path.exists():
        others = sorted(Path(folder).glob("teacher-rank-*"))
        found = f"it holds those of {others[0].stem.split('-')[-1]} ranks" if others else "it holds none"
        raise FileNotFoundError(
            f"{path} is missing ({found}): the checkpoint was made with another number of ranks, with another "
            "teacher_model_kind, or is incomplete. Resume with the settings that it was made with."
        )
    teacher.load(load_file(path))
