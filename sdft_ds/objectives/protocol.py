"""Objective: the interface of a training method: batch collection, loss, and checkpoint state.

The loop (loop/step.py) calls an objective at fixed points and knows nothing else about the method. A method is one
module here with one subclass of Objective; trainer.py defines its trainer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.batch import MicroBatch, Rollout, collate
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.rows import Example, anchor_from_row, example_from_row
from sdft_ds.data.schedule import ScheduledBatch, Slot
from sdft_ds.data.streams import Stream
from sdft_ds.loss.normalization import LossWeights
from sdft_ds.metrics.meters import Meters
from sdft_ds.model.packing import Packing
from sdft_ds.rollouts.engine import RolloutEngine


class Scored(Protocol):
    """A micro-batch with whatever its loss needs in addition to the tokens."""

    batch: MicroBatch


@dataclass
class GenerationBatch:
    """Micro-batches that were collected together. number: index of the generation batch; uses: micro-batches trained
    on so far."""

    number: int
    scored: list[Any]
    uses: int = 0


@dataclass(frozen=True)
class InFlight:
    """A rollout that has begun. key: of its generation batch; weights_version: of the weights that it samples
    from, None if they are of another process; wait: returns its rollouts; rows: those that they answer, None if they
    have to be read again."""

    key: str
    weights_version: int | None
    wait: Callable[[], list[Rollout]]
    rows: list[tuple[dict[str, Any], Example]] | None = None


@dataclass(frozen=True)
class BatchUse:
    """How a generation batch will be used.

    micro_batch_size: rows per micro-batch. outlives_step: the student's weights will have been updated before its last
    use. batches_per_step: micro-batches among which rows may be reordered to reduce padding. keep_on: device that
    holds tensors until they are used. progress: share of the optimizer steps that are done, in [0, 1]; 1 in an
    evaluation. upcoming: the generation batch that will be collected next, if its rollout is to begin now.
    """

    micro_batch_size: int
    keep_on: torch.device
    outlives_step: bool = False
    batches_per_step: int = 1
    progress: float = 1.0
    upcoming: ScheduledBatch | None = None


@dataclass
class RunParts:
    """The parts of a run that an objective uses.

    anchors: prompts on which the student is held to its start. engine: returns the current training wrapper of the
    model. compute_dtype: dtype of the LM head's matmul. dispatch:
    (event, payload) calls the event on the run's callbacks with the arguments that payload() returns. state: returns
    the trainer's. context_fn, reward_funcs: functions of the user's; see objectives/feedback.py.
    """

    args: SDFTConfig
    model: nn.Module
    engine: Callable[[], nn.Module]
    tokenizer: PreTrainedTokenizerBase
    prompts: PromptBuilder
    anchors: Dataset | None
    rollouts: RolloutEngine
    packing: Packing
    compute_dtype: torch.dtype
    dispatch: Callable[..., None]
    state: Callable[[], TrainerState]
    context_fn: Callable[..., Any] | None = None
    reward_funcs: Sequence[Callable[..., Any]] = ()


def key_of(generation_batch: int) -> str:
    """Identifies a generation batch of the training in the random seeds of its rows."""
    return f"train/{generation_batch}"


class Objective(ABC):
    """One training method in one run. In distributed runs all ranks call all methods in the same order.

    description: for the model card. takes_contexts: contexts may be made after the rollout, by a function;
    makes_contexts: they always are, by the method.
    """

    description: ClassVar[str]
    takes_contexts: ClassVar[bool] = False
    makes_contexts: ClassVar[bool] = False

    def __init__(self, parts: RunParts):
        self.parts = parts
        self.args = parts.args
        self.callbacks: list[TrainerCallback] = []  # added by the trainer

    @abstractmethod
    def collect(
        self, dataset: Dataset | Stream, slots: tuple[Slot, ...], key: str, meters: Meters, use: BatchUse
    ) -> list[Any]:
        """Scored micro-batches of the slots, from the current weights. Called before any student forward of the step.

        key: identifies the generation batch in the random seeds of its rows. All ranks have equally many slots.
        """

    @abstractmethod
    def loss(self, model: nn.Module, scored: Any, weights: LossWeights, meters: Meters, step: int | None) -> Tensor:
        """The scalar loss of one micro-batch, computed in the student's forward. step: the optimizer step (from 1), or
        None in an evaluation."""

    def start(self, engine: nn.Module, max_steps: int, resumed: bool) -> None:
        """Called when the engine is ready, before the first step; resumed: after `load`."""

    def after_step(self, engine: nn.Module, step: int) -> None:
        """Called after optimizer step `step` (from 1), unless it was skipped."""

    def measure(self, engine: nn.Module, meters: Meters) -> None:
        """Add metrics that are measured once per log line."""

    def reset(self) -> None:
        """Clear the state of an earlier run before a new one begins."""

    def save(self, folder: str, engine: nn.Module, pending: GenerationBatch | None) -> None:
        """Write what a resume needs. pending: a partially used generation batch."""

    def load(self, folder: str, engine: nn.Module, with_batch: bool) -> GenerationBatch | None:
        """Load what `save` wrote. Returns the pending batch, or None if there is none or with_batch is False."""

    def load_weights(self, folder: str, engine: nn.Module) -> None:
        """Load only the weights that an evaluation needs in addition to the model's."""

    def example(self, dataset: Dataset | Stream, slot: Slot) -> tuple[dict[str, Any], Example]:
        """The slot's row, of the data set or the anchors, as stored and as validated."""
        if slot.anchor:
            row = self.parts.anchors[slot.index]
            return row, anchor_from_row(row, slot.index)
        row = dataset[slot.index]
        return row, example_from_row(row, slot.index, self.parts.prompts.context_optional)

    def collate(self, rollouts: list[Rollout]) -> MicroBatch:
        """Collate rollouts into a micro-batch."""
        pad = self.parts.tokenizer.pad_token_id
        return collate(rollouts, self.args.loss_mask, pad, self.args.device, self.parts.packing.bins_of)
