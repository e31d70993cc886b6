"""benchmarks/gpu/sparse.py with the PyTorch form on a CPU: right results pass, wrong ones fail, and both products are timed."""

import pytest
import torch

from benchmarks.gpu import sparse
from benchmarks.gpu.correctness import DTYPES
from benchmarks.gpu.setting import REHEARSAL
from benchmarks.gpu.speed import Size
from longpo_ops.ops import sparse as plain
from longpo_ops.ops.tiles import TorchTiles


@pytest.mark.parametrize("kind", sparse.KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_pytorch_form_passes(kind, dtype):
    told = sparse._case(TorchTiles(), kind, REHEARSAL.odd_vocab, dtype, REHEARSAL, 0)
    assert told["status"] == "passed" and 0 < told["error"] <= told["allowed"]


def test_too_many_columns_left_out_fail(monkeypatch):
    case = "peaked", 4099, torch.float32, REHEARSAL, 0  # in a small vocabulary every column matters
    assert sparse._case(TorchTiles(), *case)["status"] == "passed"
    monkeypatch.setattr(plain, "RULE", plain.RULE._replace(epsilon=2.0**-5))
    assert sparse._case(TorchTiles(), *case)["status"].startswith("failed: rows are off by")


def test_both_products_are_timed_if_they_are_alike(monkeypatch):
    size = Size(REHEARSAL, REHEARSAL.vocabularies[0], 128)
    told = sparse.timed(size, TorchTiles(), 0)
    assert told["status"] == "measured" and told["milliseconds"] > 0 < told["dense_milliseconds"]
    assert told["dense_error"] > 0  # columns are left out
    monkeypatch.setattr(sparse, "LEAST_DIGITS", 0.0)
    assert sparse.timed(size, TorchTiles(), 0)["status"].startswith("failed: off by")


def test_every_back_end_that_has_a_form_is_asked():
    cases = [row.case for row in sparse.rows(TorchTiles(), "torch", REHEARSAL, DTYPES, 0.1)]
    assert len(cases) == len(set(cases)) == len(DTYPES) * (len(sparse.KINDS) + len(REHEARSAL.vocabularies))
