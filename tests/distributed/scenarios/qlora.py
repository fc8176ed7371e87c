"""QLoRA."""

from typing import Any

import torch
from transformers import BitsAndBytesConfig

from sdft_ds.distributed import zero
from tests.helpers.trainers import Recorder, digest, make_trainer


def train_in_four_bits(stage: int | None, folder: str, **settings) -> dict[str, Any]:
    """Losses of a QLoRA run on what bitsandbytes takes for a CPU with bf16 units, and the 4-bit weights after it."""
    import bitsandbytes

    plain = bitsandbytes.nn.modules.has_avx512bf16
    bitsandbytes.nn.modules.has_avx512bf16 = lambda: True
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )
    torch.manual_seed(11)
    try:
        trainer = make_trainer(
            stage, model=folder, lora=True, callbacks=[recorder := Recorder()], eval_strategy="steps", eval_steps=1,
            max_steps=2, model_init_kwargs={"quantization_config": quantization}, **settings,
        )  # fmt: skip
        trainer.train()
    finally:
        bitsandbytes.nn.modules.has_avx512bf16 = plain
    weights = [m.weight for m in trainer.model.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    losses = [log.get("loss", log.get("eval_loss")) for log in recorder.logs if "loss" in log or "eval_loss" in log]
    return {"losses": losses, "weights": digest(zero.full_copies(weights))}
