"""Terminal output: libraries are silenced on all ranks but the first."""

import os
import warnings

import datasets
import transformers


def quiet_unless_first_rank() -> None:
    """Silence warnings and logs on other ranks, which repeat rank 0's. Exceptions still show on every rank."""
    # Libraries still use deprecated names of each other, which users cannot fix.
    for module in ("transformers", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
