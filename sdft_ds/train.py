"""Command line -> objects -> trainer.train().

deepspeed launch/train.py --deepspeed ds_configs/zero2.json         the embedded demo
deepspeed launch/train.py --deepspeed ds_configs/zero2.json \\
    --model_name_or_path MODEL --dataset_path FILE_OR_FOLDER        a model and data of yours
"""

import os
import sys
import warnings
from collections.abc import Sequence

import datasets
import transformers

from sdft_ds import arguments, sources
from sdft_ds.checkpoint import CannotResume
from sdft_ds.completions import ShowCompletions
from sdft_ds.demo import run as demo
from sdft_ds.evaluation.task_evaluation import TaskEvaluation
from sdft_ds.evaluation.tasks import Task, read_tasks
from sdft_ds.output_folder import OutputFolderInUse
from sdft_ds.rows import DataError
from sdft_ds.settings_file import SavedSettings
from sdft_ds.step_guard import TooManyBadSteps
from sdft_ds.trainer import SDFTTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake in it, or in the data, is one line and exit status 2."""
    _quiet_unless_first_rank()
    try:
        script, args, model = arguments.parse(sys.argv[1:] if argv is None else argv, demo.RECIPE)
        settings = SavedSettings((script, args, model))
        questions = _questions(script)
        is_demo = model.model_name_or_path is None and script.dataset_name is None and script.dataset_path is None
        trainer = demo.trainer(args, model.peft_config()) if is_demo else _trainer(script, args, model)
        if questions:
            trainer.add_callback(TaskEvaluation(trainer, questions, script.eval_tasks_steps))
        trainer.add_callback(settings)
    except (ValueError, OSError) as error:
        sys.exit(_one_line(error))
    try:
        trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    except DataError as error:  # of a stream: perhaps on this rank alone
        sys.exit(f"sdft_ds: {error}")
    except (CannotResume, OutputFolderInUse, TooManyBadSteps) as error:
        sys.exit(_one_line(error))
    trainer.save_model()
    if args.save_teacher:
        trainer.save_teacher(os.path.join(args.output_dir, "teacher"))
    if args.eval_strategy != "no":
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        print(_learned(trainer.state.log_history))
        print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub()


def _trainer(
    script: arguments.ScriptArguments, args: arguments.SDFTConfig, model: arguments.ModelArguments
) -> SDFTTrainer:
    if model.model_name_or_path is None:
        raise ValueError("A data set is named, but no model: set --model_name_or_path.")
    if script.dataset_name is None and script.dataset_path is None:
        raise ValueError("A model is named, but no data set: set --dataset_path or --dataset_name.")
    evaluates = args.eval_strategy != "no"
    train_dataset, eval_dataset = sources.load(script, evaluates, args.seed)
    args.model_init_kwargs = {**model.init_kwargs(args), **(args.model_init_kwargs or {})}
    name = model.model_name_or_path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:  # which need not name what was asked for
        raise ValueError(f"--model_name_or_path {name}: {error}") from None
    trainer = SDFTTrainer(
        model=name,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=model.peft_config(),
    )
    if evaluates and script.eval_num_prompts:
        trainer.add_callback(ShowCompletions(trainer, trainer.eval_dataset, script.eval_num_prompts))
    return trainer


def _questions(script: arguments.ScriptArguments) -> list[Task]:
    """What is asked before and after training, if anything."""
    found = read_tasks(script.eval_tasks or [], script.retention_file, script.eval_task_rows)
    if not found and (script.eval_tasks_steps is not None or script.eval_task_rows is not None):
        raise ValueError("--eval_tasks_steps and --eval_task_rows need --eval_tasks or --retention_file.")
    return found


def _resume(value: str | None) -> str | bool | None:
    return {"true": True, "false": None}.get((value or "false").lower(), value)


def _quiet_unless_first_rank() -> None:
    """Other ranks say the same; what goes wrong on one of them alone is an exception, and still shows."""
    # Names that the libraries below us still use among each other, and that no user can do anything about.
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def _one_line(error: Exception) -> str | int:
    """What to exit with: the message in one line, said by the first rank only, and status 1 on every rank."""
    return f"sdft_ds: {' '.join(str(error).split())}" if os.environ.get("RANK", "0") == "0" else 1


def _learned(log_history: list[dict[str, float]]) -> str:
    """One sentence about the run: how far the student is from its teacher, at first and at last."""
    distances = [log["sdft/distillation_loss"] for log in log_history if "sdft/distillation_loss" in log]
    if not distances:
        return "No step was logged: lower logging_steps to see what was learned."
    return (
        f"The student's answers without the context were {distances[0]:.3g} nats per token from the teacher's at "
        f"first and {distances[-1]:.3g} at last."
    )
