"""Functions of the user's by import path, scorers as rewards by name, and an example of a reward that runs code."""

import contextlib
import importlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from sdft_ds.data.rows import message_text
from sdft_ds.evaluation import scorers

SECONDS, BYTES = 10, 2 << 30  # limits of a program that `passes_tests` runs
_CODE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
# Set by the child for itself, before the program.
_LIMITED = """\
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({bytes}, {bytes}))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.execv(sys.executable, [sys.executable, "-I", "program.py"])
"""


def functions(context_fn: str | None, rewards: list[str] | None, answer_column: str = "answer") -> dict[str, Any]:
    """The trainer's arguments for --privileged_context_fn and --reward. Raises ValueError naming the flag."""
    found: dict[str, Any] = {}
    if context_fn is not None:
        found["privileged_context_fn"] = imported("--privileged_context_fn", context_fn)
    if rewards:
        found["reward_funcs"] = [
            scorer_reward(name, answer_column) if name in scorers.SCORERS else imported("--reward", name)
            for name in rewards
        ]
    return found


def imported(flag: str, path: str) -> Callable[..., Any]:
    """The function package.module:function; modules of the working folder count. Raises ValueError naming the flag."""
    module, _, name = path.partition(":")
    if not module or not name:
        known = f", or a scorer: {', '.join(scorers.SCORERS)}" if flag == "--reward" else ""
        raise ValueError(f"{flag} {path}: expected package.module:function{known}.")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{flag} {path} cannot be imported: {error}.") from None
    if not callable(found):
        raise ValueError(f"{flag} {path} is a {type(found).__name__}, not a function.")
    return found


def scorer_reward(name: str, answer_column: str = "answer") -> Callable[..., list[float]]:
    """A scorer as a reward function: 1 for a right completion, else 0."""

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        if answer_column not in columns:
            raise ValueError(f"the rows have no column {answer_column!r}; set answer_column")
        return [
            float(scorers.score(name, text_of(completion), answer))
            for completion, answer in zip(completions, columns[answer_column], strict=True)
        ]

    reward.__name__ = name
    return reward


def text_of(completion: Any) -> str:
    """A completion's text, in either form."""
    return completion if isinstance(completion, str) else message_text(completion[-1]["content"])


def passes_tests(completions: list[Any], test: list[str], **columns: Any) -> list[float]:
    """Example of a reward that runs code: 1 where the last Python block of a completion, followed by the row's `test`,
    ends without an error, else 0.

    This is no sandbox. The program runs in a process of its own with limits on time, memory and file size, in an empty
    folder and without this process's environment; but it may read, write and connect to all that this user may. Train
    with it in a container or a virtual machine that has nothing to lose.
    """
    return [float(_runs(text_of(completion), each)) for completion, each in zip(completions, test, strict=True)]


def _runs(completion: str, test: str) -> bool:
    blocks = _CODE.findall(completion)
    if not blocks:
        return False
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "program.py"), "w", encoding="utf-8") as file:
            file.write(f"{blocks[-1]}\n{test}\n")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _LIMITED.format(seconds=SECONDS, bytes=BYTES)],
            cwd=folder, env={"PATH": os.defpath}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=SECONDS) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):  # with what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
