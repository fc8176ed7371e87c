"""What the tests of exported weights run on every rank."""

from typing import Any

import torch
from torch import Tensor

from sdft_ds.distributed import zero
from sdft_ds.model import export
from sdft_ds.model.completion_forward import causal_lm_of
from tests.helpers.trainers import grown_student, make_trainer

# As small as vLLM's kernels for a CPU allow: heads of 32.
SIZES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def student(lora: bool | str, tied: bool = True) -> torch.nn.Module:
    return grown_student(lora, tied, **SIZES)


def merged(engine: Any, model: torch.nn.Module, lora: bool | str, tied: bool = True) -> dict[str, Tensor]:
    """All weights of the student as PEFT itself merges them, from a plain copy of the model. Collective."""
    names, params = zip(*model.named_parameters(), strict=True)
    copies = dict(zip(names, (each.float() for each in zero.full_copies(list(params))), strict=True))
    plain = student(lora, tied)
    plain.load_state_dict(copies, strict=False)
    if lora == "on the head":  # PEFT would merge into the embedding that shares these weights
        head = plain.get_base_model().lm_head.base_layer
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    plain = plain.merge_and_unload() if lora else plain
    return {name: tensor.detach() for name, tensor in plain.state_dict().items()}


def export_after_steps(stage: int | None, lora: bool | str, tied: bool = True, **settings) -> dict[str, Any]:
    """Trains two steps; (what is exported, what PEFT merges, the largest group's share of all elements)."""
    trainer = make_trainer(stage, model=student(lora, tied), max_steps=2, **settings)
    trainer.train()
    with_head = not export.is_tied(trainer.model)
    groups = list(export.whole_weights(trainer.model_wrapped, trainer.model, torch.float32, with_head))
    exported = [pair for group in groups for pair in group]
    sizes = [sum(tensor.numel() for _, tensor in group) for group in groups]
    return {
        "exported": exported,
        "merged": merged(trainer.model_wrapped, trainer.model, lora, tied),
        "tied": export.is_tied(trainer.model),
        "largest": max(sizes) / sum(sizes),
        "shards": sum(getattr(p, "ds_tensor", p).numel() for p in causal_lm_of(trainer.model).parameters()),
    }
