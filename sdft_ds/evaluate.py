"""Evaluate a saved model, optionally against its starting model, in one process and without DeepSpeed.

    python -m sdft_ds.evaluate MODEL --eval_tasks FILE ... [--start STARTING_MODEL] [--retention_file FILE] [--json]
    python -m sdft_ds.evaluate MODEL --lm_eval TASK ...      tasks of lm-eval: pip install lm_eval

MODEL is a folder saved by a run (a model or an adapter) or a hub id. With --start the starting model is evaluated on
the same tasks. The retention set is compared with it, or else with the reference that the run saved in MODEL.
"""

import argparse
import gc
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sdft_ds.cli import errors
from sdft_ds.cli.script_arguments import ScriptArguments
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.data.prompts import PromptBuilder
from sdft_ds.distributed import launch
from sdft_ds.evaluation import retention
from sdft_ds.evaluation.retention import ReferenceContinuation
from sdft_ds.evaluation.task_evaluation import EvalModel, TaskEvaluator, print_table, record
from sdft_ds.evaluation.tasks import RETENTION, Task, read_tasks
from sdft_ds.model import completion_forward, loading
from sdft_ds.model.completion_forward import RequestForward
from sdft_ds.rollouts.engine import Sampling
from sdft_ds.rollouts.local import LocalRollouts


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as specified on the command line. Invalid arguments or files print one line and exit with status 1."""
    args = _parser().parse_args(argv)
    try:
        results = evaluate(args)
    except Exception as error:
        errors.leave(error)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    from_lm_eval = results.pop("lm_eval", {})
    if args.eval_tasks or args.retention_file:
        print_table(results)
    for task, figures in from_lm_eval.items():
        print(f"lm-eval {task}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Returns records as in evaluations.jsonl under `start` (with --start) and `model`, and lm-eval results under
    `lm_eval`."""
    launch.avoid_cudnn_attention()
    launch.expand_segments(True)
    tasks = read_tasks(args.eval_tasks, args.retention_file, args.eval_task_rows)
    if not tasks and not args.lm_eval:
        raise ValueError("Nothing to evaluate: give --eval_tasks, --retention_file or --lm_eval.")
    if args.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm_eval needs lm_eval, which is not installed: pip install lm_eval")
    results: dict[str, Any] = {}
    start = None
    if args.start is not None:
        examination = _Saved.load(args.start, args).examination(tasks)
        with RequestForward(examination.subject.engine()):
            results["start"] = [record(result) for result in examination.evaluate()]
        start = examination.start
        del examination
        gc.collect()  # the model may be in reference cycles, and would stay in memory with the next one
    saved = _Saved.load(args.model, args)
    examination = saved.examination(tasks, start)
    if RETENTION in examination.ids and start is None:
        examination.start = retention.load(args.model, examination.ids[RETENTION])
    with RequestForward(saved.model):
        results["model"] = [record(result) for result in examination.evaluate()]
    if args.lm_eval:
        results["lm_eval"] = saved.lm_eval(args.lm_eval)
    return results


@dataclass
class _Saved:
    """A saved model and its evaluation settings. batch_size: lm-eval's."""

    model: PreTrainedModel
    prompts: PromptBuilder
    batch_size: int
    longest: int

    @classmethod
    def load(cls, name: str, args: argparse.Namespace) -> "_Saved":
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        trust = args.trust_remote_code
        with loading.named_in_errors(name):
            model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, trust_remote_code=trust)
        model = model.to(device).eval()
        tokenizer = loading.with_pad_token(AutoTokenizer.from_pretrained(name, trust_remote_code=trust))
        loading.check_embedding(tokenizer, model)
        loading.keep_quantized_layout(model)
        loading.disable_dropout(model)  # an adapter's configuration may still set it, which the head refuses
        with RequestForward(model):
            completion_forward.check(model, model, model.device)
        # Used for rendering only, so without length limits; prompts that are too long are refused, never truncated.
        template = SDFTConfig.__dataclass_fields__["teacher_prompt_template"].default
        prompts = PromptBuilder(tokenizer, template, None, None, chat_template_kwargs=args.chat_template_kwargs)
        return cls(model, prompts, args.batch_size, args.max_completion_length)

    def examination(self, tasks: list[Task], start: list[ReferenceContinuation] | None = None) -> TaskEvaluator:
        tokenizer = self.prompts.tokenizer
        if tokenizer.chat_template is not None:
            tasks = [task.as_turns() for task in tasks]
        sampling = Sampling(
            {"do_sample": False, "max_new_tokens": self.longest},
            loading.stop_token_ids(self.model, tokenizer),
            tokenizer.pad_token_id,
            seed=0,
        )
        rollouts = LocalRollouts(sampling, self.model, lambda: self.model)
        tokens = SDFTConfig.__dataclass_fields__["scoring_batch_tokens"].default
        subject = EvalModel(
            lambda: self.model, rollouts.generate, self.prompts, tokens, self.longest, self.model.device
        )
        return TaskEvaluator(tasks, subject, start)

    def lm_eval(self, tasks: list[str]) -> dict[str, dict[str, float]]:
        """lm-eval results by task. A task is a name known to lm-eval, or a YAML file."""
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        lm = HFLM(pretrained=self.model, tokenizer=self.prompts.tokenizer, batch_size=self.batch_size)
        figures = lm_eval.simple_evaluate(model=lm, tasks=tasks, log_samples=False)["results"]
        return {
            task: {name: value for name, value in of_task.items() if isinstance(value, float)}
            for task, of_task in figures.items()
        }


def _parser() -> argparse.ArgumentParser:
    def said(name: str, kind: type = ScriptArguments) -> str:
        return kind.__dataclass_fields__[name].metadata["help"]

    longest = SDFTConfig.__dataclass_fields__["max_completion_length"].default
    parser = argparse.ArgumentParser(
        prog="python -m sdft_ds.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="a folder with a model or an adapter, or a hub id")
    parser.add_argument("--start", help="the model that the run started from")
    parser.add_argument("--eval_tasks", nargs="+", default=[], help=said("eval_tasks"))
    parser.add_argument("--eval_task_rows", type=int, help=said("eval_task_rows"))
    parser.add_argument("--retention_file", help=said("retention_file"))
    parser.add_argument("--lm_eval", nargs="+", metavar="TASK", help="tasks of lm-eval: names, or YAML files")
    parser.add_argument("--max_completion_length", type=int, default=longest, help=f"of an answer ({longest})")
    parser.add_argument("--batch_size", type=int, default=8, help="of lm-eval: rows at once (8)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="dtype of the weights; auto: as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help=said("trust_remote_code", SDFTConfig))
    parser.add_argument("--chat_template_kwargs", type=json.loads, help="as in training, a JSON object")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
