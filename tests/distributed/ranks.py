"""Real processes for tests of several ranks: started once, they run one function after another over gloo, most of them
of tests.distributed.scenarios.

A call that takes too long dumps every rank's stacks, kills the processes and fails; the next call starts new ones.
They are forks of a process that does nothing but import what takes them seconds to import.
"""

import faulthandler
import gc
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from sdft_ds.distributed.launch import free_port


class RankError(AssertionError):
    """A function raised on a rank; the message holds its traceback."""


class Ranks:
    def __init__(self, world_size: int):
        self.world_size = world_size
        self.processes: list = []

    def run(self, function: Callable, *args: Any, timeout: int = 120, **kwargs: Any) -> list[Any]:
        """Call a function of a module on every rank; their results."""
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs, timeout))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout + 10):
                stacks = "\n".join(open(log).read() for log in self.logs)
                # The cause is often on a later rank: it raised, and this one waits for it.
                results += [other.recv() for other in self.pipes[rank + 1 :] if other.poll()]
                self.stop()
                raised = "\n".join(str(result) for ok, result in results if not ok)
                raise RankError(
                    f"{function.__name__}: rank {rank} did not answer within {timeout} s.\n{raised}\n{stacks}"
                )
            try:
                ok, result = pipe.recv()
            except EOFError:
                self.stop()
                raise RankError(f"{function.__name__}: rank {rank} died.") from None
            results.append((ok, result))
        failed = [f"rank {rank}:\n{result}" for rank, (ok, result) in enumerate(results) if not ok]
        if failed:
            self.stop()  # a rank that raised in the middle of a collective cannot be used again
            raise RankError(f"{function.__name__}\n" + "\n".join(failed))
        return [result for _, result in results]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def _start(self) -> None:
        context, port = multiprocessing.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["tests.helpers.trainers", "deepspeed"])
        self.pipes, self.logs = [], []
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log = tempfile.NamedTemporaryFile(suffix=f".rank{rank}", delete=False).name
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, port, log), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.logs.append(log)
            self.processes.append(process)


def _serve(pipe, rank: int, world_size: int, port: int, log: str) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)  # torch's, at every collective of DeepSpeed
    gc.freeze()  # every trainer collects garbage, and would look through all that was imported
    stacks = open(log, "w")
    while True:
        function, args, kwargs, timeout = pipe.recv()
        faulthandler.dump_traceback_later(timeout, file=stacks)
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()
