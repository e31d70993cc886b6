"""Broken folders are refused by name, or taken where nothing depends on what is broken; a traceback answers none of them."""

import errno
import os
import random
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch

from longpo_ops.pretrained import BrokenModel, loading, read_config, trying
from longpo_ops.pretrained.loading import check_files

from . import broken, outcomes
from .tiny import llama, save

SHORT = 24  # of the cases; `python -m tests.pretrained.outcomes` takes all of them


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "whole"
    broken.make(folder)
    outcomes.write_pairs(folder.parent)
    return folder


@pytest.mark.parametrize("probe", outcomes.PROBES)
def test_a_whole_folder_is_taken(whole, probe):
    assert outcomes.outcome(whole, outcomes.PROBES[probe]) == "taken:"


def test_broken_folders_are_refused_by_name(whole):
    """A draw of all ways to break one, each read as one of the commands does."""
    cases, rng, wrong, refused = broken.cases(), random.Random(0), {}, 0
    for name in rng.sample(sorted(cases), SHORT):
        probe = rng.choice(sorted(outcomes.PROBES))
        folder = whole.parent / "case"
        shutil.copytree(whole, folder)
        cases[name](folder)
        came = outcomes.outcome(folder, outcomes.PROBES[probe])
        refused += came.startswith("refused")
        if not came.startswith(("refused:", "taken:")):
            wrong[name, probe] = came
        shutil.rmtree(folder)
    assert wrong == {} and refused >= SHORT // 4


def test_the_first_error_is_kept_as_the_cause_and_told_once():
    with pytest.raises(BrokenModel) as caught, loading("outer", "a"), loading("inner", lambda: "b"):
        {}["c"]
    assert str(caught.value) == (
        "model 'inner' cannot be loaded: b: KeyError: 'c' (no folder of that name is here, either)"
    )
    assert isinstance(caught.value.__cause__, KeyError)


class PanicException(BaseException):
    """As tokenizers' is: no Exception."""


@pytest.mark.parametrize(
    "error", [TypeError("x"), RecursionError("x"), AssertionError(), OSError("x"), PanicException("x"), Exception("x")]
)
def test_whatever_the_libraries_raise_of_the_files_becomes_one_kind(error, tmp_path):
    with pytest.raises(BrokenModel, match=f"model '{tmp_path}' cannot be loaded: "), loading(str(tmp_path)):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("of CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EMFILE, "Too many open files"),
        RuntimeError("IO error: No space left on device (os error 28)"),
        ImportError("install bitsandbytes"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_fault_of_the_files_keeps_its_own_words(error, tmp_path):
    with pytest.raises(type(error)) as caught, loading(str(tmp_path)):
        raise error
    assert caught.value is error


@contextmanager
def no_file_to_spare():
    """Every file that is opened within it is one too many."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("read", [check_files, read_config])
def test_too_many_open_files_are_no_fault_of_the_model(tmp_path, read):
    save(tmp_path, llama())
    with pytest.raises(OSError, match="Too many open files") as caught, no_file_to_spare():
        read(str(tmp_path))
    assert not isinstance(caught.value, BrokenModel) and caught.value.errno == errno.EMFILE


@pytest.mark.parametrize(
    "error", [AttributeError("x"), RuntimeError("Triton"), KeyError("x"), torch.AcceleratorError("CUDA error", 700)]
)
def test_faults_of_a_model_that_runs_are_not_blamed_on_its_files(error):
    with pytest.raises(type(error)) as caught, trying("m", "it cannot generate"):
        raise error
    assert caught.value is error


def test_what_a_model_that_runs_refuses_is_told_with_its_name():
    with pytest.raises(BrokenModel) as caught, trying("m", "it cannot generate"):
        raise ValueError("rope")
    assert str(caught.value) == "model 'm': it cannot generate: rope"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"a": "\xff"}', r"config.json is no UTF-8 \(invalid start byte at byte 7 of 10\)"),
        ("config.json", b'{"model_type": "lla', "config.json is no JSON: Unterminated string"),
        ("config.json", b"[" * 20000, "config.json is nested too deep"),
        (
            "generation_config.json",
            b"[1, 2]",
            r"generation_config.json holds a JSON list, \[1, 2\]; expected an object",
        ),
        ("tokenizer_config.json", b"", r"tokenizer_config.json is no JSON: .* \(of 0 characters, which begin ''\)"),
    ],
)
def test_a_file_that_is_no_json_object_is_named_with_what_it_is(tmp_path, file, content, message):
    save(tmp_path, llama())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(BrokenModel, match=f"model '{tmp_path}' cannot be loaded: {message}"):
        read_config(str(tmp_path))
