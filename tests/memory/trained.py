"""A network of 16-bit weights, gradients that depend on the step only, and training with both, for tests of optimizers."""

import torch
from torch import nn


def network(dtype=torch.bfloat16, seed=0) -> nn.Sequential:
    """Two layers; the first weight has 1.5 pieces, the biases are too small for 8-bit states."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8)).to(dtype)


def gradients(model: nn.Module, step: int) -> None:
    """Sets gradients that depend on the step only, in each weight's dtype."""
    random = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=random).to(p.dtype)


def train(model, optimizer, steps=range(50)):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in steps:
        gradients(model, step)
        optimizer.step()
        scheduler.step()
    return model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
