"""Evaluation on transformers' loop: the objective's loss and metrics on evaluation rows, under all ZeRO stages."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.data.schedule import evaluation_batches
from sdft_ds.data.validation import validate_dataset
from sdft_ds.distributed import engines, launch, zero
from sdft_ds.loop.lifecycle import ReusableTrainer
from sdft_ds.loop.loaders import EvaluationBatches
from sdft_ds.metrics.meters import Meters
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.objectives.protocol import BatchUse, Objective
from sdft_ds.rollouts.engine import RolloutEngine


class EvaluationTrainer(ReusableTrainer):
    """prompts, meters, objective, rollouts: set by the subclasses."""

    prompts: PromptBuilder
    meters: dict[str, Meters]  # train, eval
    objective: Objective
    rollouts: RolloutEngine

    def __init__(self, *arguments: Any, **options: Any):
        # Added to an evaluation's metrics; see evaluation.task_evaluation.
        self.task_figures: Callable[[], dict[str, float]] = dict
        super().__init__(*arguments, **options)

    @abstractmethod
    def with_loss_weights(self, scored: list[Any]) -> list[dict[str, Any]]:
        """Inputs of compute_loss for micro-batches whose loss weights are normalized together."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers, but also works before training, under all ZeRO stages."""
        if engines.was_released(self.model_wrapped):
            raise ValueError(
                "This trainer's DeepSpeed engine ended when another trainer began to train its model: evaluate before "
                "that, or with the trainer that trained last."
            )
        if not self.is_in_train:  # other code may have changed them
            self.rollouts.weights_changed()
        with self.prepared():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there are no logits to return."""
        raise ValueError(
            "predict() would return logits, which are never in memory here: use evaluate() for the loss and the "
            "metrics, or generate with the trained model."
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> EvaluationBatches:
        """All batches of this rank, built when the loop requests the first: one weight swap per evaluation."""
        rows, args = self._evaluation_rows(eval_dataset), self.args
        batch_size = args.per_device_eval_batch_size
        slots = evaluation_batches(
            len(rows),
            batch_size,
            args.process_index,
            args.world_size,
            args.num_generations_eval or args.num_generations,
        )
        flat = tuple(slot for batch in slots for slot in batch)
        # Hidden states of the full data set are kept in host memory.
        use = BatchUse(batch_size, keep_on=torch.device("cpu"))

        def make() -> list[dict[str, Any]]:
            self.check_head()
            return self.with_loss_weights(self.objective.collect(rows, flat, "eval", self.meters["eval"], use))

        return EvaluationBatches(rows, len(slots), make)

    def _evaluation_rows(self, dataset: str | Dataset | None) -> Dataset:
        if isinstance(dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if dataset not in named:
                raise ValueError(f"There is no evaluation set {dataset!r}; there are {', '.join(named) or 'none'}.")
            return named[dataset]
        if dataset is not None:
            return validate_dataset(dataset, "eval_dataset", self.prompts, self.args.bad_rows_policy)
        if self.eval_dataset is None:
            raise ValueError("evaluate() needs rows: give an eval_dataset to it, or to the trainer.")
        return self.eval_dataset

    def evaluation_loop(
        self, dataloader: EvaluationBatches, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As in transformers, for one data set; adds all metrics under the same prefix as its loss."""
        meters = self.meters["eval"]
        meters.reset()
        output = self._evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in meters.collect(steps=1).items()})
        if metric_key_prefix.partition("_")[0] == "eval":
            output.metrics.update({f"eval_{name}": value for name, value in self.task_figures().items()})
        return output

    def _evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Before training there is no engine. If the weights are sharded transformers creates one; otherwise each rank
        has the full weights and evaluates with the model itself."""
        accelerator = self.accelerator
        if not launch.is_configured(accelerator) or self.deepspeed is not None:
            return super().evaluation_loop(*args, **kwargs)
        if launch.shards_weights(accelerator):
            engines.release(causal_lm_of(self.model))
            with launch.config_kept(accelerator):
                return super().evaluation_loop(*args, **kwargs)
        self.is_deepspeed_enabled = False
        try:
            with engines.engine_precision(accelerator, self.model):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = True

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch, scaled so that the mean over batches and ranks is the evaluation loss."""
        with (
            torch.no_grad(),
            self.meters["eval"].phase("student"),
            zero.scoring_pass(model) as forward,
            self.compute_loss_context_manager(),
        ):
            loss = self.compute_loss(forward, inputs) * inputs["batches"]
        return loss.detach(), None, None
