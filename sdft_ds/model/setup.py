"""Trainer setup: loads and validates model, tokenizer, prompts and data sets, cheapest checks first."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.streams import Stream
from sdft_ds.data.validation import validate_dataset
from sdft_ds.model import loading

EvalDatasets = Dataset | dict[str, Dataset] | None


@dataclass(frozen=True)
class Setup:
    """processing_class: the tokenizer, or the processor that contains it, as saved with the model."""

    model: nn.Module
    processing_class: PreTrainedTokenizerBase | ProcessorMixin
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    train_dataset: Dataset | Stream | None
    eval_dataset: EvalDatasets
    anchor_dataset: Dataset | None = None


def prepare(
    model: str | PreTrainedModel | nn.Module,
    args: SDFTConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: EvalDatasets,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    peft_config: PeftConfig | None,
    anchor_dataset: Dataset | None = None,
    context_optional: bool = False,
) -> Setup:
    """Load and validate all inputs of a trainer. Raises ValueError, naming field or row, before the weights are loaded
    where possible. context_optional: see PromptBuilder."""
    # Seed before anything random: weights missing from the files, the adapter.
    set_seed(args.seed)
    loading.refuse_second_adapter(model, peft_config, args)
    config = loading.config_of(model, args)
    loading.check_attention(config, args)
    loading.check_kernels(config, args)
    loading.check_support(config, args)
    loading.warn_of_router_loss(config)
    processing_class, tokenizer = loading.load_tokenizer(processing_class, config._name_or_path, args)
    prompts = loading.prompt_builder(tokenizer, config, args, context_optional)
    train_dataset = _training_rows(train_dataset, prompts, args)
    eval_dataset = _evaluation_rows(eval_dataset, prompts, args)
    if anchor_dataset is not None:
        anchor_dataset = validate_dataset(
            anchor_dataset, "anchor_dataset", prompts, args.bad_rows_policy, anchors=True
        )
    elif args.anchor_fraction is not None:
        raise ValueError("anchor_fraction needs anchors: give an anchor_dataset (command line: --anchor_path).")
    model = loading.load_model(model, args, peft_config)
    loading.apply_kernels(model, args)
    loading.check_embedding(tokenizer, model)
    if train_dataset is not None:
        loading.refuse_without_trainable(model)
    loading.keep_quantized_layout(model)
    loading.warn_without_masters(model, args)
    return Setup(model, processing_class, tokenizer, prompts, train_dataset, eval_dataset, anchor_dataset)


def _training_rows(dataset: Any, prompts: PromptBuilder, args: SDFTConfig) -> Dataset | Stream | None:
    if isinstance(dataset, IterableDataset):
        if args.max_steps <= 0:
            raise ValueError("train_dataset is a stream, which has no length: set max_steps.")
        return Stream(dataset, prompts, args.bad_rows_policy)
    return None if dataset is None else validate_dataset(dataset, "train_dataset", prompts, args.bad_rows_policy)


def _evaluation_rows(dataset: EvalDatasets, prompts: PromptBuilder, args: SDFTConfig) -> EvalDatasets:
    if dataset is None:
        return None
    named = dataset if isinstance(dataset, dict) else {"eval_dataset": dataset}
    valid = {name: validate_dataset(rows, name, prompts, args.bad_rows_policy) for name, rows in named.items()}
    return valid if isinstance(dataset, dict) else valid["eval_dataset"]
