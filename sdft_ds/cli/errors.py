"""One-line error messages for commands that fail."""

import os
import sys
from typing import NoReturn


def leave(error: Exception) -> NoReturn:
    """Print the error and exit with status 1.

    Errors in settings or data (ValueError, OSError) and non-finite numbers (FloatingPointError) are the same on every
    rank, so rank 0 prints them. Any other error, of a library or a bug of this program, is printed by every rank, with
    its class. SDFT_TRACEBACK=1 in the environment re-raises the error for its traceback instead.
    """
    if os.environ.get("SDFT_TRACEBACK"):
        raise error
    rank, text = os.environ.get("RANK", "0"), " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | FloatingPointError):
        where = f"rank {rank}: " if rank != "0" else ""
        sys.exit(f"sdft_ds: {where}{type(error).__name__}: {text} (SDFT_TRACEBACK=1 shows the traceback)")
    sys.exit(f"sdft_ds: {text}" if rank == "0" else 1)
