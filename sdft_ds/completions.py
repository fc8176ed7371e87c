"""Shows what the model answers: the completions of the first evaluation prompts, after every evaluation."""

from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sdft_ds.rows import example_from_row
from sdft_ds.trainer import SDFTTrainer


class ShowCompletions(TrainerCallback):
    """Prints a table of the student's greedy completions of the first `count` rows; every rank generates them."""

    def __init__(self, trainer: SDFTTrainer, dataset: Dataset, count: int):
        self.trainer = trainer
        self.rows = [dataset[i] for i in range(min(count, len(dataset)))]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        batches = self.trainer.generation_batches
        prompts = [batches.prompts.build(example_from_row(row, i), i).student for i, row in enumerate(self.rows)]
        keys = [f"shown/{i}" for i in range(len(prompts))]
        completions = batches.generate([prompt.ids for prompt in prompts], keys, do_sample=False)
        if state.is_world_process_zero:
            table = Table("prompt", "completion", title=f"Completions at step {state.global_step}", show_lines=True)
            for prompt, completion in zip(prompts, completions, strict=True):
                table.add_row(_end(prompt.text), _end(batches.tokenizer.decode(completion.ids)))
            Console().print(table, markup=False)


def _end(text: str, most: int = 300) -> str:
    return text if len(text) <= most else "…" + text[-most:]
