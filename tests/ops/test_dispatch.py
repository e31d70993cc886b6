"""Which back-end runs, and what it says."""

import functools
import warnings

import pytest
import torch

from longpo_ops import explain_backend, linear_logprobs
from longpo_ops.ops import dispatch
from longpo_ops.ops.tiles import TorchTiles

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.delenv("LONGPO_OPS_BACKEND", raising=False)
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.fixture
def without_compiler(monkeypatch):
    def unusable():
        raise dispatch.Unusable("no C++ compiler: g++ not found")

    load = dispatch._load.__wrapped__
    monkeypatch.setattr(dispatch, "_load_cpu", unusable)
    monkeypatch.setattr(dispatch, "_load", functools.cache(load))


def test_float64_runs_on_torch_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(dispatch.choose_backend(CPU, torch.float64), TorchTiles)


def test_the_argument_beats_the_variable(monkeypatch):
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "triton")
    assert dispatch.choose_backend(CPU, torch.float32, "torch").name == "torch"
    with pytest.raises(ValueError, match="backend='triton' cannot run here: it runs on cuda tensors"):
        dispatch.choose_backend(CPU, torch.float32)
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "torch")
    assert dispatch.choose_backend(CPU, torch.float32).name == "torch"
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend='fast': expected one of torch, cpu, triton, cuda"):
        dispatch.choose_backend(CPU, torch.float32)


def test_the_variable_reaches_the_ops(monkeypatch):
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "cuda")
    with pytest.raises(ValueError, match="backend='cuda' cannot run here"):
        linear_logprobs(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]))


def test_exponentials_are_refused_but_for_bfloat16():
    with pytest.raises(ValueError, match="backend='scaled' cannot run here: it runs on cuda tensors"):
        dispatch.choose_backend(CPU, torch.bfloat16, "scaled")
    reason = dispatch._refusal("scaled", torch.device("cuda"), torch.float16)
    assert "bfloat16" in reason and "these inputs are torch.float16" in reason


def test_without_a_compiler_it_warns_once_and_goes_on(without_compiler):
    with pytest.warns(UserWarning, match="'cpu' is not used on cpu: no C.. compiler"):
        assert dispatch.choose_backend(CPU, torch.float32).name == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose_backend(CPU, torch.float32).name == "torch"
    with pytest.raises(ValueError, match=r"backend='cpu' cannot run here: no C.. compiler.*Leave backend unset"):
        dispatch.choose_backend(CPU, torch.float32, "cpu")
    assert "cpu    no C++ compiler" in explain_backend("cpu")


def test_explanations(monkeypatch):
    text = explain_backend("cpu", torch.float64)
    assert text.splitlines()[0] == "cpu, float64: torch"
    assert "float64 runs on the torch back-end only" in text and "it runs on cuda tensors" in text
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "torch")
    assert explain_backend("cpu").splitlines()[0] == "cpu, float32: torch (LONGPO_OPS_BACKEND)"
    monkeypatch.setenv("LONGPO_OPS_BACKEND", "fast")
    with pytest.raises(ValueError, match="backend='fast': expected one of"):
        explain_backend("cpu")


def test_devices_that_are_none_or_not_here_are_told():
    with pytest.raises(ValueError, match="device='gpu': expected a torch device"):
        explain_backend("gpu")
    if not torch.cuda.is_available():
        assert "no CUDA device here" in explain_backend("cuda").splitlines()[0]
