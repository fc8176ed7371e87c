"""Saves and loads a partially used generation batch: rollouts as JSON, tensors as safetensors, two files per rank."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdft_ds.data.batch import Completion, MicroBatch, Rollout
from sdft_ds.data.prompts import PromptPair, RenderedPrompt
from sdft_ds.distributed import ranks
from sdft_ds.loss.chunked import Adapter, HeadValues
from sdft_ds.objectives.protocol import GenerationBatch, InFlight
from sdft_ds.teacher.scoring import ScoredBatch


def save(folder: str, batch: GenerationBatch) -> None:
    """Write this rank's part: rollouts and the results of the scoring pass."""
    tensors: dict[str, Tensor | None] = {}
    for m, scored in enumerate(batch.scored):
        tensors |= {f"hidden/{m}": scored.teacher_hidden_ND, f"old/{m}": scored.old_log_probs_N}
    head = batch.scored[0].teacher_head  # shared by all micro-batches
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


def load(
    folder: str, collate: Callable[[list[Rollout]], MicroBatch], device: torch.device, keep_on: torch.device
) -> GenerationBatch | None:
    """Read this rank's part; None if the checkpoint was saved between two generation batches."""
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
            ScoredBatch(
                batch=collate([_rollout(each) for each in rollouts]),
                teacher_hidden_ND=tensors[f"hidden/{m}"].to(keep_on),
                teacher_head=head,
                old_log_probs_N=None if old is None else old.to(device),
            )
        )
    return GenerationBatch(about["number"], scored, about["uses"])


def save_in_flight(folder: str, in_flight: InFlight) -> None:
    """Write this rank's part of a rollout that has begun, once it has ended."""
    about = {"key": in_flight.key, "rollouts": [asdict(rollout) for rollout in in_flight.wait()]}
    _in_flight_file(folder).write_text(json.dumps(about))


def load_in_flight(folder: str) -> InFlight | None:
    """Read this rank's part; None if no rollout had begun."""
    if not _in_flight_file(folder).exists():
        return None
    about = json.loads(_in_flight_file(folder).read_text())
    rollouts = [_rollout(each) for each in about["rollouts"]]
    return InFlight(about["key"], None, lambda: rollouts)


def _in_flight_file(folder: str) -> Path:
    return Path(folder, f"next-generation-batch-rank-{ranks.rank()}.json")


def _batch_file(folder: str, suffix: str) -> Path:
    return Path(folder, f"generation-batch-rank-{ranks.rank()}.{suffix}")


def _rollout(about: dict[str, Any]) -> Rollout:
    prompts = about["prompts"]
    sides = [RenderedPrompt(**prompts[side]) for side in ("student", "teacher")]
    pair = PromptPair(*sides, anchor=prompts.get("anchor", False))  # checkpoints from before anchors lack the key
    return Rollout(**{**about, "prompts": pair, "completion": Completion(**about["completion"])})
