"""The Triton form of the sparse hidden gradient beside the PyTorch form, interpreted:

    TRITON_INTERPRET=1 pytest tests/kernels/test_sparse.py

Columns are the same ones, sums and shares within rounding; gradients are judged against float64 by error budget beside the
PyTorch form's. Not covered: what is lost by leaving columns out.
"""

import importlib.util
import math
import mmap
import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported, in a process of its own", allow_module_level=True)
if importlib.util.find_spec("triton") is None and os.environ.get("CI") != "true":
    pytest.skip("triton is not installed", allow_module_level=True)

from longpo_ops.kernels import sparse as kernels
from longpo_ops.ops import products as products_module
from longpo_ops.ops.products import Products
from longpo_ops.ops.sparse import RULE, Kept, group_size, keep_columns_
from longpo_ops.ops.tiles import LogitMap, TorchTiles
from tests.budget import check_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")  # numpy on NaN and infinities
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    (RULE.least_rows, 640, 32, torch.float32),
    (70, 701, 24, torch.bfloat16),
    (131, 333, 40, torch.float32),
    (131, 333, 40, torch.bfloat16),
    (70, 701, 24, torch.float16),
]
MAP_NORESERVE = 0x4000


def gradient_tile(n: int, V: int, dtype: torch.dtype, flat: bool = False, seed: int = 0, gap: int = 3) -> Tensor:
    """dz (n, V) as tiles make it, in rows of float32 that lie `gap` apart: peaked rows over an uneven vocabulary, weights of
    both signs, every ninth 0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.full((n, V + gap), math.nan)[:, :V]
    z.copy_(torch.randn(n, V, generator=generator))
    g = torch.randn(n, generator=generator) * 3
    rank = torch.randperm(V, generator=generator)
    seen = rank.argsort()[: V // 5]  # what labels and guesses are among
    labels, *guesses = (seen[torch.randint(len(seen), (n,), generator=generator)] for _ in range(4))
    if not flat:
        z -= 2 * torch.log(1.0 + rank)
        z.scatter_(1, torch.stack(guesses, 1), 4.0)
        g[::9] = 0
    return TorchTiles().logps_gradient_(z, labels, g, LogitMap(), dtype)[1]


def copy_of(dz: Tensor) -> Tensor:
    """In memory of the same layout."""
    n, V = dz.shape
    wide = torch.full((n, dz.stride(0)), math.nan, dtype=dz.dtype)
    return wide[:, :V].copy_(dz)


@pytest.fixture
def head(monkeypatch):
    """(V, H, dtype) -> Products with the operands that they have on CUDA."""
    monkeypatch.setattr(products_module, "operand_dtype", lambda device, dtype, native: dtype)

    def make(V: int, H: int, dtype: torch.dtype) -> Products:
        weight = torch.randn(V, H, generator=torch.Generator().manual_seed(V)) / H**0.5
        return Products(weight.to(dtype), dtype)

    return make


def true_gradient(dz: Tensor, kept: Kept, weight: Tensor) -> Tensor:
    """In float64: what the kept columns of the whole dz and the sums of groups stand for."""
    group = torch.arange(len(dz)) // group_size(len(dz))
    of_groups = kept.sums.double() @ weight.double()
    return (
        dz[:, kept.columns].double() @ weight[kept.columns].double() + kept.shares.double()[:, None] * of_groups[group]
    )


@pytest.mark.parametrize(("n", "V", "H", "dtype"), CASES)
def test_beside_the_pytorch_form(head, n, V, H, dtype):
    dz, products = gradient_tile(n, V, dtype), head(V, H, dtype)
    whole, plain = dz.clone(), keep_columns_(dz.clone())
    kept = kernels.keep_columns_(dz, RULE)
    K = kept.count.item()
    assert 0.1 * V < K < 0.5 * V
    assert kept.columns[:K].tolist() == plain.columns.tolist()
    if dtype == torch.float32:
        assert kept.shift is None
    else:
        moved = dz.as_strided((n, K), (dz.stride(0), 1), dz.storage_offset() + kept.shift)
        assert torch.equal(moved, plain.dz) and kept.shift % 16 == 0
    assert torch.equal(dz, whole), "what the head's gradient is made of has changed"
    torch.testing.assert_close(kept.shares, plain.shares, rtol=2e-5, atol=1e-7)
    resolution = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
    torch.testing.assert_close(kept.sums.float(), plain.sums, rtol=resolution, atol=2e-7)
    assert not kept.sums[:, plain.columns].any()

    # As large as the rest, or this test would not see what is left to the groups.
    kept, plain = (each._replace(shares=3e4 * each.shares) for each in (kept, plain))
    found = kernels.product(dz, kept, products.weight, products.hidden_gradient(kept.sums))
    true = true_gradient(whole, plain, products.weight)
    of_groups = true - true_gradient(whole, plain._replace(shares=0 * plain.shares), products.weight)
    assert of_groups.norm() > 0.05 * true.norm()
    check_budget("dh", found, plain.gradient(products), true, draws=True)


def test_two_runs_give_the_same_bits(head):
    dz, products = gradient_tile(70, 333, torch.bfloat16), head(333, 24, torch.bfloat16)
    assert torch.equal(*(kernels.sparse_gradient(x, products, RULE) for x in (copy_of(dz), dz)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_flat_rows_get_the_dense_product(head, dtype):
    n, V, H = 70, 333, 24
    dz, products = gradient_tile(n, V, dtype, flat=True), head(333, H, dtype)
    assert keep_columns_(dz.clone()) is None
    kept = kernels.keep_columns_(dz, RULE)
    assert kept.count.item() == V and kept.columns.tolist() == list(range(V))
    assert not kept.sums.any() and not kept.shares.any()
    found = kernels.sparse_gradient(dz, products, RULE)
    check_budget("dh", found, products.hidden_gradient(dz), dz.double() @ products.weight.double(), draws=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_where_it_is(head, bad, dtype):
    dz, products = gradient_tile(70, 333, dtype), head(333, 24, dtype)
    dz[5, 17] = bad
    dz[8] = math.nan
    whole = dz.clone()
    assert kernels.keep_columns_(dz, RULE).count.item() == 333
    found = kernels.sparse_gradient(dz, products, RULE)
    rows = [5, 8]
    assert not found[rows].isfinite().any()
    check_budget("dh", found, products.hidden_gradient(whole), whole.double() @ products.weight.double(), draws=True)


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_rows_of_any_size_have_their_own_scale(size):
    """Squares of these leave float32. Beside a number 1e5 times the rest, the rest is still what counts."""
    dz = gradient_tile(70, 333, torch.float32)
    dz[3::4] *= size
    dz[2::4, 7] = 1e5 * dz[2::4].abs().amax(1)
    columns = keep_columns_(dz.clone()).columns.tolist()
    kept = kernels.keep_columns_(dz, RULE)
    assert kept.columns[: kept.count.item()].tolist() == columns and len(columns) < 200


def test_nothing_but_zeros():
    dz = torch.zeros(70, 100)
    kept = kernels.keep_columns_(dz, RULE)
    assert kept.count.item() == 0 and not kept.sums.any() and not kept.shares.any()


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(kernels.EXACT, torch.float32), *((config, torch.bfloat16) for config in set(kernels.PRODUCTS.values()))],
    ids=str,
)
def test_every_configuration_of_the_product(head, config, dtype):
    """Tiles of the product that are full, and such that are not."""
    n, V, H = 150, 500, 300
    dz, products = gradient_tile(n, V, dtype), head(V, H, dtype)
    plain = keep_columns_(dz.clone())
    true = true_gradient(dz, plain, products.weight)
    kept = kernels.keep_columns_(dz, RULE)
    found = kernels.product(dz, kept, products.weight, products.hidden_gradient(kept.sums), config)
    check_budget("dh", found, plain.gradient(products), true, draws=True)


def test_16_bit_rows_without_a_free_half_are_gathered(head):
    dz, products = gradient_tile(70, 333, torch.bfloat16), head(333, 24, torch.bfloat16)
    narrow = torch.full((70, 340), 7.0, dtype=torch.bfloat16)
    tight = narrow[:, :333].copy_(dz)
    assert kernels.keep_columns_(tight, RULE).shift is None
    assert torch.equal(*(kernels.sparse_gradient(x, products, RULE) for x in (tight, dz)))
    assert (narrow[:, 333:] == 7).all(), "a kernel wrote between the rows"


def test_offsets_beyond_2_to_the_31(head):
    pitch, V = 2**26, 333
    near, products = gradient_tile(70, V, torch.bfloat16), head(V, 24, torch.bfloat16)
    space = mmap.mmap(-1, 2 * 70 * pitch, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    far = torch.frombuffer(space, dtype=torch.bfloat16).as_strided((70, V), (pitch, 1)).copy_(near)
    assert torch.equal(*(kernels.sparse_gradient(x, products, RULE) for x in (far, near)))


def test_few_rows_and_columns_that_are_no_neighbours_get_the_dense_product(head):
    products = head(333, 24, torch.float32)
    dz = gradient_tile(RULE.least_rows - 1, 333, torch.float32)
    assert torch.equal(kernels.sparse_gradient(dz, products, RULE), products.hidden_gradient(dz))
    dz = gradient_tile(70, 333, torch.float32)
    products.weight = products.weight.t().contiguous().t()
    assert torch.equal(kernels.sparse_gradient(dz, products, RULE), products.hidden_gradient(dz))


@pytest.mark.parametrize(
    ("dz", "message"),
    [
        (torch.randn(70, 9).double(), "dz: expected float32, float16 or bfloat16"),
        (torch.randn(9, 70).T, "dz: expected contiguous rows"),
    ],
)
def test_bad_input_is_named(dz, message):
    with pytest.raises(ValueError, match=message):
        kernels.keep_columns_(dz, RULE)
