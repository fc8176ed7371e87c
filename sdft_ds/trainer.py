"""SDFTTrainer: joins the stages and owns none of them; transformers.Trainer is the loop.

Once per generation batch: prompts -> rollouts -> pairing -> teacher's pass. Once per optimizer step: each token's
share in the loss. Once per micro-batch: the student's forward, the loss in chunks, backward.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from sdft_ds import config_checks, inherited, model_card, models, ranks, run_state, teacher, zero
from sdft_ds.aggregation import Shares, shares
from sdft_ds.chunked_loss import LossTerms
from sdft_ds.completion_head import DistillationLoss, RequestForward, causal_lm_of
from sdft_ds.completion_log import CompletionLog
from sdft_ds.config import SDFTConfig
from sdft_ds.evaluation_loader import EvaluationBatches
from sdft_ds.generation_batch import GenerationBatches
from sdft_ds.inspection import evenly_spaced
from sdft_ds.metrics import Meters
from sdft_ds.module_state import settings_kept
from sdft_ds.packing import packing_for
from sdft_ds.progress import LogLines, TimeReport, TrainingProgress
from sdft_ds.resumable import ResumableTrainer
from sdft_ds.rollouts import Sampler
from sdft_ds.run_record import RunRecord
from sdft_ds.run_state import GenerationBatch
from sdft_ds.schedule import MicroBatch, Schedule, data_loader, evaluation_batches, for_generation_batches
from sdft_ds.scoring import Scored
from sdft_ds.screening import usable_rows
from sdft_ds.step_guard import StepGuard
from sdft_ds.streams import Stream


class SDFTTrainer(ResumableTrainer):
    """Trains a model to answer without its privileged context as it answers with it.

    Arguments are those of TRL's SDFTTrainer: a model by name or as an object (plain or PEFT), an SDFTConfig, data sets
    with the columns `prompt` and `privileged_context`, a tokenizer or processor (by default the model's own),
    callbacks, optimizers, and a PEFT configuration for a fresh adapter. Raises ValueError, naming field or row and the
    remedy, for what cannot be trained.
    """

    batches_from = GenerationBatches

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SDFTConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: PeftConfig | None = None,
        **others: Any,
    ):
        inherited.refuse_arguments(others)
        args = SDFTConfig() if args is None else args
        if not isinstance(args, SDFTConfig):
            raise TypeError(f"SDFTTrainer needs an SDFTConfig, which takes the settings of {type(args).__name__}.")
        args = zero.own_settings(args)
        # Before anything random: weights that no file holds, the adapter.
        set_seed(args.seed)
        models.refuse_second_adapter(model, peft_config, args)
        config = models.config_of(model, args)
        models.check_attention(config, args)
        models.check_support(config, args)
        models.warn_of_router_loss(config)
        processing_class, tokenizer = models.load_tokenizer(processing_class, config._name_or_path, args)
        prompts = models.prompt_builder(tokenizer, config, args)
        # All that can be wrong with the data shows before the weights are loaded.
        bad_rows = args.bad_rows_policy
        if isinstance(train_dataset, IterableDataset):
            if args.max_steps <= 0:
                raise ValueError("train_dataset is a stream, which has no length: set max_steps.")
            train_dataset = Stream(train_dataset, prompts, bad_rows)
        elif train_dataset is not None:
            train_dataset = usable_rows(train_dataset, "train_dataset", prompts, bad_rows)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: usable_rows(rows, name, prompts, bad_rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = usable_rows(eval_dataset, "eval_dataset", prompts, bad_rows)
        model = models.load_model(model, args, peft_config)
        models.check_embedding(tokenizer, model)
        if train_dataset is not None:
            models.refuse_without_trainable(model)
        models.keep_quantized_layout(model)
        models.warn_without_masters(model, args)
        config = causal_lm_of(model).config
        given = {name: vars(config)[name] for name in ("use_cache",) if name in vars(config)}
        self.current_batch: GenerationBatch | None = None
        self.step_inputs: list[dict[str, Any]] = []  # what get_batch_samples gave out last
        self.teacher_started = False
        self.timed_engine: nn.Module | None = None
        self.optimizer_is_given = optimizers[0] is not None
        self.is_prepared = False
        self.task_figures: Callable[[], dict[str, float]] = dict  # for an evaluation's metrics; see TaskEvaluation

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        vars(config).update(given)  # transformers has set it; every forward here says whether it wants a cache
        self.process_state = zero.ProcessState(args, self.accelerator)
        self.request_forward = RequestForward(model)
        with self.prepared():
            pass  # raises where the loss cannot be computed with the model's head
        # Every loss is normalised over the whole optimizer step already.
        self.loss_is_scaled_for_ga = True
        self.model_accepts_loss_kwargs = False
        self.meters = {
            mode: Meters(ranks.reduce, args.device, self.say_phase, ranks.index(), ranks.count(), mode == "train")
            for mode in ("train", "eval")
        }
        self.teacher = teacher.make(model, args)
        if args.save_teacher and not self.teacher.has_state:
            raise ValueError(f"save_teacher: a {args.teacher_model_kind} teacher has no weights of its own here.")
        if args.load_best_model_at_end and args.save_only_model and self.teacher.has_state:
            raise ValueError(
                f"load_best_model_at_end loads the best checkpoint's {args.teacher_model_kind} teacher, too, which "
                "save_only_model leaves out: set save_only_model=False."
            )
        self.guard = StepGuard(self.meters["train"], args.max_nonfinite_steps)
        self.add_callback(self.guard)
        self.add_callback(_AfterStep(self))
        self.add_callback(TimeReport)
        self.completion_log = CompletionLog(args, tokenizer, ranks.index() == 0)
        self.add_callback(self.completion_log)
        self.run_record = RunRecord(args.method, models.name_of(model))
        self.add_callback(self.run_record)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(TrainingProgress)
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLines)
        self.generation_batches = self.batches_from(
            args=args,
            accelerator=self.accelerator,
            model=self.model,
            engine=lambda: self.model_wrapped,
            tokenizer=tokenizer,
            prompts=prompts,
            sampler=Sampler(
                args.generation_options,
                models.stop_token_ids(model, tokenizer),
                tokenizer.pad_token_id,
                args.seed,
                args.rollout_backend,
                args.rollout_batch_tokens,
            ),
            teacher=self.teacher,
            packing=packing_for(causal_lm_of(model), args.padding_free),
            dispatch=self._dispatch,
        )
        self.generation_batches.sampler.on_wait = lambda: self.say_phase("waiting after the rollout")

    # ---- runs -------------------------------------------------------------------------------------------------------

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, the model computes as in training: it answers requests, and its dropout is off. Afterwards it is as
        its owner left it, but for its weights. Entered again inside, nothing changes."""
        if self.is_prepared:
            yield
            return
        causal_lm = causal_lm_of(self.model)
        self.is_prepared = True
        try:
            with self.process_state.entered(), settings_kept(self.model):
                zero.refuse_sharded(self.model, self.accelerator)
                if self.args.disable_dropout:
                    models.disable_dropout(self.model)
                with self.request_forward:
                    yield
        finally:
            self.is_prepared = self.is_in_train = False
            zero.hold(causal_lm, self.model_wrapped)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """As ResumableTrainer does; a run that ended then gets its page. Called again, it is a new run from the
        weights as they are now: its teacher, optimizer and schedule start anew."""
        with self.prepared():
            result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.is_world_process_zero():
            self.run_record.write_page(self.args)
        return result

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._forget_earlier_runs()
        return super()._inner_training_loop(*args, **kwargs)

    def _forget_earlier_runs(self) -> None:
        """From a run or an evaluation before it, also another trainer's, a run takes over nothing but the weights."""
        set_seed(self.args.seed)
        zero.release(causal_lm_of(self.model))
        self.request_forward.renew()
        self.model_wrapped, self.deepspeed = self.model, None
        if not self.optimizer_is_given:
            self.optimizer = None
        self._forget_last_step()
        self.teacher_started = self.generation_batches.head_checked = False
        self.steps_at_last_log = 0
        self.completion_log.taken.clear()
        for meters in self.meters.values():
            meters.reset()
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags([self.args.method])

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """One item for each micro-batch of this rank; the rows are read when their generation batch is made."""
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
            "seed": args.seed if args.data_seed is None else args.data_seed,
        }
        if isinstance(self.train_dataset, Stream):  # one epoch of as many rows as the steps need, as they come
            micro_batches = args.max_steps * args.gradient_accumulation_steps
            schedule = for_generation_batches(-(-micro_batches // args.generate_every), **shape)
        else:
            schedule = Schedule(len(self.train_dataset), shuffle=args.shuffle_dataset, **shape)
        return data_loader(schedule)

    # ---- the optimizer step -----------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, rolled out, paired and scored, with each token's share in the loss.

        Generation batches that are due are made here, before any forward of the step.
        """
        with self.prepared():
            return self._micro_batches(epoch_iterator, num_batches), None

    def _micro_batches(self, epoch_iterator: Iterator[MicroBatch], num_batches: int) -> list[dict[str, Any]]:
        if not self.teacher_started:
            self.teacher.start(self.model_wrapped)
            self.teacher_started = True
        if self.timed_engine is not self.model_wrapped:
            zero.around_optimizer_step(self.model_wrapped, lambda: self.meters["train"].phase("optimizer"))
            self.timed_engine = self.model_wrapped
        scored = []
        for _ in range(num_batches):
            item = next(epoch_iterator)
            if self.current_batch is None or self.current_batch.number != item.generation_batch:
                if not scored:
                    self._forget_last_step()
                self.current_batch = GenerationBatch(item.generation_batch, self._make_generation_batch(item))
                if not scored:
                    self.leave_if_preempted()
            scored.append(self.current_batch.scored[item.number])
            self.current_batch.uses += 1
        self.step_inputs = self._with_shares(scored)
        return self.step_inputs

    def _forget_last_step(self) -> None:
        """transformers' loop still holds the last step's inputs: empty them, or two teacher heads are in memory."""
        self.current_batch = None
        for inputs in self.step_inputs:
            inputs.clear()

    def _make_generation_batch(self, item: MicroBatch) -> list[Scored]:
        scored = self.generation_batches.make(
            self.train_dataset,
            item.slots,
            self._train_batch_size,
            f"train/{item.generation_batch}",
            self.meters["train"],
            head_changes=self.args.generate_every > self.args.gradient_accumulation_steps,
            batches_per_step=self.args.reordered_batches,
            keep_on=self._keep_states_on,
        )
        self._dispatch(
            "on_generation_batch_built",
            lambda: {
                "generate_every": self.args.generate_every,
                "steps_per_generation": self.args.steps_per_generation,
            },
        )
        return scored

    def _with_shares(self, scored: list[Scored]) -> list[dict[str, Any]]:
        of_step = shares(
            [s.batch for s in scored],
            self.args.loss_type,
            self.args.max_completion_length,
            self.args.world_size,
            lambda tensor: ranks.reduce(tensor, "sum"),
        )
        # transformers looks for the model's inputs in a mapping, to count tokens and operations.
        return [
            {**s.batch.student.inputs, "scored": s, "shares": share} for s, share in zip(scored, of_step, strict=True)
        ]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.meters["train"].phase("student"):
            return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        self.guard.before_step(model, None if norm is None else float(norm))
        return norm

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss of one micro-batch; its forward is the student's, and the head computes the loss inside it."""
        if return_outputs:
            raise ValueError("SDFTTrainer computes no outputs beside the loss: logits are never in memory.")
        scored: Scored = inputs["scored"]
        request = self.loss_request(scored, inputs["shares"])
        training = self.model.training  # an engine's own flag does not follow its model's
        looked_at = self.look_at(request, scored) if training else []
        with self.prepared():
            loss = model(**scored.batch.student.inputs, request=request)
        self.record(request, scored, looked_at, self.meters["train" if training else "eval"])
        # A product, also by 1: at ZeRO stage 0 DeepSpeed divides the gradient of what its forward returned, if exactly
        # that tensor is given to its backward, by the accumulation steps once more.
        return loss * self.args.distillation_weight

    def loss_request(self, scored: Scored, share: Shares) -> DistillationLoss:
        """What the student's forward is asked for: the loss of a micro-batch, and the divergence of each token."""
        return DistillationLoss(
            positions_N=scored.batch.student.positions_N,
            terms=LossTerms(
                divergence=self.args.divergence,
                teacher_hidden_ND=scored.teacher_hidden_ND.to(self.args.device),
                teacher_head=scored.teacher_head,
                tokens_N=scored.batch.tokens_N,
                weights_N=share.weights_N,
                old_log_probs_N=scored.old_log_probs_N,
                is_clip=self.args.distillation_is_clip,
            ),
            scale=share.scale,
            chunk_tokens=self.args.loss_chunk_tokens,
        )

    def look_at(self, request: DistillationLoss, scored: Scored) -> list[int]:
        """Let the request see a sample of the tokens, and after it all of the rows that are returned, which are to be
        shown."""
        at_M = evenly_spaced(len(scored.batch.tokens_N), self.args.inspect_tokens, self.args.device)
        rows = self.completion_log.wanted(self.state.global_step + 1, scored)
        if rows:  # to look for their tokens waits for the device
            at_M = torch.cat([at_M, self.completion_log.tokens_of(rows, scored)])
        request.inspect_M = at_M if len(at_M) else None
        return rows

    def record(self, request: DistillationLoss, scored: Scored, rows: list[int], meters: Meters) -> None:
        """Add to the metrics what the forward found, and keep the rows that are to be shown."""
        meters.add_divergences(request.per_token_N, scored.batch.offsets_N)
        if request.seen is None:
            return
        sampled = min(len(scored.batch.tokens_N), self.args.inspect_tokens)
        sample_M, shown_M = request.inspect_M[:sampled], request.inspect_M[sampled:]
        if rows:
            step, seen = self.state.global_step + 1, request.seen[sampled:]
            self.completion_log.take(step, rows, scored, request.per_token_N[shown_M], seen)
        old_M = None if scored.old_log_probs_N is None else scored.old_log_probs_N[sample_M]
        meters.add_two_sides(request.seen[:sampled], old_M, self.args.distillation_is_clip)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_own_state(self, folder: str) -> None:
        run_state.save_teacher(folder, self.teacher, self.model_wrapped)
        batch = self.current_batch
        if batch is not None and batch.uses < self.args.generate_every:
            run_state.save_generation_batch(folder, batch)

    def load_own_state(self, folder: str, same_ranks: bool) -> None:
        self.load_own_weights(folder)
        self.teacher_started = True
        if same_ranks:  # else each rank has other rows, and rolls the batch out anew
            self.current_batch = run_state.load_generation_batch(
                folder, self.generation_batches.pair, self.args.device, self._keep_states_on
            )

    def load_own_weights(self, folder: str) -> None:
        run_state.load_teacher(folder, self.teacher, self.model_wrapped)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers does. Every rank calls it."""
        with self.prepared():
            super().save_model(output_dir, _internal_call)

    def save_teacher(self, output_dir: str) -> None:
        """Save the teacher as `save_model` saves the student: a model, or an adapter. Every rank calls it.

        Raises ValueError for a teacher that is the student (live), or the model under its adapters (base with PEFT).
        """
        if not self.teacher.has_state:
            raise ValueError(
                f"A {self.args.teacher_model_kind} teacher without weights of its own cannot be saved: it is "
                f"{'the student' if self.args.teacher_model_kind == 'live' else 'the model without its adapter'}."
            )
        with self.teacher.weights(self.model_wrapped):
            self.save_model(output_dir, _internal_call=True)

    @property
    def _keep_states_on(self) -> torch.device:
        return torch.device("cpu") if self.args.teacher_states_device == "cpu" else self.args.device

    # ---- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As transformers does, also before any training, under every stage of ZeRO."""
        if zero.was_released(self.model_wrapped):
            raise ValueError(
                "This trainer's DeepSpeed engine ended when another trainer began to train its model: evaluate before "
                "that, or with the trainer that trained last."
            )
        with self.prepared():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises ValueError: there are no logits to return."""
        raise ValueError(
            "predict() would return logits, which are never in memory here: use evaluate() for the loss and the "
            "metrics, or generate with the trained model."
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> EvaluationBatches:
        """All batches of this rank, made when the loop asks for the first: one swap of weights per evaluation."""
        if isinstance(eval_dataset, str):
            named = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if eval_dataset not in named:
                raise ValueError(
                    f"There is no evaluation set {eval_dataset!r}; there are {', '.join(named) or 'none'}."
                )
            eval_dataset = named[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
            if eval_dataset is None:
                raise ValueError("evaluate() needs rows: give an eval_dataset to it, or to the trainer.")
        else:
            prompts = self.generation_batches.prompts
            eval_dataset = usable_rows(eval_dataset, "eval_dataset", prompts, self.args.bad_rows_policy)
        args = self.args
        slots = evaluation_batches(
            len(eval_dataset),
            args.per_device_eval_batch_size,
            args.process_index,
            args.world_size,
            args.num_generations_eval or args.num_generations,
        )

        def make() -> list[dict[str, Any]]:
            # No head changes meanwhile; the hidden states of a whole data set wait in host memory.
            scored = self.generation_batches.make(
                eval_dataset,
                tuple(slot for batch in slots for slot in batch),
                args.per_device_eval_batch_size,
                "eval",
                self.meters["eval"],
                head_changes=False,
                keep_on=torch.device("cpu"),
            )
            return self._with_shares(scored)

        return EvaluationBatches(eval_dataset, len(slots), make)

    def evaluation_loop(
        self, dataloader: EvaluationBatches, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As transformers does, of one data set; every metric stands beside its loss, under the same prefix."""
        meters = self.meters["eval"]
        meters.reset()
        output = self._evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics.update({f"{metric_key_prefix}_{name}": v for name, v in meters.collect(steps=1).items()})
        if metric_key_prefix.partition("_")[0] == "eval":
            output.metrics.update({f"eval_{name}": value for name, value in self.task_figures().items()})
        return output

    def _evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Before training there is no engine. transformers makes one at stage 3; below, each rank has all weights, and
        evaluates with the model itself."""
        stage = zero.configured_stage(self.accelerator)
        if stage is None or self.deepspeed is not None:
            return super().evaluation_loop(*args, **kwargs)
        if stage == 3:
            zero.release(causal_lm_of(self.model))
            with zero.config_kept(self.accelerator):
                return super().evaluation_loop(*args, **kwargs)
        self.is_deepspeed_enabled = False
        try:
            with zero.engine_precision(self.accelerator, self.model):
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.is_deepspeed_enabled = True

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of one batch, scaled so that the mean over batches and ranks is the evaluation's loss."""
        with (
            torch.no_grad(),
            self.meters["eval"].phase("student"),
            zero.scoring_pass(model) as forward,
            self.compute_loss_context_manager(),
        ):
            loss = self.compute_loss(forward, inputs) * inputs["batches"]
        return loss.detach(), None, None

    # ---- reporting --------------------------------------------------------------------------------------------------

    def create_model_card(self, model_name: str | None = None, **about: Any) -> None:
        """Write OUTPUT_DIR/README.md on the first rank. about: dataset and finetuned_from, hub ids or paths; recipe,
        tags, license, language. `push_to_hub` calls it, and hands on what it is given."""
        if self.is_world_process_zero():
            facts = model_card.Facts(
                model_name=model_name or Path(self.args.hub_model_id or os.path.abspath(self.args.output_dir)).name,
                args=self.args,
                log=self.state.log_history,
                steps=self.state.global_step,
                rows=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
                adapter=hasattr(self.model, "peft_config"),
                **{"finetuned_from": causal_lm_of(self.model).config._name_or_path, **about},
            )
            Path(self.args.output_dir, "README.md").write_text(model_card.render(facts), encoding="utf-8")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Join the training metrics of all ranks into each line about its loss."""
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself, which leaves nan where it was nan
            steps = self.state.global_step - self.steps_at_last_log
            self.steps_at_last_log = self.state.global_step
            drift = self.teacher.drift(self.model_wrapped)
            if drift is not None:
                self.meters["train"].add("teacher/distance", *drift)
            logs.update(self.meters["train"].collect(steps))
            if self.meters["train"].straggler is not None:
                self._tell(f"Up to step {self.state.global_step} {self.meters['train'].straggler}.")
        super().log(logs, start_time)

    def _dispatch(self, event: str, payload: Callable[[], dict[str, Any]]) -> None:
        """Call `event` on every callback that has it; the payload is made only if one does."""
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


class _AfterStep(TrainerCallback):
    """Lets the teacher follow the student after each optimizer step that was made, and takes the step's time."""

    def __init__(self, trainer: SDFTTrainer):
        self.trainer = trainer
        self.timing = ExitStack()

    def on_train_begin(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        config_checks.warn_of_still_teacher(args, state.max_steps)
        self.timing = ExitStack()  # an earlier run may have ended within a step

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timing.enter_context(self.trainer.meters["train"].phase("optimizer"))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.timing.close()

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer.guard.skipped:
            self.trainer.teacher.after_step(self.trainer.model_wrapped, state.global_step)
