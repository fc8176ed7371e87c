"""Preview a data set as training would see it: both prompts of the first rows, truncation, loss tokens, and
statistics of the full data set.

    python -m sdft_ds.preview [flags of training]               no weights are loaded
    python -m sdft_ds.preview --score [flags of training]       also answers, with the KL at each token, and whether
                                                                this teacher can teach; the rows of --eval_tasks that
                                                                have a context are asked without and with it

All flags of training apply (launch/train.py --help all); those about ranks and batches are ignored: it runs in one
process, without DeepSpeed. Without a model and a data set: the embedded demo.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path

from datasets import IterableDataset
from rich.console import Console
from rich.progress import track
from transformers import PreTrainedTokenizerBase

from sdft_ds.cli import arguments, dataset_loading, errors
from sdft_ds.cli.model_arguments import ModelArguments
from sdft_ds.cli.terminal import tidy
from sdft_ds.config.sdft_config import SDFTConfig
from sdft_ds.demo import run as demo
from sdft_ds.evaluation.tasks import read_tasks
from sdft_ds.model import loading
from sdft_ds.preview import page, terminal
from sdft_ds.preview.preview import Preview, preview
from sdft_ds.preview.scores import add_scores
from sdft_ds.trainer import SDFTTrainer

STREAMED = 1000  # rows read from a stream: it may be endless
# Overrides the settings about ranks and batches, which may be invalid for one rank.
ALONE = {
    "deepspeed": "",
    "num_generations": 1,
    "num_generations_eval": None,
    "generation_batch_size": None,
    "steps_per_generation": None,
    "num_iterations": 1,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line. A mistake in it, or in the data, prints one line and exits with status 1 or 2."""
    own, flags = _parser().parse_known_args(argv)
    try:
        with tidy():
            view = look(flags, own.rows, own.score)
        if own.html:
            own.html.write_text(page.render(view), encoding="utf-8")
    except Exception as error:
        errors.leave(error)
    console = Console(highlight=False)
    terminal.show(view, console)
    if own.html:
        console.print(f"Wrote {own.html}")


def look(flags: Sequence[str], shown: int = 3, score: bool = False) -> Preview:
    """The preview for these flags of training. score: load the model and roll out the rows that are shown."""
    if shown < 1:
        raise ValueError(f"--rows must be at least 1, not {shown}.")
    alone = [token for name, value in ALONE.items() for token in (f"--{name}", str(value))]
    script, args, model = arguments.parse([*flags, *alone], demo.RECIPE)
    notes: list[str] = []
    if demonstrates := arguments.is_demo(script, model):
        model.model_name_or_path = str(demo.MODEL_DIR)
    if score and script.makes_contexts:
        raise ValueError(
            "--score needs the teacher's contexts, and these are made only after the rollout: leave it out."
        )
    args.anchor_fraction = None  # anchors are not shown
    args.model_init_kwargs = {**model.init_kwargs(args), **(args.model_init_kwargs or {})}
    tokenizer = model.tokenizer(args)
    if demonstrates:
        dataset, name = demo.dataset(), "the embedded demo"
    else:
        chat, evaluates = tokenizer.chat_template is not None, args.eval_strategy != "no"
        # As for SFT, which keeps golden responses: the teacher check needs them.
        given = script if script.makes_contexts else replace(script, method="sft")
        dataset, _ = dataset_loading.load(given, evaluates, args.seed, chat, notes.append)
        name = f"{model.model_name_or_path} · {script.source}"
    if script.method == "sdpo":
        taught = {"privileged_context", "teacher_prompt"} & {*dataset.column_names}
        dataset = dataset.remove_columns([*taught])
    config = loading.config_of(model.model_name_or_path, args)
    builder = loading.prompt_builder(tokenizer, config, args, script.makes_contexts)
    stream = isinstance(dataset, IterableDataset)
    rows = islice(dataset, STREAMED) if stream else dataset
    tasks = read_tasks(script.eval_tasks or [], limit=script.eval_task_rows) if score else []
    if script.reads_prompts_as_turns(tokenizer.chat_template is not None):
        tasks = [task.as_turns() for task in tasks]
    progress = track(
        rows, "Reading rows", None if stream else len(dataset), console=Console(stderr=True), transient=True
    )
    view = preview(progress, builder, args, shown)
    view.facts = [name, f"{view.statistics.rows:,} rows", f"truncation={args.truncation}"]
    view.notes += notes
    if script.method == "sdpo":
        view.notes.append(
            "The teacher's prompts are made after the rollout, from reprompt_template, with the row's context as "
            "feedback: those shown are the student's."
        )
    elif script.makes_contexts:
        view.notes.append("Contexts are made after the rollout: a teacher's prompt shown here may lack its own.")
    if stream:
        view.notes.append(f"A stream: its first {view.statistics.rows:,} rows were read.")
    if score:
        if not view.used:
            raise ValueError(
                "--score: none of the rows shown can be used. Show more of them, or see without --score why."
            )
        with _trainer(args, model, tokenizer) as trainer:
            add_scores(view, trainer, tasks)
        view.facts.append("one process, no DeepSpeed")
    return view


@contextmanager
def _trainer(args: SDFTConfig, model: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[SDFTTrainer]:
    """The trainer that training would use; writes nothing permanent, here or on the hub."""
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.report_to, args.push_to_hub, args.eval_strategy = folder, [], False, "no"
        yield SDFTTrainer(
            model=model.model_name_or_path, args=args, processing_class=tokenizer, peft_config=model.peft_config()
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sdft_ds.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show the first N rows (3)")
    parser.add_argument("--score", action="store_true", help="load the model and let it answer them")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page as well")
    return parser


if __name__ == "__main__":
    main()
