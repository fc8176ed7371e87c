"""`--full` adds the slow tests. Two-rank tests share one pair of worker processes. Everything runs on the CPU: GPUs
are hidden from the tests and from the processes that they start, unless `--gpu` is given. What they leave in the
temporary folder goes at the end; pytest keeps the folders of failed tests."""

import gc
import multiprocessing.util
import os
import shutil
import sys
import tempfile

if "--gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch starts
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded: where a name is looked for on the hub, the answer is at once that it is not here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.distributed.ranks import Ranks
from tests.helpers import tiny

torch.set_num_threads(1)


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        multiprocessing.util.get_temp_dir()  # stays outside: it is removed after the cleanup
        os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="tests-")
        config.add_cleanup(lambda: shutil.rmtree(tempfile.tempdir, ignore_errors=True))


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the slow tests")
    parser.addoption("--gpu", action="store_true", help="let the tests see this machine's GPUs")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With two workers, one runs all of tests/distributed, so that one pair of processes serves it; the others are
    shared out by file."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if "tests/distributed/" in nodeid else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # every trainer collects garbage, and would look through all that the test files have imported


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        for item in items:
            if "full" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; --full runs it"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def one_rank():
    """One process of the same kind, for engines of one rank."""
    ranks = Ranks(1)
    yield ranks
    ranks.stop()
