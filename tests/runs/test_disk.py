"""Disks that refuse, really: a limit of a file's size, a full device, a library's own words; all of them told alike."""

from __future__ import annotations

import errno
import os
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
from tests.processes import small_files

TENSORS = {"a": torch.zeros(2**18)}  # 1 MiB


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
    with pytest.raises(OSError) as refusal, small_files(2**16), writing(tmp_path):
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


def test_a_place_beside_others_is_named_only_where_the_system_says_the_same_there(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 2**16)
    with pytest.raises(OSError) as refusal, small_files(2**16), writing(tmp_path, elsewhere=True):
        (tmp_path / "a.txt").write_text("x" * 2**20)
    assert refusal.value.errno == errno.EFBIG and refusal.value.filename == str(tmp_path)
    expected = (
        "a file that the system does not name: No space left on device; free space there, then run the same command"
    )
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(OSError) as refusal, writing(place, elsewhere=True), open("/dev/full", "w") as file:
            file.write("x")
            file.flush()
        assert refusal.value.filename is None and told(refusal.value).startswith(expected)
        with pytest.raises(OSError) as refusal, writing(place, elsewhere=True):
            raise SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)")
        assert (refusal.value.errno, refusal.value.filename) == (errno.EDQUOT, None)


def test_datasets_words_are_kept(tmp_path):
    words = "Not enough disk space. Needed: 5.00 GiB (download: 0 bytes, generated: 5.00 GiB)"
    with pytest.raises(OSError) as refusal, writing(tmp_path):
        raise OSError(words)
    assert told(refusal.value) == f"{tmp_path}: {words}; free space there, then run the same command again"


@pytest.mark.parametrize("folder", [".", "removed by another process"])
def test_no_reason_is_made_up_where_the_place_takes_more(folder, tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 534")
    with pytest.raises(RuntimeError) as raised, writing(tmp_path / folder):
        raise error
    assert raised.value is error


def test_files_that_vanish_while_the_system_is_asked_again_do_no_harm(tmp_path, monkeypatch):
    """Another process removes the folder: each file goes as soon as it is listed."""
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    real = os.walk

    def vanishing(top, *args, **kwargs):
        for found in real(top, *args, **kwargs):
            for name in found[2]:
                os.unlink(os.path.join(found[0], name))
            yield found

    monkeypatch.setattr(os, "walk", vanishing)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"), writing(tmp_path):
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    assert not list(tmp_path.glob("*/file"))


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
    for number in (errno.EACCES, errno.EPERM):
        assert "; get the right to read or write it" in told(OSError(number, os.strerror(number), "/data/pairs.jsonl"))
    assert told(FileNotFoundError(errno.ENOENT, "No such file", "x")) == "[Errno 2] No such file: 'x'"
