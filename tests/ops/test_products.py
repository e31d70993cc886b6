"""The three products of a chunk against float64, in each way they are computed on a CPU."""

import platform

import pytest
import torch

from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.products import Products, multiplies_natively

SHAPES = [
    (1, 1, 2),
    (1, 7, 3),
    (3, 33, 10),
    (64, 1000, 64),
    (100, 1061, 96),
    (130, 515, 258),
    (5, 300, 33),
    (1100, 70, 1030),
]
X86 = platform.machine() in ("x86_64", "AMD64")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "cpu", "cpu with torch's products"])
def backend(request, monkeypatch):
    name, _, products = request.param.partition(" with ")
    monkeypatch.setenv("LONGPO_OPS_PRODUCTS", "torch" if products else "blocks")
    try:
        return choose_backend(torch.device("cpu"), torch.float32, name).name
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, vocab, width", SHAPES)
def test_products_are_float32_sums_of_exact_products(backend, dtype, n, vocab, width):
    """Each sum is within depth * eps of the sum of its terms' magnitudes: no operand is rounded, nothing sums in 16 bits."""
    torch.manual_seed(n)
    products = Products(torch.randn(vocab, width).to(dtype), dtype, backend)
    h = torch.randn(n, width).to(dtype).to(products.dtype)
    dz = torch.randn(n, 2 * vocab).to(products.dtype)[:, :vocab]  # the pitch of a 16-bit gradient in a float32 tile
    z = torch.full((n, vocab + 3), float("nan"), dtype=products.tile_dtype)[:, :vocab]
    dw = torch.randn(vocab, width, dtype=products.tile_dtype)
    new = torch.full_like(dw, float("nan"))
    weight, before = products.weight.double(), dw.double().clone()

    products.logits_(h, z)
    products.add_weight_gradient_(dw, dz, h)
    products.add_weight_gradient_(new, dz, h, True)
    dh = products.hidden_gradient(dz)

    eps = torch.finfo(products.tile_dtype).eps
    for name, result, a, b, start in (
        ("logits", z, h.double(), weight.T, 0.0),
        ("dw", dw, dz.double().T, h.double(), before),
        ("new dw", new, dz.double().T, h.double(), 0.0),
        ("dh", dh, dz.double(), weight, 0.0),
    ):
        truth, magnitude = a @ b + start, a.abs() @ b.abs() + abs(start)
        allowed = (a.shape[1] + 1) * eps * magnitude + torch.finfo(result.dtype).eps * truth.abs()
        assert ((result.double() - truth).abs() <= allowed).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_equal_with_any_number_of_threads(backend, dtype, monkeypatch):
    monkeypatch.setenv("LONGPO_OPS_PRODUCTS", "blocks")
    n, vocab, width = 150, 1031, 70  # more threads than blocks of columns
    products = Products(torch.randn(vocab, width).to(dtype), dtype, backend)
    if not products.native:
        pytest.skip("torch's own products")
    h, dz = torch.randn(n, width).to(dtype), torch.randn(n, vocab).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 5):
            torch.set_num_threads(threads)
            z, dw = torch.empty(n, vocab), torch.empty(vocab, width)
            products.add_weight_gradient_(dw, dz, h, True)
            results.append((products.logits_(h, z), products.hidden_gradient(dz), dw))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_reads_nothing_beyond_its_operands(backend, dtype):
    """Neighbours in memory are NaN, which even a product with zero would show."""
    n, vocab, width = 37, 517, 34
    products = Products(around(torch.randn(vocab, width).to(dtype)), dtype, backend)
    h, dz = (around(torch.randn(n, m).to(products.dtype)) for m in (width, vocab))
    z, dw = around(torch.zeros(n, vocab)), around(torch.zeros(vocab, width))
    products.logits_(h, z)
    products.add_weight_gradient_(dw, dz, h)
    dh = products.hidden_gradient(dz)
    assert all(x.isfinite().all() for x in (z, dw, dh))
    for inner in (z, dw):
        assert inner._base.isnan().sum() == inner._base.numel() - inner.numel()


def around(x):
    """x as the inside of a matrix of NaN."""
    memory = x.new_full((x.shape[0] + 2, x.shape[1] // 2 * 2 + 6), float("nan"))
    inside = memory[1:-1, 2 : 2 + x.shape[1]]
    inside.copy_(x)
    return inside


def test_what_the_processor_multiplies_itself(backend):
    weight = torch.randn(8, 4)
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    narrow = Products(weight.bfloat16(), torch.bfloat16, backend)
    assert narrow.native == (backend == "cpu" and able)
    assert narrow.dtype == (torch.bfloat16 if narrow.native else torch.float32)
    assert multiplies_natively(weight, torch.float32, backend) == (backend == "cpu" and X86)
    assert multiplies_natively(weight[:, :3], torch.float32, backend) == (backend == "cpu" and X86)
    assert not multiplies_natively(weight.bfloat16()[:, :3], torch.bfloat16, backend)  # pairs of columns are multiplied
    assert not multiplies_natively(weight.t(), torch.float32, backend)
    assert not multiplies_natively(weight, torch.bfloat16, backend)
    assert not multiplies_natively(weight.double(), torch.float64, backend)


def test_wrong_operands_are_refused():
    choose = choose_backend(torch.device("cpu"), torch.float32)
    if choose.name != "cpu":
        pytest.skip("the C++ back-end is not here")
    h, w = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    ops = torch.ops.longpo_cpu
    assert not ops.multiplies(torch.float64)
    for arguments in ((h, w[:, :2], torch.empty(3, 5)), (h, w, torch.empty(3, 6)), (h, w, torch.empty(3, 5).double())):
        with pytest.raises(ValueError):
            ops.logits_(*arguments)
        with pytest.raises(ValueError):
            ops.logits_by_slices_(*(x.float() if x.dtype == torch.bfloat16 else x for x in arguments))
    with pytest.raises(ValueError):
        ops.logits_by_slices_(h, w, torch.empty(3, 5))
    for arguments in (
        (torch.empty(5, 4), h, h[:2]),
        (torch.empty(4, 4), h[:, :3], h),
        (torch.empty(5, 4), w, h.float()),
    ):
        with pytest.raises(ValueError):
            ops.add_weight_gradient_(*arguments, False)
    for arguments in ((h, w, torch.empty(3, 4)), (h[:, :3], w[:3], torch.empty(3, 5)), (h[:, :3], w[:3].float(), h)):
        with pytest.raises(ValueError):
            ops.hidden_gradient_(*arguments[:2], None, arguments[2])
