"""transformers' Trainer with checkpoints that are complete or absent, resumes that are exact, and preemption."""

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from sdft_ds import checkpoint, ranks, run_state, zero
from sdft_ds.config import SDFTConfig
from sdft_ds.lookout import Lookout
from sdft_ds.output_folder import locked
from sdft_ds.preemption import Preemption


class ResumableTrainer(Trainer):
    """What a run needs to be killed anywhere and to go on as if it had not been."""

    args: SDFTConfig

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.saved_step: int | None = None  # of the last checkpoint that this process wrote or resumed from
        self.same_ranks = True
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

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Train as transformers does. resume_from_checkpoint: True, from the newest complete checkpoint in output_dir,
        or from the start if there is none; or a folder, which must be complete.

        Raises CannotResume (DamagedCheckpoint where it names a file), OutputFolderInUse, and Preempted, which leaves
        the program, after a signal was obeyed.
        """
        with locked(self.args.output_dir), self.preemption, self.lookout:
            folder = self._checkpoint_to_resume(resume_from_checkpoint)
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
        folder, skipped = checkpoint.newest_complete(self.args.output_dir)
        for wrong in skipped:
            self._tell(f"Skipped a checkpoint: {wrong}.")
        self._tell(f"Resuming from {folder}." if folder else f"No complete checkpoint in {self.args.output_dir}: "
                   "starting from the beginning.")  # fmt: skip
        return folder

    def _check_settings(self, folder: Path) -> None:
        if not (folder / run_state.SETTINGS).exists():
            raise checkpoint.DamagedCheckpoint(
                f"{folder} holds a model and nothing to resume from: it was saved with save_only_model."
            )
        saved = run_state.load_settings(folder)
        self.same_ranks = saved["world_size"] == self.args.world_size
        if not self.same_ranks:
            self._keep_rows_of_a_step(saved["what makes a step"])
        run_state.compare_settings(saved, self._settings(), self._tell)
        before, stage = saved["zero_stage"], zero.configured_stage(self.accelerator)
        if before != stage and {before, stage} != {1, 2}:
            there, here = (_with_deepspeed(each) for each in (before, stage))
            raise checkpoint.CannotResume(
                f"{folder} was made {there}, and this run is {here}: the optimizer's state cannot be carried over. "
                f"Resume {there}, or start a new run from the model in that folder."
            )
        if before != stage or (stage and not self.same_ranks):  # at stage 0 every rank has all of it
            if not (folder / checkpoint.UNIVERSAL).exists():
                raise checkpoint.CannotResume(
                    f"{folder} was made by {saved['world_size']} ranks {_with_deepspeed(before)}, and this run has "
                    f"{self.args.world_size} {_with_deepspeed(stage)}. Convert it first: "
                    f"python -m sdft_ds.checkpoint universal {folder}"
                )
            zero.load_universal(self.accelerator)

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
        return run_state.settings_of(self.args, rows, zero.configured_stage(self.accelerator))

    def _load_optimizer_and_scheduler(self, checkpoint_dir: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint_dir)
        if checkpoint_dir is not None:
            zero.mend_universal(self.model_wrapped, checkpoint_dir)
            self.load_own_state(checkpoint_dir, self.same_ranks)

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """In place of transformers': it rotates old checkpoints inside, before the new one is complete."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_folder, step = self._get_output_dir(trial=trial), self.state.global_step
        best = self.state.best_global_step
        if best and (best == step or Path(run_folder, f"checkpoint-{best}").exists()):
            self.state.best_model_checkpoint = os.path.join(run_folder, f"checkpoint-{best}")
        with checkpoint.writing(run_folder, step) as folder:
            self.save_model(folder, _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(folder)
                self._save_scaler(folder)
                self._save_rng_state(folder)
                self.save_own_state(folder)
                run_state.save_settings(folder, self._settings())
            if self.args.should_save:
                self._export_callbacks()
                self.state.save_to_json(os.path.join(folder, TRAINER_STATE_NAME))
        self.saved_step = step
        final = os.path.join(run_folder, f"checkpoint-{step}")
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        checkpoint.reached("rotated")

    def _export_callbacks(self) -> None:
        """The states of callbacks that have one, as transformers keeps them."""
        kept = self.state.stateful_callbacks
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                name = type(each).__name__
                if isinstance(kept[name], list):
                    kept[name].append(each.state())
                else:
                    kept[name] = each.state()


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
