"""One optimizer step on transformers' Trainer.

Order of calls in a step of A micro-batches:

    on_train_begin         once: _engine_ready: check the LM head, start the objective
    get_batch_samples      objective.collect for each generation batch that is due, before any student forward;
                           then loss weights, normalized over all ranks and micro-batches of the step
    training_step     x A  objective.loss inside the student's forward (compute_loss), and backward
                           with DeepSpeed the last backward makes the optimizer step (distributed/engines.py)
    _get_grad_norm         without DeepSpeed: drop non-finite gradients (metrics/nonfinite.py); then optimizer.step
    on_step_end            agree whether to leave (loop/resume.py); objective.after_step, unless the step was skipped
    log, evaluate, save    where due: metrics reduced across ranks; loop/evaluation.py; loop/resume.py
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.schedule import Lookahead, Schedule, ScheduledBatch, for_generation_batches
from sdft_ds.data.streams import Stream
from sdft_ds.distributed import engines, ranks
from sdft_ds.loop.evaluation import EvaluationTrainer
from sdft_ds.loop.loaders import data_loader
from sdft_ds.loss.normalization import loss_weights
from sdft_ds.metrics.meters import Meters
from sdft_ds.metrics.nonfinite import NonFiniteGuard
from sdft_ds.objectives.protocol import BatchUse, GenerationBatch, key_of


class StepTrainer(EvaluationTrainer):
    """Trains with a given objective."""

    def __init__(self, *arguments: Any, **options: Any):
        self.current_batch: GenerationBatch | None = None
        self.step_inputs: list[dict[str, Any]] = []  # what get_batch_samples returned last
        self.needs_inputs = False  # whether their step is not done yet
        self.is_resumed = False
        super().__init__(*arguments, **options)
        # Losses are already normalized over the full optimizer step.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self.meters = {
            mode: Meters(
                ranks.all_reduce, self.args.device, self.say_phase, ranks.rank(), ranks.world_size(), mode == "train"
            )
            for mode in ("train", "eval")
        }
        self.guard = NonFiniteGuard(self.meters["train"], self.args.max_nonfinite_steps)
        self.add_callback(self.guard)
        self.add_callback(_StepEvents(self))

    # ---- before the first step --------------------------------------------------------------------------------------

    def reset_run(self) -> None:
        super().reset_run()
        self._drop_current_batch()
        self.needs_inputs = self.is_resumed = False
        self.objective.reset()
        if isinstance(self.train_dataset, Stream):
            self.train_dataset.rewind()
        for meters in self.meters.values():
            meters.reset()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags([self.args.method])

    def _engine_ready(self) -> None:
        """Setup once per run, before the first step, that needs the engine with loaded weights."""
        self.rollouts.weights_changed()
        with self.prepared():
            engine = self.model_wrapped
            engines.skip_nonfinite_steps(engine)
            engines.wrap_optimizer_step(engine, lambda: self.meters["train"].phase("optimizer"))
            self.check_head()
            self.objective.start(engine, self.state.max_steps, self.is_resumed)

    def get_train_dataloader(self) -> DataLoader:
        """One item per micro-batch of this rank; rows are read when their generation batch is collected."""
        if self.train_dataset is None:
            raise ValueError("Training needs a train_dataset.")
        args = self.args
        shape = {
            "batch_size": self._train_batch_size,
            "rank": args.process_index,
            "world_size": args.world_size,
            "num_generations": args.num_generations,
            "steps_per_generation": args.steps_per_generation,
            "num_iterations": args.num_iterations,
            "drop_last": args.dataloader_drop_last,
            "anchors": 0 if self.anchor_dataset is None else len(self.anchor_dataset),
            "anchor_share": args.anchor_share if self.anchor_dataset is not None else Fraction(0),
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        if isinstance(self.train_dataset, Stream):  # one epoch, with as many rows as max_steps needs, in stream order
            micro_batches = args.max_steps * args.gradient_accumulation_steps
            schedule = for_generation_batches(-(-micro_batches // args.generate_every), **shape)
        else:
            schedule = Schedule(len(self.train_dataset), shuffle=args.shuffle_dataset, **shape)
        self.lookahead = Lookahead(schedule)
        return data_loader(schedule)

    # ---- the optimizer step -----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[ScheduledBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, with loss weights."""
        with self.prepared():
            scored = [self._scored(next(epoch_iterator), first=i == 0) for i in range(num_batches)]
            self.step_inputs = self.with_loss_weights(scored)
            self.needs_inputs = True
        return self.step_inputs, None

    def _scored(self, item: ScheduledBatch, first: bool) -> Any:
        """The item's micro-batch; collects its generation batch if due. first: whether first of its optimizer step."""
        if self.current_batch is None or self.current_batch.number != item.generation_batch:
            if first:
                self._drop_current_batch()
            # With a lag the rollouts in flight belong to the next batch by now.
            self.is_inside_step = not first or self.args.rollout_lag > 0
            self.current_batch = GenerationBatch(item.generation_batch, self._collect(item))
            self.is_inside_step = False
            if first:
                self.leave_if_preempted()
        self.current_batch.uses += 1
        return self.current_batch.scored[item.number]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Frees the teacher's head and hidden states of a generation batch that is used up before it evaluates."""
        if self._pending_batch() is None and not self.needs_inputs:
            self._drop_current_batch()
        return super().evaluate(*args, **kwargs)

    def _pending_batch(self) -> GenerationBatch | None:
        """The current generation batch, if a later step uses it as well."""
        batch = self.current_batch
        return batch if batch is not None and batch.uses < self.args.generate_every else None

    def _drop_current_batch(self) -> None:
        """Also clears the last step's inputs, which transformers' loop still holds: else two teacher heads would be in
        memory."""
        self.current_batch = None
        for inputs in self.step_inputs:
            inputs.clear()

    def _collect(self, item: ScheduledBatch) -> list[Any]:
        args = self.args
        progress = self.state.global_step / max(1, self.state.max_steps)
        use = BatchUse(
            self._train_batch_size,
            args.teacher_states_on,
            args.outlives_step,
            args.reordered_batches,
            progress,
            self._upcoming(item.generation_batch + 1) if args.rollout_lag else None,
        )
        key, meters = key_of(item.generation_batch), self.meters["train"]
        scored = self.objective.collect(self.train_dataset, item.slots, key, meters, use)
        self.dispatch(
            "on_generation_batch_built",
            lambda: {"generate_every": args.generate_every, "steps_per_generation": args.steps_per_generation},
        )
        return scored

    def _upcoming(self, number: int) -> ScheduledBatch | None:
        """Generation batch `number`, or None if the run ends before it."""
        micro_batches = self.state.max_steps * self.args.gradient_accumulation_steps
        return self.lookahead.batch(number) if number * self.args.generate_every < micro_batches else None

    def with_loss_weights(self, scored: list[Any]) -> list[dict[str, Any]]:
        weights = loss_weights(
            [each.batch for each in scored],
            self.args.loss_type,
            self.args.max_completion_length,
            self.args.world_size,
            lambda tensor: ranks.all_reduce(tensor, "sum"),
        )
        # transformers looks up the model's inputs in a mapping, to count tokens and FLOPs.
        return [
            {**each.batch.student.inputs, "scored": each, "loss_weights": of_batch}
            for each, of_batch in zip(scored, weights, strict=True)
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.meters["train"].phase("student"):
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of one micro-batch, computed at the LM head inside the student's forward."""
        if return_outputs:
            raise ValueError("Only the loss is returned: logits are never in memory.")
        training = self.model.training  # the engine's own flag is not kept in sync with its model's
        step = self.state.global_step + 1 if training else None
        meters = self.meters["train" if training else "eval"]
        with self.prepared():
            loss = self.objective.loss(model, inputs["scored"], inputs["loss_weights"], meters, step)
        return engines.as_loss(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.before_step(model, None if norm is None else float(norm))
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the training metrics, reduced across ranks, to each log line with a loss."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, so a nan would stay nan
            steps = self.state.global_step - self.steps_at_last_log
            self.steps_at_last_log = self.state.global_step
            self.objective.measure(self.model_wrapped, self.meters["train"])
            logs.update(self.meters["train"].collect(steps))
            if self.meters["train"].straggler is not None:
                ranks.tell(f"Up to step {self.state.global_step} {self.meters['train'].straggler}.")
        super().log(logs, start_time)

    def dispatch(self, event: str, payload: Callable[[], dict[str, Any]]) -> None:
        """Call `event` on every callback that has it; the payload is built only if one does."""
        listening = [callback for callback in self.callback_handler.callbacks if hasattr(callback, event)]
        arguments = payload() if listening else {}
        for callback in listening:
            getattr(callback, event)(
                args=self.args,
                state=self.state,
                control=self.control,
                model=self.model,
                processing_class=self.processing_class,
                **arguments,
            )

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_own_state(self, folder: str) -> None:
        self.objective.save(folder, self.model_wrapped, self._pending_batch())

    def load_own_state(self, folder: str, same_ranks: bool) -> None:
        # With another world size each rank has other rows, so the batch is rolled out again.
        self.current_batch = self.objective.load(folder, self.model_wrapped, with_batch=same_ranks)
        self.is_resumed = True

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.rollouts.weights_changed()

    def load_own_weights(self, folder: str) -> None:
        self.objective.load_weights(folder, self.model_wrapped)


class _StepEvents(TrainerCallback):
    """Callback for the parts of a step that transformers has no method for."""

    def __init__(self, trainer: StepTrainer):
        self.trainer = trainer
        self.timing = ExitStack()

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.timing = ExitStack()  # an earlier run may have ended within a step
        self.trainer._engine_ready()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timing.enter_context(self.trainer.meters["train"].phase("optimizer"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timing.close()

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.needs_inputs = False
        self.trainer.rollouts.weights_changed()
        if not self.trainer.guard.skipped:
            self.trainer.objective.after_step(self.trainer.model_wrapped, state.global_step)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # what was learned since the last log line
