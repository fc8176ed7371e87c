"""How a command ends that could not start: in one line."""

import os
import sys
from typing import NoReturn


def leave(error: Exception) -> NoReturn:
    """End the program with what went wrong, and status 1.

    A mistake in settings or data (ValueError, OSError) is the same on every rank: the first one says it. Of anything
    else, a library's error or a fault of this program, every rank says its own, with its class. SDFT_TRACEBACK=1 in
    the environment shows where it was raised instead.
    """
    if os.environ.get("SDFT_TRACEBACK"):
        raise error
    rank, text = os.environ.get("RANK", "0"), " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError):
        where = f"rank {rank}: " if rank != "0" else ""
        sys.exit(f"sdft_ds: {where}{type(error).__name__}: {text} (SDFT_TRACEBACK=1 shows where it comes from)")
    sys.exit(f"sdft_ds: {text}" if rank == "0" else 1)
