"""Terminal output: messages on rank 0 only, and libraries silenced on the other ranks."""

import os
import warnings

import datasets
import transformers


def tell(text: str) -> None:
    """Print a line on rank 0."""
    if os.environ.get("RANK", "0") == "0":
        print(f"sdft_ds: {text}", flush=True)


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
