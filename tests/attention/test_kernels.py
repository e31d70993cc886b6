"""The GPU kernels' calls: run where there is a GPU, otherwise checked as far as a machine without one can."""

import types
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from longpo_ops.attention import kernels
from longpo_ops.attention.kernels import BLOCKWISE, CPU_FLASH, CUDNN, FLASH_ATTN, TORCH_FLASH, make_case
from tests.budget import check_budget

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU_KERNELS = pytest.mark.parametrize("kernel", [CUDNN, TORCH_FLASH, FLASH_ATTN], ids=lambda k: k.name)


def make_inputs(rows, keys, dtype=torch.bfloat16, device="cpu", heads=4, kv_heads=2, size=32):
    """q, k, v as transformers gives them: views of (B, T, heads, size)."""
    shapes = [(2, rows, heads), (2, keys, kv_heads), (2, keys, kv_heads)]
    return [torch.randn(*shape, size, dtype=dtype, device=device).transpose(1, 2) for shape in shapes]


def forward_backward(kernel, q, k, v, dout, case):
    out, lse = kernel.forward(q, k, v, case)
    return out, lse, *kernel.backward(dout, q, k, v, out, lse, case)


@pytest.mark.parametrize("rows, keys, causal", [(100, 100, True), (7, 100, False)])
@pytest.mark.parametrize("kernel", [CUDNN, TORCH_FLASH], ids=lambda k: k.name)
def test_cuda_operators_take_our_arguments(kernel, rows, keys, causal):
    """PyTorch's own shape functions run on fake CUDA tensors: schema, argument order, devices, shapes and dtypes."""
    with FakeTensorMode():
        q, k, v = make_inputs(rows, keys, device="cuda")
        case = make_case(rows, keys, 0 if causal else keys, 0.1, None, None)
        assert case.causal == causal
        out, lse, dq, dk, dv = forward_backward(kernel, q, k, v, torch.empty_like(q), case)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
    for grad, x in ((dq, q), (dk, k), (dv, v)):
        assert grad.shape == x.shape and grad.dtype == x.dtype


@pytest.fixture
def flash_attn_stand_in(monkeypatch):
    """Functions with flash-attn 2.8's signatures and its layout (B, T, heads, D), computed by our blockwise kernel.

    The package needs a GPU: this holds the layout, the argument names and the meaning of its window, not its numbers.
    """

    def case_of(q, k, softmax_scale, causal, window_size_left, softcap):
        window = None if window_size_left < 0 else window_size_left + 1
        return make_case(q.shape[1], k.shape[1], 0 if causal else k.shape[1], softmax_scale, window, softcap)

    def forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        case = case_of(q, k, softmax_scale, causal, window_size_left, softcap)
        out, lse = BLOCKWISE.forward(*(x.transpose(1, 2) for x in (q, k, v)), case)
        return out.transpose(1, 2).contiguous(), lse, None, None

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        case = case_of(q, k, softmax_scale, causal, window_size_left, softcap)
        grads = BLOCKWISE.backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), softmax_lse, case)
        for given, grad in zip((dq, dk, dv), grads, strict=True):
            given.copy_(grad.transpose(1, 2))

    module = types.SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)
    monkeypatch.setattr(kernels, "_flash_attn", lambda: module)


@pytest.mark.parametrize("window, softcap", [(None, None), (9, None), (None, 2.0), (9, 2.0)])
def test_flash_attn_is_called_in_its_own_layout(flash_attn_stand_in, window, softcap):
    for rows, keys, offset in ((30, 30, 0), (5, 30, 30)):
        if window and offset:
            continue
        q, k, v = make_inputs(rows, keys, torch.float32)
        case = make_case(rows, keys, offset, 0.2, window, softcap)
        dout = torch.randn_like(q)
        ours = forward_backward(FLASH_ATTN, q, k, v, dout, case)
        for a, b in zip(ours, forward_backward(BLOCKWISE, q, k, v, dout, case), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_flash_attn_says_what_it_cannot_do(flash_attn_stand_in):
    q, k, v = make_inputs(30, 30)
    case = partial(make_case, 30, 30, scale=0.2)
    assert FLASH_ATTN.refusal(q, k, v, case(0, window=9, softcap=3.0)) is None
    assert "square causal" in FLASH_ATTN.refusal(q, k, v, case(40, window=9, softcap=None))
    assert "bfloat16 or float16" in FLASH_ATTN.refusal(q.float(), k, v, case(0, window=None, softcap=None))


def test_flash_attn_is_refused_when_absent_or_old(monkeypatch):
    q, k, v = make_inputs(8, 8)
    case = make_case(8, 8, 0, 1.0, None, None)
    for package in (None, types.SimpleNamespace(__version__="2.6.3")):
        modules = {"flash_attn": package, "flash_attn.flash_attn_interface": package}

        def load(name, modules=modules):
            if modules[name] is None:
                raise ImportError(name)
            return modules[name]

        kernels._flash_attn.cache_clear()
        monkeypatch.setattr(kernels, "import_module", load)
        assert "not installed at version 2.7" in FLASH_ATTN.refusal(q, k, v, case)
    kernels._flash_attn.cache_clear()


def test_backward_takes_the_logsumexp_of_a_larger_key_set():
    """Two calls over halves of the keys, with the output and logsumexp of all, add up to one call: the whole idea."""
    q, k, v = make_inputs(6, 40, torch.float64)
    dout = torch.randn_like(q)
    whole = make_case(6, 40, 40, 0.3, None, None)
    half = make_case(6, 20, 20, 0.3, None, None)
    for kernel in (CPU_FLASH, BLOCKWISE):
        out, lse, dq, dk, dv = forward_backward(kernel, q, k, v, dout, whole)
        parts = [kernel.backward(dout, q, k[:, :, s], v[:, :, s], out, lse, half) for s in (slice(20), slice(20, 40))]
        torch.testing.assert_close(dq, parts[0][0] + parts[1][0])
        torch.testing.assert_close(dk, torch.cat([p[1] for p in parts], 2))
        torch.testing.assert_close(dv, torch.cat([p[2] for p in parts], 2))


@needs_gpu
@GPU_KERNELS
@pytest.mark.parametrize("rows, keys, offset", [(300, 300, 0), (33, 300, 300)])
def test_gpu_kernels_equal_the_blockwise_kernel(kernel, rows, keys, offset):
    q, k, v = make_inputs(rows, keys, device="cuda")
    case = make_case(rows, keys, offset, 0.2, None, None)
    if refusal := kernel.refusal(q, k, v, case):
        pytest.skip(f"{kernel.name} {refusal}")
    dout = torch.randn_like(q)
    truth = forward_backward(BLOCKWISE, *(x.double() for x in (q, k, v, dout)), case)
    plain = forward_backward(BLOCKWISE, q, k, v, dout, case)
    for a, b, c in zip(forward_backward(kernel, q, k, v, dout, case), plain, truth, strict=True):
        check_budget(kernel.name, a, b, c, draws=True)
