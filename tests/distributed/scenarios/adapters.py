"""Every PEFT method with a base teacher."""

from peft import (
    BOFTConfig,
    DeloraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    OSFConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VeraConfig,
)
from transformers import TrainerCallback

from tests.helpers import tiny
from tests.helpers.trainers import make_trainer, student_logits, teacher_logits

LLAMA = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}


# Each trains the tiny Llama; the first ones as their adapters are switched off, others from what they start with.
PEFT_METHODS = {
    "LoRA": lambda: LoraConfig(**LLAMA),
    "DoRA": lambda: LoraConfig(**LLAMA, use_dora=True),
    "LoRA on the embedding": lambda: LoraConfig(**{**LLAMA, "target_modules": ["embed_tokens"]}),
    "LoRA and tokens": lambda: LoraConfig(**LLAMA, trainable_token_indices=list(range(264))),
    "LoRA and biases": lambda: LoraConfig(**LLAMA, bias="all"),
    "LoRA, random": lambda: LoraConfig(**LLAMA, init_lora_weights=False),
    "PiSSA": lambda: LoraConfig(**LLAMA, init_lora_weights="pissa"),
    "fast PiSSA": lambda: LoraConfig(**LLAMA, init_lora_weights="pissa_niter_4"),
    "OLoRA": lambda: LoraConfig(**LLAMA, init_lora_weights="olora"),
    "tokens": lambda: TrainableTokensConfig(
        task_type="CAUSAL_LM", target_modules=["embed_tokens"], token_indices=list(range(264))
    ),
    "VeRA": lambda: VeraConfig(**{**LLAMA, "target_modules": ["q_proj"]}, r=8),
    "RandLoRA": lambda: RandLoraConfig(**{**LLAMA, "target_modules": ["q_proj"]}, r=4),
    "IA3": lambda: IA3Config(**LLAMA, feedforward_modules=["down_proj"]),
    "LoHa": lambda: LoHaConfig(**LLAMA),
    "LoKr": lambda: LoKrConfig(**LLAMA),
    "OFT": lambda: OFTConfig(**LLAMA, oft_block_size=8, r=0),
    "BOFT": lambda: BOFTConfig(**LLAMA, boft_block_size=8),
    "norms": lambda: LNTuningConfig(task_type="CAUSAL_LM"),
    "FourierFT": lambda: FourierFTConfig(**LLAMA, n_frequency=10),
    "DeLoRA": lambda: DeloraConfig(**LLAMA),
    "OSF": lambda: OSFConfig(**LLAMA),
}


SWITCHED_OFF = list(PEFT_METHODS)[:4]


def base_teachers(stage, methods: list[str], model: str | None = None) -> dict[str, tuple[str, float, float, float]]:
    """For each PEFT method the class of its base teacher; how far that one's logits are from the model's at the start,
    before and after two steps; and how far the student's are after them."""
    found = {}
    for name in methods:
        base = model or tiny.llama(tie_word_embeddings="token" not in name, attention_bias=True)
        trainer = make_trainer(stage, model=base, peft_config=PEFT_METHODS[name](), max_steps=2)
        begin = []

        class Look(TrainerCallback):
            def on_train_begin(self, *args, **kwargs):
                begin.extend((student_logits(trainer), teacher_logits(trainer)))  # noqa: B023

        trainer.add_callback(Look())
        trainer.train()
        apart = [logits - begin[0] for logits in (begin[1], teacher_logits(trainer), student_logits(trainer))]
        found[name] = (type(trainer.teacher).__name__, *(each.abs().max().item() for each in apart))
    return found
