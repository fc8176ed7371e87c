"""Command line -> objects -> trainer.train().

deepspeed launch/train.py --deepspeed ds_configs/zero2.json         the embedded demo
deepspeed launch/train.py --deepspeed ds_configs/zero2.json \\
    --model_name_or_path MODEL --dataset_path FILE_OR_FOLDER        a model and data of yours
"""

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import datasets
import transformers

from sdft_ds import arguments, failure, output_folder, shutdown, sources
from sdft_ds.checkpoint import CannotResume
from sdft_ds.completions import ShowCompletions
from sdft_ds.demo import run as demo
from sdft_ds.evaluation.task_evaluation import TaskEvaluation, check_best_metric
from sdft_ds.evaluation.tasks import Task, read_tasks
from sdft_ds.output_folder import OutputFolderInUse
from sdft_ds.rollouts import NonFiniteLogits
from sdft_ds.rows import DataError
from sdft_ds.settings_file import SavedSettings
from sdft_ds.sft import TRAINERS
from sdft_ds.step_guard import TooManyBadSteps
from sdft_ds.trainer import SDFTTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says. A mistake in it is one line and exit status 2; what else keeps it from starting,
    one line and status 1."""
    quiet_unless_first_rank()
    with shutdown.together(), ExitStack() as stack:
        _main(sys.argv[1:] if argv is None else argv, stack)


def _main(argv: Sequence[str], stack: ExitStack) -> None:
    try:
        script, args, model = arguments.parse(argv, demo.RECIPE)
        settings = SavedSettings((script, args, model))
        questions = _questions(script)
        check_best_metric(args, questions)
        is_demo = arguments.is_demo(script, model)
        resume = _resume(args.resume_from_checkpoint)
        # Before the weights are loaded, and until all is written.
        stack.enter_context(output_folder.locked(args.output_dir))
        if resume is None:
            output_folder.refuse_others(args.output_dir)
        trainer = demo.trainer(args, model.peft_config()) if is_demo else _trainer(script, args, model)
        if questions:
            trainer.add_callback(TaskEvaluation(trainer, questions, script.eval_tasks_steps))
        trainer.add_callback(settings)
    except Exception as error:
        failure.leave(error)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DataError as error:  # of a stream: perhaps on this rank alone
        sys.exit(f"sdft_ds: {error}")
    except (CannotResume, NonFiniteLogits, OutputFolderInUse, TooManyBadSteps) as error:
        sys.exit(_one_line(error))
    trainer.save_model()
    if args.save_teacher:
        trainer.save_teacher(os.path.join(args.output_dir, "teacher"))
    if args.eval_strategy != "no":
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        print(_learned(trainer.state.log_history, args.method))
        print(f"Saved to {args.output_dir}")
    about = {"dataset": script.source, "recipe": script.recipe}
    trainer.create_model_card(**about)
    if args.push_to_hub:
        trainer.push_to_hub(**about)


def _trainer(
    script: arguments.ScriptArguments, args: arguments.SDFTConfig, model: arguments.ModelArguments
) -> SDFTTrainer:
    evaluates = args.eval_strategy != "no"
    args.model_init_kwargs = {**model.init_kwargs(args), **(args.model_init_kwargs or {})}
    tokenizer = model.tokenizer(args)
    train_dataset, eval_dataset = sources.load(
        script, evaluates, args.seed, tokenizer.chat_template is not None, _tell
    )
    trainer = TRAINERS[args.method](
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=model.peft_config(),
    )
    if evaluates and script.eval_num_prompts:
        trainer.add_callback(ShowCompletions(trainer, trainer.eval_dataset, script.eval_num_prompts))
    return trainer


def _tell(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"sdft_ds: {text}", flush=True)


def _questions(script: arguments.ScriptArguments) -> list[Task]:
    """What is asked before and after training, if anything."""
    found = read_tasks(script.eval_tasks or [], script.retention_file, script.eval_task_rows)
    if not found and (script.eval_tasks_steps is not None or script.eval_task_rows is not None):
        raise ValueError("--eval_tasks_steps and --eval_task_rows need --eval_tasks or --retention_file.")
    return found


def _resume(value: str | None) -> str | bool | None:
    return {"true": True, "false": None}.get((value or "false").lower(), value)


def quiet_unless_first_rank() -> None:
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


def _learned(log_history: list[dict[str, float]], method: str) -> str:
    """One sentence about the run: how far the student is from its teacher or its demonstrations, at first and at
    last."""
    metric = {"sdft": "sdft/distillation_loss", "sft": "loss"}[method]
    distances = [log[metric] for log in log_history if metric in log]
    if not distances:
        return "No step was logged: lower logging_steps to see what was learned."
    if method == "sft":
        return f"The loss on the demonstrations was {distances[0]:.3g} at first and {distances[-1]:.3g} at last."
    return (
        f"The student's answers without the context were {distances[0]:.3g} nats per token from the teacher's at "
        f"first and {distances[-1]:.3g} at last."
    )


if __name__ == "__main__":
    main()
