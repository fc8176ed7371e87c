"""Hub uploads: only model files, unless hub_upload_run_files is set.

transformers uploads all of output_dir, where a run's page, logs and completions contain its prompts and privileged
contexts.
"""

import glob
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils import PushInProgress

from sdft_ds.config.sdft_config import SDFTConfig

# Top-level names of what save_pretrained writes for models, adapters, tokenizers and processors, and of the files of a
# model's page on the hub.
MODEL_FILES = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_model.bin", "config.json", "generation_config.json", "adapter_config.json", "training_args.bin",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "additional_chat_templates", "*processor_config.json", "README.md", "LICENSE*", "teacher",
)  # fmt: skip
NEVER = ["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]


class UploadingTrainer(Trainer):
    """Restricts transformers' two uploads, at the end and at each checkpoint, to the selected files."""

    args: SDFTConfig

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **about: Any,
    ) -> CommitInfo | None:
        """Save the model and its card in output_dir and upload them. Arguments and result as in transformers' Trainer;
        about: arguments of create_model_card."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        given = about.pop("tags", None) or []
        tags = [*([given] if isinstance(given, str) else given), *(getattr(self.model, "model_tags", None) or [])]
        self.create_model_card(**about, **({"tags": list(dict.fromkeys(tags))} if tags else {}))
        self._finish_current_push()
        return self._upload(commit_message, token, revision or self.args.hub_revision, in_background=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        # The upload reads copies, because it runs while older checkpoints are deleted.
        for path in self._model_files(checkpoint_folder):
            if path.name == "README.md":  # PEFT's; the run's model card is written at the end
                continue
            if path.is_dir():
                shutil.copytree(path, Path(self.args.output_dir, path.name), dirs_exist_ok=True)
            else:
                shutil.copy(path, self.args.output_dir)
        by_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_steps else f"epoch {int(self.state.epoch)}"
        message, token, revision = f"Training in progress, {when}", self.args.hub_token, self.args.hub_revision
        jobs = [self._upload(message, token, revision, in_background=True)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                HfApi().upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    token=token,
                    run_as_future=True,
                    revision=revision,
                )
            )
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)

    def _upload(self, message: str | None, token: str | None, revision: str | None, in_background: bool) -> Any:
        """Upload the selected files of output_dir."""
        allowed = None
        if not self.args.hub_upload_run_files:
            found = self._model_files(self.args.output_dir)
            allowed = [glob.escape(path.name) + ("/*" if path.is_dir() else "") for path in found]
        return HfApi().upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=message,
            token=token,
            run_as_future=in_background,
            allow_patterns=allowed,
            ignore_patterns=NEVER,
            revision=revision,
        )

    def _model_files(self, folder: str) -> Iterator[Path]:
        """Files and complete folders in `folder` that belong to the model."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        vocabulary = getattr(tokenizer, "vocab_files_names", {}).values()
        adapters = getattr(self.model, "peft_config", {})  # an adapter not named default has its own folder
        code = ["*.py"] if getattr(self.model.config, "auto_map", None) else []
        names = (*MODEL_FILES, *code, *map(glob.escape, [*vocabulary, *adapters]))
        for entry in os.scandir(folder):
            if any(fnmatchcase(entry.name, name) for name in names):
                yield Path(entry.path)
