"""The baseline: plain supervised fine-tuning of the demo model on the demonstrations that SDFT learns from.

    OMP_NUM_THREADS=1 python -m sdft_ds.demo.sft --output DIR [--seed N]

The assistant turn is the demonstration (`privileged_context`), the prompt is the same. Measured on seeds 0 to 2: the
new facts are learned as they were asked (1.00) but not in other words (0.66), and a tenth of the old is lost (at a
learning rate of 1e-3: two thirds or more). The last line printed is the accuracy per group of questions, as JSON.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from sdft_ds.demo.build import MODEL_DIR
from sdft_ds.demo.evaluate import greedy_answers
from sdft_ds.demo.world import answer_accuracies, questions, train_rows

# As the SDFT run on the same rows: the same batch, learning rate and number of steps.
STEPS = 120
BATCH = 16
LEARNING_RATE = 3e-4


def encode(tokenizer, row: dict) -> dict[str, list[int]]:
    """One training row as token ids; labels on the demonstration and its end only (-100 elsewhere)."""
    conversation = [*row["prompt"], {"role": "assistant", "content": row["privileged_context"]}]
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    ids, answer = encoded["input_ids"], encoded["assistant_masks"]
    labels = [token if in_answer else -100 for token, in_answer in zip(ids, answer, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the rows")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.output),
            seed=args.seed,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=20,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=[encode(tokenizer, row) for row in train_rows()],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model(args.output)
    tokenizer.save_pretrained(args.output)

    asked = questions()
    print(json.dumps(answer_accuracies(greedy_answers(model, tokenizer, asked), asked)))


if __name__ == "__main__":
    main()
