"""Disks that refuse, really: a limit of a file's size, a full device, a library's own words; all of them told alike."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from longpo_ops.runs.disk import ADVICE, told, writing
from longpo_ops.runs.journal import write_atomically

TENSORS = {"a": torch.zeros(2**18)}  # 1 MiB


@contextmanager
def small_files(nbytes: int = 2**16):
    """No file grows beyond: the system refuses (EFBIG), in the middle of it, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "torch": lambda folder: torch.save(TENSORS, folder / "a.pt"),
    "safetensors": lambda folder: save_file(TENSORS, folder / "a.safetensors"),
    "pyarrow": lambda folder: pyarrow.parquet.write_table(
        pyarrow.table({"a": np.random.default_rng(0).random(2**17)}), folder / "a.parquet"
    ),
    "python": lambda folder: (folder / "a.txt").write_text("x" * 2**20),
    "atomic": lambda folder: write_atomically(folder / "a.json", b"x" * 2**20),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_library_tells_the_systems_number_and_a_path(writer, tmp_path):
    with pytest.raises(OSError) as refusal, small_files(), writing(tmp_path):
        WRITERS[writer](tmp_path)
    assert refusal.value.errno == errno.EFBIG and str(refusal.value.filename).startswith(str(tmp_path))
    assert "raise the limit of a file's size (ulimit -f)" in told(refusal.value)
    assert "then run the same command again" in told(refusal.value)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_full_device_is_told_by_its_path():
    with pytest.raises(OSError) as refusal, writing(Path("/dev/full")), open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    expected = "/dev/full: No space left on device; free space there, then run the same command again"
    assert told(refusal.value) == expected


def test_an_error_behind_a_librarys_own_is_found(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as refusal, writing(tmp_path):
        raise RuntimeError("An error occurred while generating the dataset") from full
    assert refusal.value.filename == str(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("somebody's own words (os error 28)"),
        RuntimeError("size mismatch"),
        SafetensorError("Error while deserializing header"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "config.json"),
        PermissionError(errno.EACCES, "Permission denied", "theirs.json"),
        ConnectionError("no server answers"),
    ],
)
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, writing(tmp_path):
        raise error
    assert raised.value is error


def test_every_reason_has_its_advice():
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
        assert ADVICE[number] in told(OSError(number, os.strerror(number), "/out"))
    assert told(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "[Errno 2] No such file: 'x'"
