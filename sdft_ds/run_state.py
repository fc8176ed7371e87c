"""What of a run is ours to save, beside transformers' and DeepSpeed's files: the teacher and a half-used generation
batch. Tensors are safetensors, the rest is JSON: nothing that runs when it is read.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdft_ds import ranks, zero
from sdft_ds.chunked_loss import Adapter, HeadValues
from sdft_ds.paired_batch import Completion, PairedBatch, Rollout
from sdft_ds.prompts import PromptPair, RenderedPrompt
from sdft_ds.scoring import Scored
from sdft_ds.teacher import Teacher

# ---- the teacher ----------------------------------------------------------------------------------------------------


def save_teacher(folder: str, teacher: Teacher, engine: nn.Module) -> None:
    """Write this rank's pieces of the teacher, named `vector@offset`; the first's alone where each rank holds all."""
    if not teacher.has_state or (zero.stage(engine) == 0 and ranks.index() > 0):
        return
    pieces = {f"{name}@{offset}": tensor.contiguous().cpu() for name, offset, tensor in teacher.state(engine)}
    save_file(pieces, Path(folder, f"teacher-rank-{ranks.index()}.safetensors"))


def load_teacher(folder: str, teacher: Teacher, engine: nn.Module) -> None:
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


# ---- a generation batch that is not used up -------------------------------------------------------------------------


@dataclass
class GenerationBatch:
    """Scored micro-batches, the number of the generation batch that they are, and how many of its uses are over."""

    number: int
    scored: list[Scored]
    uses: int = 0


def save_generation_batch(folder: str, batch: GenerationBatch) -> None:
    """Write this rank's part; all that was kept of the rollouts and of the teacher's pass."""
    tensors: dict[str, Tensor | None] = {}
    for m, scored in enumerate(batch.scored):
        tensors |= {f"hidden/{m}": scored.teacher_hidden_ND, f"old/{m}": scored.old_log_probs_N}
    head = batch.scored[0].teacher_head  # one for all
    if head is not None:
        tensors |= {"head/weight": head.weight_VD, "head/bias": head.bias_V}
    if head is not None and head.adapter is not None:
        tensors |= {"head/down": head.adapter.down_QD, "head/up": head.adapter.up_VQ}
    present = {name: tensor.contiguous().cpu() for name, tensor in tensors.items() if tensor is not None}
    save_file(present, _batch_file(folder, "safetensors"))
    about = {
        "number": batch.number,
        "uses": batch.uses,
        "micro-batches": [[asdict(rollout) for rollout in scored.batch.rollouts] for scored in batch.scored],
        "adapter scale": None if head is None or head.adapter is None else head.adapter.scale,
        "head": head is not None,
    }
    _batch_file(folder, "json").write_text(json.dumps(about))


def load_generation_batch(
    folder: str, pair: Callable[[list[Rollout]], PairedBatch], device: torch.device, keep_on: torch.device
) -> GenerationBatch | None:
    """This rank's part, or None where the checkpoint was made between two batches."""
    if not _batch_file(folder, "json").exists():
        return None
    about = json.loads(_batch_file(folder, "json").read_text())
    tensors = load_file(_batch_file(folder, "safetensors"))
    part = {name.removeprefix("head/"): tensor.to(device) for name, tensor in tensors.items() if "head/" in name}
    scale = about["adapter scale"]
    adapter = None if scale is None else Adapter(part["down"], part["up"], scale)
    head = HeadValues(part.get("weight"), part.get("bias"), adapter) if about["head"] else None
    scored = []
    for m, rollouts in enumerate(about["micro-batches"]):
        old = tensors.get(f"old/{m}")
        scored.append(
            Scored(
                batch=pair([_rollout(each) for each in rollouts]),
                teacher_hidden_ND=tensors[f"hidden/{m}"].to(keep_on),
                teacher_head=head,
                old_log_probs_N=None if old is None else old.to(device),
            )
        )
    return GenerationBatch(about["number"], scored, about["uses"])


def _batch_file(folder: str, suffix: str) -> Path:
    return Path(folder, f"generation-batch-rank-{ranks.index()}.{suffix}")


def _rollout(about: dict[str, Any]) -> Rollout:
    sides = {side: RenderedPrompt(**rendered) for side, rendered in about["prompts"].items()}
    return Rollout(**{**about, "prompts": PromptPair(**sides), "completion": Completion(**about["completion"])})
