"""Bytes a weight: the numbers that are told, and those that an optimizer really allocates."""

import pytest
import torch
from torch import nn

from longpo_ops.memory.cost import weight_bytes
from longpo_ops.memory.optimizer import OPTIMS, float32_gradients

pytest.importorskip("torchao")

TOLD = [  # states, mixed_precision, accumulation, fsdp, bytes
    ("8bit", "no", 1, True, 8.03125),
    ("8bit", "no", 1, False, 8.03125),
    ("8bit", "no", 4, True, 10.03125),
    ("float32", "no", 4, True, 16),
    ("8bit", "bf16", 1, True, 10.03125),
    ("float32", "bf16", 4, True, 16),
    ("float32", "bf16", 1, False, 14),
    (None, "bf16", 1, True, 16),
    (None, "no", 1, True, 8),
]


@pytest.mark.parametrize(("states", "precision", "accumulation", "fsdp", "expected"), TOLD)
def test_bytes_of_bfloat16_weights(states, precision, accumulation, fsdp, expected):
    settings = dict(mixed_precision=precision, accumulation=accumulation, fsdp=fsdp)
    assert weight_bytes(torch.bfloat16, states, **settings).total == expected


def test_told_in_words():
    told = "8.031 bytes a weight (2 weight, 2 master, 2.03 states, 2 gradient)"
    assert str(weight_bytes(torch.bfloat16, "8bit")) == told


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("optim", "states"), [("adamw_torch", "float32"), ("adamw_torch", "8bit"), ("rmsprop", "float32")]
)
@pytest.mark.parametrize("master", ["residue", "float32"])
def test_they_are_what_an_optimizer_allocates(optim, states, master, dtype, accumulation):
    weight = nn.Parameter(torch.randn(64, 512, dtype=dtype))
    if accumulation > 1:
        float32_gradients([weight])
    optimizer = OPTIMS[optim]([weight], lr=1e-3, states=states, master=master)
    weight.square().sum().backward()
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    state = {name: value.nbytes for name, value in optimizer.state[weight].items() if name not in ("step", "shards")}
    masters = sum(nbytes for name, nbytes in state.items() if name in ("residue", "master"))
    counted = weight.nbytes, masters, sum(state.values()) - masters, weight.grad.nbytes
    expected = weight_bytes(dtype, states, master, optim=optim, accumulation=accumulation)
    assert tuple(nbytes / weight.numel() for nbytes in counted) == expected
