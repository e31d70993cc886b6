"""The back-ends of this machine as a fixture, a fixed seed, and the workspace that forces some rows at a time."""

import os

import pytest
import torch

from longpo_ops.ops.dispatch import NAMES, choose_backend
from longpo_ops.ops.sweep import workspace_of

HOME = {"torch": "cpu", "cpu": "cpu", "triton": "cuda", "cuda": "cuda"}  # scaled takes bfloat16 alone


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in NAMES if name in HOME and (HOME[name] == "cpu" or torch.cuda.is_available())])
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
    """workspace(weight, rows, tiles=1) -> bytes that hold just so many rows of logits at a time; None for all rows."""

    def bytes_for(weight: torch.Tensor, rows: int | None, tiles: int = 1) -> int | None:
        return None if rows is None else workspace_of(rows, weight, weight.dtype, tiles)

    return bytes_for
