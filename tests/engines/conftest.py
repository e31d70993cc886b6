"""One tiny trained model for all test processes, and documents it can read: what tests of several rooms share."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from tests.engines import tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model folder, the same for all processes of pytest-xdist; whoever comes first trains it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "tiny-model"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "tokenizer_config.json").exists():
            tiny.save(folder, steps=160)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """The model's tokenizer, for tests without a model; `name_or_path` is its folder."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    """Four documents of about 450 tokens."""
    return tiny.write_documents(tmp_path_factory.mktemp("documents"), 4)
