"""transformers' Trainer with checkpoints that are complete or absent, resumes that are exact, and preemption."""

import os
from abc import abstractmethod
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput

from sdft_ds import checkpoint, output_folder, ranks, resume_settings, zero
from sdft_ds.config import SDFTConfig
from sdft_ds.hub_upload import UploadingTrainer
from sdft_ds.lookout import Lookout
from sdft_ds.output_folder import locked
from sdft_ds.preemption import Preemption


class ResumableTrainer(UploadingTrainer):
    """What a run needs to be killed anywhere and to go on as if it had not been."""

    args: SDFTConfig

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.own_optimizer = self.optimizer is None  # made from the settings, that is, not handed over
        self.trained_weights = sum(zero.full_shape(p).numel() for p in self.model.parameters() if p.requires_grad)
        self.run_id: str | None = None
        self.saved_step: int | None = None  # of the last checkpoint that this process wrote or resumed from
        self.steps_at_last_log = 0
        self.same_ranks = True
        self.forgets_best = False  # the checkpoint's best one was chosen by another metric
        self.saving_checkpoint = False
        self.preemption = Preemption(
            self.args.output_dir,
            self.args.preemption_exit_code,
            self.args.preemption_deadline_seconds,
            self.args.device,
        )
        self.lookout = Lookout(self.args.ddp_timeout)
        self.add_callback(_LeaveAfterStep(self))

    @abstractmethod
    def save_own_state(self, folder: str) -> None:
        """Write what a resume needs beside transformers' and DeepSpeed's files. Every rank is called."""

    @abstractmethod
    def load_own_state(self, folder: str, same_ranks: bool) -> None:
        """Read it back; the engine stands, its weights and optimizer are loaded. same_ranks: as many as saved it."""

    @abstractmethod
    def load_own_weights(self, folder: str) -> None:
        """Read back, of it, the weights that an evaluation needs beside the model's."""

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as transformers does. resume_from_checkpoint: True, from the newest complete checkpoint in output_dir,
        or from the start if there is none; or a folder, which must be complete.

        A run whose steps are all done ends at once, as it ended before: with its model, its last evaluation and page.

        Raises CannotResume (DamagedCheckpoint where it names a file), OutputFolderInUse, and Preempted, which leaves
        the program, after a signal was obeyed.
        """
        self.saved_step, self.same_ranks = None, True
        with locked(self.args.output_dir), self.preemption, self.lookout:
            self.saved_step, self.same_ranks, self.forgets_best = None, True, False
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
            self._take_folder(folder, may_pass_over=bool(resume_from_checkpoint))
            if folder is not None:
                self._check_settings(folder)
                self.saved_step = checkpoint.step_in(self.args.output_dir, folder)
            result = super().train(None if folder is None else str(folder), trial, ignore_keys_for_eval)
            if self.preemption.agreed:
                self.preemption.leave(self.state.global_step)
        return result

    def leave_if_preempted(self) -> None:
        """Save and go now, between two optimizer steps, if any rank was asked to. Every rank calls it."""
        if self.preemption.agree():
            if self.state.global_step not in (0, self.saved_step):
                self._save_checkpoint(self.model_wrapped, None)
            self.preemption.leave(self.state.global_step)

    def say_phase(self, phase: str) -> None:
        """This rank begins a phase of an optimizer step."""
        self.lookout.enter(phase, self.state.global_step + 1)

    def _tell(self, text: str) -> None:
        if ranks.index() == 0:
            print(f"sdft_ds: {text}", flush=True)

    # ---- resuming ---------------------------------------------------------------------------------------------------

    def _checkpoint_to_resume(self, wanted: str | bool | None) -> Path | None:
        if not wanted:
            return None
        if wanted is not True:
            checkpoint.require_complete(wanted)
            return Path(os.path.abspath(wanted))
        directory = self.args.output_dir
        folder, skipped = checkpoint.newest_complete(directory, output_folder.run_of(directory))
        for wrong in skipped:
            self._tell(f"Skipped a checkpoint: {wrong}.")
        self._tell(f"Resuming from {folder}." if folder else f"No complete checkpoint in {directory}: "
                   "starting from the beginning.")  # fmt: skip
        return folder

    def _take_folder(self, folder: Path | None, may_pass_over: bool) -> None:
        """Go on with the run of the checkpoint, or begin another one in output_dir; may_pass_over: also beside
        checkpoints of others, which a resume was told to look among."""
        directory = self.args.output_dir
        if folder is None:
            if not may_pass_over:
                output_folder.refuse_others(directory)
            self.run_id = output_folder.new_run()
        else:
            own = checkpoint.step_in(directory, folder) is not None
            known = ranks.gather(checkpoint.run_of(folder))[0] or (output_folder.run_of(directory) if own else None)
            self.run_id = known or output_folder.new_run()
            if not own:
                output_folder.refuse_others(directory, self.run_id)
        if ranks.index() == 0:
            moved = output_folder.begin(directory, self.run_id, fresh=folder is None)
            if moved is not None:
                self._tell(f"What an earlier run recorded in {directory} is now in {moved}.")

    def _check_settings(self, folder: Path) -> None:
        saved = resume_settings.load(folder)
        if saved is None:
            raise checkpoint.DamagedCheckpoint(
                f"{folder} holds a model and nothing to resume from: it was saved with save_only_model."
            )
        self.same_ranks = saved["world_size"] == self.args.world_size
        if not self.same_ranks:
            self._keep_rows_of_a_step(saved["what makes a step"])
        different = resume_settings.compare(saved, self._settings(), self.own_optimizer, self._tell)
        self.forgets_best = bool({"metric_for_best_model", "greater_is_better"} & different.keys())
        before, stage = saved["zero_stage"], zero.configured_stage(self.accelerator)
        if before != stage and {before, stage} != {1, 2}:
            there, here = (_with_deepspeed(each) for each in (before, stage))
            raise checkpoint.CannotResume(
                f"{folder} was made {there}, and this run is {here}: the optimizer's state cannot be carried over. "
                f"Resume {there}, or start a new run from the model in that folder."
            )
        if self._other_shards(saved):
            if not ranks.gather((folder / checkpoint.UNIVERSAL).exists())[0]:
                raise checkpoint.CannotResume(
                    f"{folder} was made by {saved['world_size']} ranks {_with_deepspeed(before)}, and this run has "
                    f"{self.args.world_size} {_with_deepspeed(stage)}. Convert it first: "
                    f"python -m sdft_ds.checkpoint universal {folder}"
                )
            zero.load_universal(self.accelerator)

    def _other_shards(self, saved: dict[str, Any]) -> bool:
        """Whether a checkpoint's optimizer is sharded in another way. At stage 0 every rank has all of it."""
        stage = zero.configured_stage(self.accelerator)
        return saved["zero_stage"] != stage or bool(stage and saved["world_size"] != self.args.world_size)

    def _keep_rows_of_a_step(self, saved: dict[str, Any]) -> None:
        try:
            self.args.keep_rows(saved["rows of an optimizer step"], saved["generation_batch_size"])
        except ValueError as error:
            raise checkpoint.CannotResume(str(error)) from error
        steps = self.args.gradient_accumulation_steps
        zero.configure_accumulation(self.accelerator, steps)
        self._tell(
            "The checkpoint was made by another number of ranks. Each step has the same rows as there, with "
            f"gradient_accumulation_steps={steps} and steps_per_generation={self.args.steps_per_generation}."
        )

    def _settings(self) -> dict[str, Any]:
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None
        stage = zero.configured_stage(self.accelerator)
        return resume_settings.settings_of(self.args, rows, self.trained_weights, stage)

    def _init_training_state(self, max_steps: int, *others: Any) -> tuple[int, int]:
        """The state of the checkpoint, but for what the settings say: transformers takes that from there as well."""
        trained = super()._init_training_state(max_steps, *others)
        state = self.state
        state.compute_steps(self.args, max_steps)
        state.train_batch_size = self._train_batch_size
        if self.forgets_best:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.steps_at_last_log = state.global_step
        if state.global_step >= max_steps:
            name = "max_steps" if self.args.max_steps > 0 else "num_train_epochs"
            self._tell(f"All {max_steps} steps are done: nothing is left to train. Raise {name} to train on.")
        return trained

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """transformers calls it when the optimizer is as it stays, and before it loads a checkpoint."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # else it is for DeepSpeed's engine, which is not made yet
            self.hyperparameters = resume_settings.hyperparameters(self.optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            zero.mend_universal(self.model_wrapped, checkpoint_dir)
            resume_settings.restore(self.optimizer, self.lr_scheduler, self.hyperparameters)
            self.load_own_state(checkpoint_dir, self.same_ranks)

    def _load_best_model(self) -> None:
        """With what else an evaluation needs; a best checkpoint that this run cannot read is no reason to lose it."""
        folder = self.state.best_model_checkpoint
        saved = resume_settings.load(folder)
        if saved is not None and zero.configured_stage(self.accelerator) is not None:
            universal = self._other_shards(saved)
            if universal and not ranks.gather(Path(folder, checkpoint.UNIVERSAL).exists())[0]:
                self._tell(
                    f"The best checkpoint, {folder}, was made by {saved['world_size']} ranks "
                    f"{_with_deepspeed(saved['zero_stage'])} and cannot be loaded here: the model stays as the last "
                    "step left it. The best one is in that folder."
                )
                return
            zero.read_universal(self.model_wrapped, universal)
        super()._load_best_model()
        if saved is not None:  # else it was saved with save_only_model
            self.load_own_weights(folder)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """transformers' trains one step at least, also where a finished run was started again."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **options)
        else:
            self.control.should_training_stop = True

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A start that had nothing left to train does not overwrite the mean loss and the time of those that had."""
        if "train_runtime" not in logs or self.state.global_step > self._initial_global_step:
            super().log(logs, start_time)

    def _finalize_training(self, *arguments: Any) -> TrainOutput:
        """With save_total_limit=1 transformers deletes the last checkpoint beside the best one, and whatever else is
        there. A finished run is known by its last one."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*arguments)
        finally:
            self.args.save_total_limit = limit

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of transformers': it rotates old checkpoints inside, before the new one is complete."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder, step = self._get_output_dir(trial=trial), self.state.global_step
        best = self.state.best_global_step
        if best and ranks.gather(best == step or Path(run_folder, f"checkpoint-{best}").exists())[0]:
            self.state.best_model_checkpoint = os.path.join(run_folder, f"checkpoint-{best}")
        with checkpoint.writing(run_folder, step, self.run_id) as folder:
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
            checkpoint.rotate(run_folder, self.run_id, self.args.save_total_limit, best)
        checkpoint.reached("rotated")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers does, with the whole weights in any case: stage3_gather_16bit_weights_on_model_save is about
        checkpoints, which can be resumed without."""
        with nullcontext() if self.saving_checkpoint else zero.gathered_on_save(self.model_wrapped):
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights that are tied in the model are one tensor again, or they would be written twice: up to stage 2 they
        come as clones of each name."""
        first: dict[int, str] = {}
        for name, param in self.model.named_parameters(remove_duplicate=False):
            if state_dict and name in state_dict:
                state_dict[name] = state_dict[first.setdefault(id(param), name)]
        super()._save(output_dir, state_dict)

    def _export_callbacks(self) -> None:
        """The states of callbacks that have one, as transformers keeps them: a list where a class has several."""
        states: dict[str, list[dict]] = {}
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                states.setdefault(type(each).__name__, []).append(each.state())
        self.state.stateful_callbacks = {name: of[0] if len(of) == 1 else of for name, of in states.items()}


def _with_deepspeed(stage: int | None) -> str:
    return "without DeepSpeed" if stage is None else f"at ZeRO stage {stage}"


class _LeaveAfterStep(TrainerCallback):
    """Asks after each optimizer step whether to go; if so the loop saves this step, once, and ends."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_step_end(self, args: SDFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.preemption.agree():
            control.should_save = True
            control.should_training_stop = True
