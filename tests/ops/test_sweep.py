"""What the sweep plans: which pairs share a visit, how many rows fit, and float16's power of two."""

import math

import pytest
import torch

from longpo_ops import linear_cross_entropy
from longpo_ops.ops.products import UPCAST_BYTES, Products
from longpo_ops.ops.sweep import even_rows, float16_scale, rows_per_chunk, scratch_bytes

from .preference_cases import OBJECTIVES, Case


@pytest.mark.parametrize("value", [1.0, 0.5, 3e-9, 65504.0, 1e30, 2.0**-30])
def test_float16_scale_brings_a_number_near_one(value):
    scale = float16_scale(torch.tensor(value, dtype=torch.float64))
    assert 0.5 <= scale.double() * value < 1 or (value == 1.0 and scale == 0.5)
    assert math.log2(scale) == round(math.log2(scale))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_float16_scale_of_no_number_is_one(value):
    assert float16_scale(torch.tensor(value)) == 1


def test_rows_fit_in_what_is_asked_for():
    for V, H, dtype in ((7, 3, torch.float32), (32_000, 64, torch.bfloat16), (1_000, 8, torch.float64)):
        weight = torch.empty(V, H, dtype=dtype, device="meta")
        fixed, row = scratch_bytes(weight, dtype)
        for rows in (1, 5, 63, 64, 100, 1000):
            fit = rows_per_chunk(fixed + rows * row, weight, dtype)
            assert fit <= rows and (fit == rows or (fit % 64 == 0 and rows - fit < 64))
            assert rows_per_chunk(fixed + rows * row + row - 1, weight, dtype) == fit


def test_a_weight_that_is_not_upcast_leaves_room_for_rows():
    weight = torch.empty(32_000, 1024, dtype=torch.bfloat16)
    upcast, native = (rows_per_chunk(64 << 20, weight, weight.dtype, native=native) for native in (False, True))
    assert (native - upcast) * scratch_bytes(weight, weight.dtype)[1] <= UPCAST_BYTES
    assert native > upcast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_gradient_of_no_row_is_zero(dtype, backend, device):
    held = torch.full((64, 500), math.nan, device=device)  # what comes next may get this memory
    del held
    hidden, weight = (torch.randn(n, 500, device=device).to(dtype).requires_grad_() for n in (9, 64))
    linear_cross_entropy(hidden, weight, torch.full((9,), -100), backend=backend).backward()
    assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.fixture
def visits(monkeypatch):
    """The number of rows of each product with the head."""
    seen = []
    plain = Products.logits_
    monkeypatch.setattr(Products, "logits_", lambda self, h, out: seen.append(h.shape[0]) or plain(self, h, out))
    return seen


def answers(case):
    chosen, rejected = ((x[:, 1:] != -100).sum(1) for x in (case.chosen, case.rejected))
    return (chosen + rejected).tolist()


def test_pairs_that_fit_a_chunk_are_swept_while_their_tile_waits(visits, workspace):
    case = Case(OBJECTIVES["dpo"], torch.float32, nll=False)
    sizes = answers(case)  # two to four answer tokens each side
    case.ours(backend="torch")
    assert visits == [sum(sizes)]  # everything in one visit: scored, decided and swept
    visits.clear()
    case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], max(sizes)))
    assert sum(visits) == sum(sizes) and max(visits) <= max(sizes)  # a visit each, nothing twice
    visits.clear()
    case.ours(backend="torch", workspace_bytes=workspace(case.tensors[2], max(sizes) - 1))
    large = sum(n for n in sizes if n > max(sizes) - 1)
    assert sum(n for n in visits) == sum(sizes) + large  # the pairs that do not fit are scored first


def test_objectives_that_mix_pairs_and_float16_score_everything_first(visits):
    for objective, dtype in (("kto_pair", torch.float32), ("dpo", torch.float16)):
        case = Case(OBJECTIVES[objective], dtype, nll=False)
        visits.clear()
        case.ours(backend="torch")
        assert visits == [sum(answers(case))] * 2
        visits.clear()
        with torch.no_grad():
            case.loss(case.leaves(), backend="torch")
        assert visits == [sum(answers(case))]


def test_chunks_of_tokens_are_alike():
    for total, limit in ((1, 413), (413, 413), (414, 413), (2048, 413), (10, 3), (0, 5)):
        rows = even_rows(total, limit)
        assert 1 <= rows <= limit
        assert -(-total // rows) == -(-total // limit)  # as few chunks as with the limit
        lacking = rows - ((total - 1) % rows + 1)  # of the last chunk
        assert total == 0 or lacking < -(-total // rows)
