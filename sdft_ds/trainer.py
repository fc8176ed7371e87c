"""SDFTTrainer, SDPOTrainer and SFTTrainer: constructor and wiring.

objectives/ defines what a method computes, loop/step.py the order of a step, and transformers.Trainer the loop.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProcessorMixin,
    ProgressCallback,
    TrainerCallback,
)

from sdft_ds import model_card, report
from sdft_ds.config import inherited
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.config.sdpo_config import SDPOConfig
from sdft_ds.config.sft_config import SFTConfig
from sdft_ds.distributed import launch
from sdft_ds.loop.step import StepTrainer
from sdft_ds.metrics.progress import LogLines, TimeReport, TrainingProgress, warnings_below_bars
from sdft_ds.metrics.run_writer import RunWriter
from sdft_ds.model import loading, setup
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.model.packing import packing_for
from sdft_ds.objectives.feedback import ContextFn, RewardFn
from sdft_ds.objectives.protocol import Objective, RunParts
from sdft_ds.objectives.sdft import SelfDistillation
from sdft_ds.objectives.sdpo import SelfDistilledPolicyOptimization
from sdft_ds.objectives.sft import SupervisedFineTuning
from sdft_ds.rollouts import factory
from sdft_ds.rollouts.engine import RolloutEngine
from sdft_ds.teacher import Teacher


class MethodTrainer(StepTrainer):
    """Base trainer of a method; subclasses set the objective and config classes.

    Arguments are those of TRL's SDFTTrainer: a model by name or as an object (plain or PEFT), a configuration, data
    sets with the columns `prompt` and `privileged_context`, a tokenizer or processor (by default the model's own),
    callbacks, optimizers, a PEFT configuration for a new adapter, and anchors: rows with the column `prompt`, on which
    the student is held to the model at the start (SFT: with `golden_response` as well, which is replayed), and
    privileged_context_fn(prompts, completions, rows), which returns the contexts made after the rollout: docs/sdpo.md.
    Raises ValueError, naming field or row and the fix, for what cannot be trained.
    """

    reward_funcs: Sequence[RewardFn] = ()
    objective_class: ClassVar[type[Objective]]
    config_class: ClassVar[type[SDFTConfig]] = SDFTConfig

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
        anchor_dataset: Dataset | None = None,
        privileged_context_fn: ContextFn | None = None,
        **others: Any,
    ):
        inherited.refuse_arguments(others)
        args = launch.own_settings(self._checked(args))
        if privileged_context_fn is not None and not self.objective_class.takes_contexts:
            raise ValueError(f"privileged_context_fn has no effect with {type(self).__name__}: it rolls nothing out.")
        self.privileged_context_fn = privileged_context_fn
        context_optional = self.objective_class.makes_contexts or privileged_context_fn is not None
        parts = setup.prepare(
            model, args, train_dataset, eval_dataset, processing_class, peft_config, anchor_dataset, context_optional
        )
        config = causal_lm_of(parts.model).config
        given = {name: vars(config)[name] for name in ("use_cache",) if name in vars(config)}
        super().__init__(
            model=parts.model,
            args=args,
            train_dataset=parts.train_dataset,
            eval_dataset=parts.eval_dataset,
            processing_class=parts.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        vars(config).update(given)  # undo transformers' change; every forward here specifies use_cache itself
        with self.prepared():
            pass  # raises if the loss cannot be computed with the model's head
        self.prompts = parts.prompts
        self.anchor_dataset = parts.anchor_dataset
        self.rollouts = self._rollouts(parts.tokenizer)
        self.objective = self.objective_class(self._run_parts(parts.tokenizer))
        run_writer = RunWriter(args.method, loading.name_of(parts.model))
        for callback in (TimeReport, *self.objective.callbacks, run_writer):
            self.add_callback(callback)
        if self.pop_callback(PrinterCallback) is not None:
            self.add_callback(LogLines)
        self.progress = TrainingProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.callback_handler.callbacks.insert(0, self.progress)

    def _checked(self, args: SDFTConfig | None) -> SDFTConfig:
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"{type(self).__name__} needs an {self.config_class.__name__}, which takes the settings of "
                f"{type(args).__name__}."
            )
        return args

    def _rollouts(self, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
        rollouts = factory.make(self.args, self.model, lambda: self.model_wrapped, self.accelerator, tokenizer)
        rollouts.on_wait = lambda: self.say_phase("waiting after the rollout")
        return rollouts

    def _run_parts(self, tokenizer: PreTrainedTokenizerBase) -> RunParts:
        return RunParts(
            args=self.args,
            model=self.model,
            engine=lambda: self.model_wrapped,
            tokenizer=tokenizer,
            prompts=self.prompts,
            anchors=self.anchor_dataset,
            rollouts=self.rollouts,
            packing=packing_for(causal_lm_of(self.model), self.args.padding_free, self.args.device),
            compute_dtype=self.args.compute_dtype,
            dispatch=self.dispatch,
            state=lambda: self.state,
            context_fn=self.privileged_context_fn,
            reward_funcs=self.reward_funcs,
        )

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as in transformers. resume_from_checkpoint: True for the newest complete checkpoint in output_dir, or
        from scratch if there is none; or a checkpoint folder, which must be complete.

        Writes the report page at the end. Another call starts a new run from the current weights. Raises what
        ResumableTrainer.train raises.
        """
        try:
            with warnings_below_bars():
                result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        except BaseException:
            self.progress.close()
            self.rollouts.abandon()
            raise
        self.rollouts.close()
        if self.is_world_process_zero():
            self._write_page()
        return result

    def _write_page(self) -> None:
        """Write the report; called after all callbacks have written their files."""
        try:
            report.write(self.args.output_dir)
        except Exception as error:  # a failed report must not prevent saving the weights, which comes next
            warnings.warn(f"The report was not written: {type(error).__name__}: {error}", stacklevel=2)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] = (), **about: Any
    ) -> None:
        """Write OUTPUT_DIR/README.md on rank 0. dataset_name: TRL's name of `dataset`. about: dataset and
        finetuned_from (hub ids or paths), recipe, license, language. Called by `push_to_hub`, which passes on its own
        arguments."""
        if self.is_world_process_zero():
            facts = model_card.Facts(
                model_name=model_name or Path(self.args.hub_model_id or os.path.abspath(self.args.output_dir)).name,
                method=self.objective_class.description,
                args=self.args,
                log=self.state.log_history,
                steps=self.state.global_step,
                rows=len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
                adapter=hasattr(self.model, "peft_config"),
                tags=[tags] if isinstance(tags, str) else tags,
                **{
                    "finetuned_from": causal_lm_of(self.model).config._name_or_path,
                    "dataset": dataset_name,
                    **about,
                },
            )
            Path(self.args.output_dir, "README.md").write_text(model_card.render(facts), encoding="utf-8")


class SDFTTrainer(MethodTrainer):
    """Trains a model to answer without the privileged context as it does with it. Arguments: see MethodTrainer."""

    objective_class = SelfDistillation
    objective: SelfDistillation

    @property
    def teacher(self) -> Teacher:
        return self.objective.teacher

    def save_teacher(self, output_dir: str) -> None:
        """Save the teacher as `save_model` saves the student: a model, or an adapter. Collective.

        Raises ValueError for a teacher that is the student (live), or the model without its adapter (base with PEFT).
        """
        if not self.teacher.has_state:
            raise ValueError(
                f"A {self.args.teacher_model_kind} teacher without weights of its own cannot be saved: it is "
                f"{'the student' if self.args.teacher_model_kind == 'live' else 'the model without its adapter'}."
            )
        with self.teacher.weights(self.model_wrapped):
            self.save_model(output_dir, _internal_call=True)


class SDPOTrainer(SDFTTrainer):
    """Trains a model to answer as it does when it also sees an answer of its own that was rewarded.

    Arguments: those of TRL's SDPOTrainer and of MethodTrainer; reward_funcs: one function or several, called as
    function(prompts=, completions=, completion_ids=, trainer_state=, **columns of the rows) with lists, which return a
    number or None for each completion. The column `privileged_context`, or privileged_context_fn, is feedback.
    """

    objective_class = SelfDistilledPolicyOptimization
    config_class = SDPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: RewardFn | Sequence[RewardFn] | None = None,
        args: SDPOConfig | None = None,
        *arguments: Any,
        **options: Any,
    ):
        functions = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or [])
        for function in functions:
            if not callable(function) or isinstance(function, nn.Module):
                raise ValueError(
                    f"reward_funcs must be functions, not {type(function).__name__}: for a reward model give one that "
                    "calls it, and on the command line --reward takes names."
                )
        if not functions:
            raise ValueError("SDPO scores completions: give reward_funcs (command line: --reward).")
        self.reward_funcs = functions
        super().__init__(model, args, *arguments, **options)


class SFTTrainer(MethodTrainer):
    """Trains a model on the demonstrations themselves. Arguments: see MethodTrainer, with an SFTConfig as `args`."""

    objective_class = SupervisedFineTuning
    config_class = SFTConfig


# method -> its trainer; the choices of --method
TRAINERS: dict[str, type[MethodTrainer]] = {
    trainer.config_class.method: trainer for trainer in (SDFTTrainer, SDPOTrainer, SFTTrainer)
}
