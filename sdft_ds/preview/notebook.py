"""The preview of a trainer's data set, as the output of a notebook's cell."""

from collections.abc import Sequence

from sdft_ds.data.streams import Stream
from sdft_ds.evaluation.tasks import Task
from sdft_ds.model import loading
from sdft_ds.preview import page
from sdft_ds.preview.preview import preview
from sdft_ds.preview.scores import add_scores
from sdft_ds.report.page import InlinePage
from sdft_ds.trainer import SDFTTrainer


def inline(trainer: SDFTTrainer, rows: int = 3, tasks: Sequence[Task] = ()) -> InlinePage:
    """The page of `python -m sdft_ds.preview --score` for this trainer and its first rows, in one process without
    DeepSpeed. Trains nothing. tasks: for the teacher check, as --eval_tasks. Raises ValueError for a stream, as its
    rows would be lost for the training."""
    if isinstance(trainer.train_dataset, Stream):
        raise ValueError("A stream can be read once: preview it with python -m sdft_ds.preview.")
    view = preview(trainer.train_dataset, trainer.prompts, trainer.args, rows)
    view.facts = [loading.name_of(trainer.model), f"{view.statistics.rows:,} rows"]
    if view.used:
        add_scores(view, trainer, tasks)
    return InlinePage(page.render(view), "\n".join([*view.notes, *view.verdict]))
