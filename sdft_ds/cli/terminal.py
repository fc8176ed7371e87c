"""Terminal output of a command: warnings take one line, and libraries are silenced on all ranks but the first."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import transformers


@contextmanager
def tidy() -> Iterator[None]:
    """Within the block a warning is one line without the file and the source that it came from. Other ranks' warnings
    and logs, which repeat rank 0's, are silenced; exceptions still show on every rank."""
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    # Libraries use deprecated names of transformers, which users cannot fix.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        warnings.formatwarning = before


def _one_line(message: Warning | str, *where: Any, **more: Any) -> str:
    return f"sdft_ds: Warning: {' '.join(str(message).split())}\n"
