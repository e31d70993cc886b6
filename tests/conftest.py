"""What every test process shares: no network, quiet tokenisers, Ctrl-C, the same property-test examples in every run."""

import gc
import getpass
import os
import signal
import tempfile

import pytest
from hypothesis import settings

from longpo_ops import recipes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# inductor finds what it compiled again without looking at the instruction set it was written for: code with AVX-512's
# strides, compiled for AVX2, leaves half of a vector out. So each set has its cache (docs/log.md, 2026-11-27).
SET = os.environ.get("ATEN_CPU_CAPABILITY", "own")
CACHE = os.path.join(tempfile.gettempdir(), f"longpo_ops-tests-inductor-{getpass.getuser()}-{SET}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE)

# Files of minutes, which are begun first: one that comes last keeps one process at work and the others idle.
LONG = ("gpu/test_check", "evolve/test_run", "test_workspace", "test_packaging", "train/test_checkpoints",
        "demo/test_commands", "test_evolve_ranks", "test_launch_ranks")  # fmt: skip

# A suite that a shell started in the background ignores SIGINT, and so would the runs that tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _told_anew():
    """What a recipe tells once in a process, every test is told."""
    recipes.warn.cache_clear()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.with_suffix("").as_posix().endswith(LONG))


def pytest_collection_finish():
    """Half a million objects of modules and tests are there to stay: no search for garbage looks at them again, which was a
    quarter of the time of a tiny training. What a test makes is searched as ever."""
    gc.collect()
    gc.freeze()
