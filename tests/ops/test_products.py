"""The three products of a chunk against float64, in each way they are computed on a CPU."""

import pytest
import torch

from longpo_ops.ops.dispatch import choose_backend
from longpo_ops.ops.products import Products, multiplies_bfloat16

SHAPES = [(1, 1, 2), (1, 7, 3), (3, 33, 10), (64, 1000, 64), (100, 1061, 96), (130, 515, 258), (5, 300, 33)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", "cpu"])
def backend(request):
    try:
        return choose_backend(torch.device("cpu"), torch.float32, request.param).name
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
    weight, before = products.weight.double(), dw.double().clone()

    products.logits_(h, z)
    products.add_weight_gradient_(dw, dz, h)
    dh = products.hidden_gradient(dz)

    eps = torch.finfo(products.tile_dtype).eps
    for name, result, a, b, start in (
        ("logits", z, h.double(), weight.T, 0.0),
        ("dw", dw, dz.double().T, h.double(), before),
        ("dh", dh, dz.double(), weight, 0.0),
    ):
        truth, magnitude = a @ b + start, a.abs() @ b.abs() + abs(start)
        allowed = (a.shape[1] + 1) * eps * magnitude + torch.finfo(result.dtype).eps * truth.abs()
        assert ((result.double() - truth).abs() <= allowed).all(), name


def test_bfloat16_is_multiplied_where_the_processor_can(backend):
    weight = torch.randn(8, 4).bfloat16()
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    native = backend == "cpu" and able
    assert Products(weight, torch.bfloat16, backend).dtype == (torch.bfloat16 if native else torch.float32)
    assert not multiplies_bfloat16(weight[:, :3], torch.bfloat16, backend)  # pairs of columns are multiplied
    assert not multiplies_bfloat16(weight.t(), torch.bfloat16, backend)
    assert not multiplies_bfloat16(weight.float(), torch.bfloat16, backend)


def test_wrong_operands_are_refused():
    choose = choose_backend(torch.device("cpu"), torch.float32)
    if choose.name != "cpu":
        pytest.skip("the C++ back-end is not here")
    h, w = torch.randn(3, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    ops = torch.ops.longpo_cpu
    for arguments in ((h, w[:, :2], torch.empty(3, 5)), (h, w, torch.empty(3, 6)), (h, w, torch.empty(3, 5).double())):
        with pytest.raises(ValueError):
            ops.logits_(*arguments)
    for arguments in (
        (torch.empty(5, 4), h, h[:2]),
        (torch.empty(4, 4), h[:, :3], h),
        (torch.empty(5, 4), w, h.float()),
    ):
        with pytest.raises(ValueError):
            ops.add_weight_gradient_(*arguments)
