"""What a saved model learned and forgot, in one process and without DeepSpeed.

    python -m sdft_ds.evaluate MODEL --eval_tasks FILE ... [--start STARTING_MODEL] [--retention_file FILE] [--json]
    python -m sdft_ds.evaluate MODEL --lm_eval TASK ...      tasks of lm-eval: pip install 'sdft_ds[lm-eval]'

MODEL is a folder that a run saved, a model or an adapter, or a hub id. With --start the same questions go to the model
that the run started from. The retention set is compared with it, or else with what the run itself left in MODEL.
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

from sdft_ds import completion_head, failure, models, zero
from sdft_ds.arguments import ScriptArguments
from sdft_ds.completion_head import RequestForward
from sdft_ds.config import SDFTConfig
from sdft_ds.evaluation import retention
from sdft_ds.evaluation.retention import Continuation
from sdft_ds.evaluation.task_evaluation import Examination, Subject, print_table, record
from sdft_ds.evaluation.tasks import RETENTION, Task, read_tasks
from sdft_ds.paired_batch import Completion
from sdft_ds.prompts import PromptBuilder
from sdft_ds.rollouts import Sampler


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate as the command line says. A mistake in it, or in a file, is one line and exit status 1."""
    args = _parser().parse_args(argv)
    try:
        results = evaluate(args)
    except Exception as error:
        failure.leave(error)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    from_lm_eval = results.pop("lm_eval", {})
    if args.eval_tasks or args.retention_file:
        print_table(results)
    for task, figures in from_lm_eval.items():
        print(f"lm-eval {task}: " + ", ".join(f"{name} {value}" for name, value in figures.items()))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Records as in evaluations.jsonl under `start` (with --start) and `model`; lm-eval's figures under `lm_eval`."""
    tasks = read_tasks(args.eval_tasks, args.retention_file, args.eval_task_rows)
    if not tasks and not args.lm_eval:
        raise ValueError("Nothing is asked: give --eval_tasks, --retention_file or --lm_eval.")
    if args.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--lm_eval needs lm_eval, which is not installed: pip install 'sdft_ds[lm-eval]'")
    results: dict[str, Any] = {}
    start = None
    if args.start is not None:
        examination = _Saved.load(args.start, args).examination(tasks)
        with RequestForward(examination.subject.engine()):
            results["start"] = [record(result) for result in examination.take()]
        start = examination.start
        del examination
        gc.collect()  # of the model, which may hold itself in cycles: else it stays beside the next one
    saved = _Saved.load(args.model, args)
    examination = saved.examination(tasks, start)
    if RETENTION in examination.ids and start is None:
        examination.start = retention.load(args.model, examination.ids[RETENTION])
    with RequestForward(saved.model):
        results["model"] = [record(result) for result in examination.take()]
    if args.lm_eval:
        results["lm_eval"] = saved.lm_eval(args.lm_eval)
    return results


@dataclass
class _Saved:
    """A model as it was saved, and how it is asked."""

    model: PreTrainedModel
    prompts: PromptBuilder
    batch_size: int
    longest: int

    @classmethod
    def load(cls, name: str, args: argparse.Namespace) -> "_Saved":
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        trust = args.trust_remote_code
        model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, trust_remote_code=trust)
        model = model.to(device).eval()
        tokenizer = models.with_pad_token(AutoTokenizer.from_pretrained(name, trust_remote_code=trust))
        models.check_embedding(tokenizer, model)
        models.keep_quantized_layout(model)
        models.disable_dropout(model)  # an adapter's configuration may still name it, and the head refuses it
        with RequestForward(model):
            completion_head.check(model, model, model.device)
        # Only its rendering is used, which knows no limits; prompts that are too long are refused, never cut.
        template = SDFTConfig.__dataclass_fields__["teacher_prompt_template"].default
        prompts = PromptBuilder(tokenizer, template, None, None, chat_template_kwargs=args.chat_template_kwargs)
        return cls(model, prompts, args.batch_size, args.max_completion_length)

    def examination(self, tasks: list[Task], start: list[Continuation] | None = None) -> Examination:
        tokenizer = self.prompts.tokenizer
        sampler = Sampler(
            {"do_sample": False, "max_new_tokens": self.longest},
            models.stop_token_ids(self.model, tokenizer),
            tokenizer.pad_token_id,
            seed=0,
        )

        def generate(prompts: list[list[int]], keys: list[str]) -> list[Completion]:
            weights = zero.generation_weights(self.model, gather=False)
            return sampler.sample(self.model, prompts, keys, weights)

        subject = Subject(lambda: self.model, generate, self.prompts, self.batch_size, self.longest, self.model.device)
        return Examination(tasks, subject, start)

    def lm_eval(self, tasks: list[str]) -> dict[str, dict[str, float]]:
        """Figures by task. A task is a name that lm-eval knows, or a YAML file."""
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
    parser.add_argument("--batch_size", type=int, default=8, help="rows at once (8)")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="dtype of the weights; auto: as saved")
    parser.add_argument("--trust_remote_code", action="store_true", help=said("trust_remote_code", SDFTConfig))
    parser.add_argument("--chat_template_kwargs", type=json.loads, help="as in training, a JSON object")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    main()
