"""transformers' Trainer with atomic checkpoints, exact resume, and preemption."""

import logging
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging as hf_logging

from sdft_ds.checkpoint import output_dir, resume_settings, storage
from sdft_ds.checkpoint.output_dir import locked
from sdft_ds.checkpoint.preemption import Preemption
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.distributed import engines, launch, ranks
from sdft_ds.distributed.launch import Sharding
from sdft_ds.distributed.watchdog import StragglerWatchdog
from sdft_ds.loop.hub_upload import UploadingTrainer
from sdft_ds.model.completion_forward import causal_lm_of
from sdft_ds.objectives.feedback import FeedbackError


class ResumableTrainer(UploadingTrainer):
    """A trainer that can be killed at any point and resumed as if uninterrupted. anchor_dataset: see RunParts; set by
    the subclasses."""

    args: SDFTConfig
    anchor_dataset: Dataset | None = None

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.own_optimizer = self.optimizer is None  # created from the settings, not passed to the trainer
        self.trained = resume_settings.trained_by(self.model)
        self.run_id: str | None = None
        self.saved_step: int | None = None  # step of the last checkpoint that this process wrote or resumed from
        self.steps_at_last_log = 0
        self.same_ranks = True
        self.forgets_best = False  # whether the best checkpoint so far was chosen by another metric
        self.saving_checkpoint = False
        self.is_inside_step = False  # whether a checkpoint of the last step could not be saved now
        self.preemption = Preemption(
            self.args.output_dir,
            self.args.preemption_exit_code,
            self.args.preemption_deadline_seconds,
            self.args.device,
        )
        self.watchdog = StragglerWatchdog(self.args.ddp_timeout)
        self.add_callback(_LeaveAfterStep(self))

    @property
    def trained_weights(self) -> int:
        """How many weights are trained."""
        return self.trained["trained weights"]

    @abstractmethod
    def save_own_state(self, folder: str) -> None:
        """Write what a resume needs in addition to transformers' and DeepSpeed's files. Collective."""

    @abstractmethod
    def load_own_state(self, folder: str, same_ranks: bool) -> None:
        """Load what `save_own_state` wrote. Called after the engine's weights and optimizer are loaded. same_ranks:
        whether the world size is that of the checkpoint."""

    @abstractmethod
    def load_own_weights(self, folder: str) -> None:
        """Load only the weights that an evaluation needs in addition to the model's."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as in transformers. resume_from_checkpoint: True for the newest complete checkpoint in output_dir, or
        from scratch if there is none; or a checkpoint folder, which must be complete.

        A finished run returns immediately, in the state in which it finished: model, last evaluation and page.

        Raises CannotResume (DamagedCheckpoint if it names a file), OutputFolderInUse, FeedbackError after saving the
        last step, and, after a preemption, the SystemExit Preempted.
        """
        self.saved_step, self.same_ranks = None, True
        with locked(self.args.output_dir), self.preemption, self.watchdog:
            self.saved_step, self.same_ranks, self.forgets_best = None, True, False
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            self._take_folder(folder, may_pass_over=bool(resume_from_checkpoint))
            if folder is not None:
                self._check_settings(folder)
                self.saved_step = storage.step_in(self.args.output_dir, folder)
            self.is_inside_step = False
            try:
                result = super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
            except FeedbackError:
                self._save_before_error()
                raise
            if self.preemption.agreed:
                self._leave()
        return result

    def leave_if_preempted(self) -> None:
        """Save and exit now, between two optimizer steps, if preemption was requested on any rank. Collective."""
        if self.preemption.agree():
            self._save_last_step()
            self._leave()

    def _leave(self) -> None:
        self.preemption.leave(self.state.global_step, self._what_is_saved())

    def _save_before_error(self) -> None:
        """Where a function of the user's ends the run, which all ranks know. Collective."""
        if not self.is_inside_step:
            self._save_last_step()
            ranks.tell(self._what_is_saved())

    def _save_last_step(self) -> None:
        if self.state.global_step not in (0, self.saved_step):
            self._save_checkpoint(self.model_wrapped, None)

    def _what_is_saved(self) -> str:
        step, go_on = self.state.global_step, self.preemption.go_on
        if self.saved_step != step:
            return f"Nothing was saved, because no step was done. Start again: {go_on}"
        if self.args.save_only_model:
            return f"The model is in {self.args.output_dir}/checkpoint-{step}, without what a resume needs."
        return f"Saved {self.args.output_dir}/checkpoint-{step}. To go on: {go_on}"

    def say_phase(self, phase: str) -> None:
        """Publish to the watchdog the phase that this rank enters."""
        self.watchdog.enter(phase, self.state.global_step + 1)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted is not True:
            storage.require_complete(wanted)
            return Path(os.path.abspath(wanted))
        directory = self.args.output_dir
        folder, skipped = storage.newest_complete(directory, output_dir.run_of(directory))
        for wrong in skipped:
            ranks.tell(f"Skipped a checkpoint: {wrong}.")
        ranks.tell(f"Resuming from {folder}." if folder else f"No complete checkpoint in {directory}: "
                   "starting from the beginning.")  # fmt: skip
        return folder

    def _take_folder(self, folder: Path | None, may_pass_over: bool) -> None:
        """Continue the run of the checkpoint, or begin a new one in output_dir. may_pass_over: allow that although the
        folder holds other runs' checkpoints, because a resume was requested and found none to use."""
        directory = self.args.output_dir
        if folder is None:
            if not may_pass_over:
                output_dir.refuse_others(directory)
            self.run_id = output_dir.new_run()
        else:
            own = storage.step_in(directory, folder) is not None
            known = ranks.all_gather_objects(storage.run_of(folder))[0] or (
                output_dir.run_of(directory) if own else None
            )
            self.run_id = known or output_dir.new_run()
            if not own:
                output_dir.refuse_others(directory, self.run_id)
        if ranks.rank() == 0:
            moved = output_dir.begin(directory, self.run_id, fresh=folder is None)
            if moved is not None:
                told = f"The records of an earlier run in {directory} were moved to {moved}."
                if any(Path(directory).glob("*.safetensors")):
                    told += " At its end this run replaces that one's model: to keep it, stop now and move it."
                ranks.tell(told)

    def _check_settings(self, folder: Path) -> None:
        saved = resume_settings.load(folder)
        if saved is None:
            raise storage.DamagedCheckpoint(
                f"{folder} holds a model and nothing to resume from: it was saved with save_only_model."
            )
        self.same_ranks = saved["world_size"] == self.args.world_size
        if not self.same_ranks:
            self._keep_rows_of_a_step(saved["what makes a step"])
        different = resume_settings.compare(saved, self._settings(), self.own_optimizer, ranks.tell)
        self.forgets_best = bool({"metric_for_best_model", "greater_is_better"} & different.keys())
        there, here = self._shardings(saved)
        if not here.can_read(there):
            raise storage.CannotResume(
                f"{folder} was made {there}, and this run is {here}: the optimizer's state cannot be carried over. "
                f"Resume {there}, or start a new run from the model in that folder."
            )
        if here.differs_from(there):
            if not ranks.all_gather_objects((folder / storage.UNIVERSAL).exists())[0]:
                raise storage.CannotResume(
                    f"{folder} was made by {there.ranks} ranks {there}, and this run has {here.ranks} {here}. "
                    "Convert it first: "
                    f"python -m sdft_ds.checkpoint universal {folder}"
                )
            launch.load_universal(self.accelerator)

    def _shardings(self, saved: dict[str, Any]) -> tuple[Sharding, Sharding]:
        """Returns the shardings of (the checkpoint, this run)."""
        here = Sharding(launch.configured_stage(self.accelerator), self.args.world_size)
        return Sharding(saved["zero_stage"], saved["world_size"]), here

    def _keep_rows_of_a_step(self, saved: dict[str, Any]) -> None:
        try:
            self.args.keep_rows(saved["rows of an optimizer step"], saved["generation_batch_size"])
        except ValueError as error:
            raise storage.CannotResume(str(error)) from error
        steps = self.args.gradient_accumulation_steps
        launch.configure_accumulation(self.accelerator, steps)
        ranks.tell(
            "The checkpoint was made by another number of ranks. Each step has the same rows as there, with "
            f"gradient_accumulation_steps={steps} and steps_per_generation={self.args.steps_per_generation}."
        )

    def _settings(self) -> dict[str, Any]:
        datasets = {"data set": self.train_dataset, "anchors": self.anchor_dataset}
        rows = {name: len(each) if hasattr(each, "__len__") else None for name, each in datasets.items()}
        stage = launch.configured_stage(self.accelerator)
        name = causal_lm_of(self.model).config._name_or_path
        return resume_settings.settings_of(self.args, name, self.trained, rows, stage)

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        """The checkpoint's trainer state, except what the settings specify, which transformers restores as well."""
        with _silent_transformers():
            trained = super()._init_training_state(max_steps, *others)
        state = self.state
        state.compute_steps(self.args, max_steps)
        state.train_batch_size = self._train_batch_size
        if self.forgets_best:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.steps_at_last_log = state.global_step
        if state.global_step >= max_steps:
            name = "max_steps" if self.args.max_steps > 0 else "num_train_epochs"
            ranks.tell(f"All {max_steps} steps are done: nothing is left to train. Raise {name} to train on.")
        return trained

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Called by transformers once the optimizer is final, and before it loads a checkpoint."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # otherwise called for DeepSpeed's engine, which does not exist yet
            self.hyperparameters = resume_settings.hyperparameters(self.optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            engines.fix_universal_checkpoint(self.model_wrapped, checkpoint_dir)
            resume_settings.restore(self.optimizer, self.lr_scheduler, self.hyperparameters)
            self.load_own_state(checkpoint_dir, self.same_ranks)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Not of tied weights, which are saved under one of their names."""
        names: dict[int, list[str]] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(param), []).append(name)
        absent = set(load_result.missing_keys)
        saved = {name for tied in names.values() if not absent.issuperset(tied) for name in tied}
        missing = [name for name in load_result.missing_keys if name not in saved]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_best_model(self) -> None:
        """Also loads the objective's weights. If this run cannot load the best checkpoint, it keeps the last step's
        model and reports it."""
        folder = self.state.best_model_checkpoint
        saved = resume_settings.load(folder)
        if saved is not None and launch.is_configured(self.accelerator):
            there, here = self._shardings(saved)
            universal = here.differs_from(there)
            if universal and not ranks.all_gather_objects(Path(folder, storage.UNIVERSAL).exists())[0]:
                ranks.tell(
                    f"The best checkpoint, {folder}, was made by {there.ranks} ranks {there} and cannot be loaded "
                    "here: the model keeps the weights of the last step. The best ones are in that folder."
                )
                return
            engines.read_universal(self.model_wrapped, universal)
        super()._load_best_model()
        if saved is not None:  # otherwise saved with save_only_model
            self.load_own_weights(folder)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Trains nothing if all steps are done; transformers would train at least one step."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **options)
        else:
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Skips the summary of a resume without steps left, to keep the mean loss and runtime of the training."""
        if "train_runtime" not in logs or self.state.global_step > self._initial_global_step:
            super().log(logs, start_time)

    def _finalize_training(self, *arguments: Any) -> TrainOutput:
        """Disables save_total_limit: with 1, transformers would delete all checkpoints but the best one. The last one
        is needed to recognize a finished run."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*arguments)
        finally:
            self.args.save_total_limit = limit

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Replaces transformers' method, which rotates old checkpoints before the new one is complete."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder, step = self._get_output_dir(trial=trial), self.state.global_step
        best = self.state.best_global_step
        if best and ranks.all_gather_objects(best == step or Path(run_folder, f"checkpoint-{best}").exists())[0]:
            self.state.best_model_checkpoint = os.path.join(run_folder, f"checkpoint-{best}")
        with storage.writing(run_folder, step, self.run_id) as folder:
            self.saving_checkpoint = True
            self.save_model(folder, _internal_call=True)
            self.saving_checkpoint = False
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(folder)
                self._save_scaler(folder)
                self._save_rng_state(folder)
                self.save_own_state(folder)
                resume_settings.save(folder, self._settings())
            if self.args.should_save:
                self._export_callbacks()
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        self.saved_step = step
        final = os.path.join(run_folder, f"checkpoint-{step}")
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            storage.rotate(run_folder, self.run_id, self.args.save_total_limit, best)
        storage.reached("rotated")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers, but always with the unsharded weights: stage3_gather_16bit_weights_on_model_save applies
        to checkpoints only, which can be resumed without them."""
        with (
            _silent_transformers(),
            nullcontext() if self.saving_checkpoint else engines.gathered_on_save(self.model_wrapped),
        ):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Re-ties tied weights, which up to stage 2 arrive as a clone per name and would be written twice."""
        first: dict[int, str] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            if state_dict and name in state_dict:
                state_dict[name] = state_dict[first.setdefault(id(param), name)]
        super()._save(output_dir, state_dict)

    def _export_callbacks(self) -> None:
        """Store callback states as transformers does: a list if a class has several instances."""
        states: dict[str, list[dict]] = {}
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                states.setdefault(type(each).__name__, []).append(each.state())
        self.state.stateful_callbacks = {name: of[0] if len(of) == 1 else of for name, of in states.items()}


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Within the block transformers shows no progress bar of its own inside that of the training, and does not repeat
    which settings differ from the checkpoint's (resume_settings)."""
    comparison = logging.getLogger("transformers.trainer_utils")
    level = comparison.level
    comparison.setLevel(logging.ERROR)
    hook = hf_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        comparison.setLevel(level)
        hf_logging.set_tqdm_hook(hook)


class _LeaveAfterStep(TrainerCallback):
    """Checks for preemption after each optimizer step; if requested, the loop saves this step once and ends."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.preemption.agree():
            control.should_save = True
            control.should_training_stop = True
