"""The back-ends of this machine as a fixture, a fixed seed, and the smallest workspace that forces a row at a time."""

import os

import pytest
import torch

from longpo_ops.ops.dispatch import NAMES, choose_backend
from longpo_ops.ops.sweep import scratch_bytes

HOME = {"torch": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in NAMES if HOME[name] == "cpu" or torch.cuda.is_available()])
def backend(request) -> str:
    """The name of a back-end that runs here: torch and cpu, and with a GPU triton and cuda."""
    name = request.param
    try:
        choose_backend(torch.device(HOME[name]), torch.float32, name)
    except ValueError as problem:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(problem))
    return name


@pytest.fixture
def device(backend) -> str:
    return HOME[backend]


@pytest.fixture
def workspace():
    """workspace(weight, rows, tiles=1) -> bytes that hold just so many rows of logits at a time."""

    def bytes_for(weight: torch.Tensor, rows: int, tiles: int = 1, dtype: torch.dtype | None = None) -> int:
        fixed, row = scratch_bytes(weight, dtype or weight.dtype, tiles)
        return fixed + rows * row

    return bytes_for
