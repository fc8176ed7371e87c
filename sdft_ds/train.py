"""Entry point of training: parse the command line, build the trainer, train, save.

deepspeed launch/train.py --deepspeed ds_configs/zero2.json         the embedded demo
deepspeed launch/train.py --deepspeed ds_configs/zero2.json \\
    --model_name_or_path MODEL --dataset_path FILE_OR_FOLDER        a model and data of yours
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from datasets import IterableDataset

from sdft_ds.checkpoint import output_dir
from sdft_ds.checkpoint.output_dir import OutputFolderInUse
from sdft_ds.checkpoint.storage import CannotResume
from sdft_ds.cli import arguments, dataset_loading, errors, summary, terminal, yaml_config
from sdft_ds.config import recipes
from sdft_ds.data.rows import DataError
from sdft_ds.demo import run as demo
from sdft_ds.distributed import ranks, shutdown
from sdft_ds.evaluation import rewards
from sdft_ds.evaluation.task_evaluation import TaskEvaluation, check_best_metric
from sdft_ds.evaluation.tasks import Task, read_tasks
from sdft_ds.metrics.completions import ShowCompletions
from sdft_ds.metrics.nonfinite import TooManyNonFiniteSteps
from sdft_ds.model import loading
from sdft_ds.objectives.feedback import FeedbackError
from sdft_ds.preview.teacher_check import CheckTeacher
from sdft_ds.rollouts.sampler import NonFiniteLogits
from sdft_ds.trainer import TRAINERS, MethodTrainer


def main(argv: Sequence[str] | None = None) -> None:
    """Train as specified on the command line. Usage errors print one line and exit with status 2; other errors at
    startup print one line and exit with status 1."""
    with terminal.tidy(), shutdown.together(), ExitStack() as stack:
        if argv is None:  # a process of its own, whose command can be repeated
            _main(sys.argv[1:], stack, go_on=summary.resume_command(os.environ))
        else:
            _main(argv, stack, go_on="the same call with --resume_from_checkpoint true")


def _main(argv: Sequence[str], stack: ExitStack, go_on: str) -> None:
    try:
        script, args, model = arguments.parse(argv, demo.RECIPE)
        is_demo = arguments.is_demo(script, model)
        _complete_recipe(script, args, model)
        settings = yaml_config.SavedSettings((script, args, model))
        questions = _questions(script)
        check_best_metric(args, questions)
        if is_demo and script.method == "sdpo":
            raise ValueError(
                "--method sdpo needs --model_name_or_path, --dataset_path and --reward. A demo of it: python -m "
                "sdft_ds.demo.rewards"
            )
        resume = _resume(args.resume_from_checkpoint)
        # Held from before the weights are loaded until everything is written.
        stack.enter_context(output_dir.locked(args.output_dir))
        if resume is None:
            output_dir.refuse_others(args.output_dir)
        trainer = (
            demo.trainer(args, model.peft_config(), script.anchor_path) if is_demo else _trainer(script, args, model)
        )
        trainer.preemption.go_on = go_on
        trainer.add_callback(settings)
        if questions:
            if script.reads_prompts_as_turns(trainer.prompts.tokenizer.chat_template is not None):
                questions = [task.as_turns() for task in questions]
            trainer.add_callback(TaskEvaluation(trainer, questions, script.eval_tasks_steps))
        ranks.tell(summary.opening(trainer))
        if settings.given:
            config = os.path.join(args.output_dir, yaml_config.FILE)
            ranks.tell("\n  ".join([f"Settings that were given (all of them: {config}):", *settings.given]))
    except Exception as error:
        errors.leave(error)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except DataError as error:  # from a stream, possibly on this rank only
        sys.exit(f"sdft_ds: {error}")
    except (CannotResume, FeedbackError, NonFiniteLogits, OutputFolderInUse, TooManyNonFiniteSteps) as error:
        errors.leave(error)
    trainer.save_model()
    if args.save_teacher:
        trainer.save_teacher(os.path.join(args.output_dir, "teacher"))
    if args.eval_strategy != "no":
        try:
            metrics = trainer.evaluate()
        except (FeedbackError, NonFiniteLogits) as error:
            errors.leave(error)
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if trainer.is_world_process_zero():
        print(summary.closing(args.output_dir, trainer.prompts.tokenizer, hasattr(trainer.model, "peft_config")))
    about = {"dataset": script.source, "recipe": script.recipe}
    trainer.create_model_card(**about)
    if args.push_to_hub:
        trainer.push_to_hub(**about)


def _trainer(
    script: arguments.ScriptArguments, args: arguments.SDFTConfig, model: arguments.ModelArguments
) -> MethodTrainer:
    evaluates = args.eval_strategy != "no"
    args.model_init_kwargs = {**model.init_kwargs(args), **(args.model_init_kwargs or {})}
    tokenizer = model.tokenizer(args)
    functions = rewards.functions(script.privileged_context_fn, script.reward, script.answer_column)
    train_dataset, eval_dataset = dataset_loading.load(
        script, evaluates, args.seed, tokenizer.chat_template is not None, ranks.tell
    )
    anchors = dataset_loading.load_anchors(script, tokenizer.chat_template is not None, ranks.tell)
    trainer = TRAINERS[args.method](
        model=model.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=model.peft_config(),
        anchor_dataset=anchors,
        **functions,
    )
    is_stream = isinstance(train_dataset, IterableDataset)
    if args.method == "sdft" and script.teacher_check_rows and not script.makes_contexts and not is_stream:
        trainer.add_callback(CheckTeacher(trainer, script.teacher_check_rows))
    if evaluates and script.eval_num_prompts:
        shown = (trainer.eval_dataset, script.eval_num_prompts)
        trainer.add_callback(ShowCompletions(trainer.rollouts.generate, trainer.prompts, *shown))
    return trainer


def _complete_recipe(
    script: arguments.ScriptArguments, args: arguments.SDFTConfig, model: arguments.ModelArguments
) -> None:
    """Set the recipe's learning rate for the model's width, and say which recipe applies where none was named."""
    if script.rate_of_recipe:
        config = loading.config_of(model.model_name_or_path, args)
        adapter = model.use_peft or loading.adapter_config(model.model_name_or_path, args) is not None
        text = config.get_text_config()
        args.learning_rate = recipes.learning_rate_for(text.hidden_size, adapter, text.model_type)
    if script.recipe_unnamed:
        held = "" if script.anchor_path in (None, ["none"]) else f", held by anchors ({' '.join(script.anchor_path)})"
        repeats = " The teacher is asked to repeat each context: for documents or hints set --teacher_prompt_template."
        ranks.tell(
            f"No recipe was named, so {script.recipe} applies: {args.teacher_model_kind or 'EMA'} teacher, alpha "
            f"{args.distillation_alpha:g}, {args.distillation_mode}, top_p {args.top_p:g}, learning rate "
            f"{args.learning_rate:g}{held}. Others: --recipe paper, trl or trl-1.16."
            + (repeats if args.teacher_prompt_template == recipes.FACTS_TEMPLATE else "")
        )


def _questions(script: arguments.ScriptArguments) -> list[Task]:
    """The tasks to evaluate before and after training, if any."""
    found = read_tasks(script.eval_tasks or [], script.retention_file, script.eval_task_rows)
    if not found and (script.eval_tasks_steps is not None or script.eval_task_rows is not None):
        raise ValueError("--eval_tasks_steps and --eval_task_rows need --eval_tasks or --retention_file.")
    return found


def _resume(value: str | None) -> str | bool | None:
    return {"true": True, "false": None}.get((value or "false").lower(), value)


if __name__ == "__main__":
    main()
