"""Other libraries' mean cross-entropy of hidden (N, H), weight (V, H), labels (N,): what they are called, need and cost.

A run is run(hidden, weight, labels) -> loss (), its gradients left in hidden.grad and weight.grad. Loading one raises
ImportError where its library is not there. Most compile their Triton kernels on the device: `compiles` is a guess from a CPU.

Tests: tests/benchmarks/gpu/test_speed.py.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, metadata, util
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .setting import NO_GPU, Setting

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def backwards(loss: Run) -> Run:
    """The loss with its backward."""

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        value = loss(hidden, weight, labels)
        value.backward()
        return value.detach()

    return run


class Peer(NamedTuple):
    """`times` and `each`: a run takes times x what 6NHV take at the matmul ceiling, and each seconds beside. `scratch`:
    (N, V) -> bytes beyond inputs, gradients and a float32 gradient of the head."""

    name: str
    load: Callable[[], Run]
    package: str  # its distribution
    module: str  # or module:function, where only newer versions have that
    times: float
    each: float = 0.0
    compiles: float = 0.0  # seconds of the first call, with the import
    needs_gpu: bool = True
    expected: bool = True  # on the GPU machine: make gpu-pack carries it
    long: bool = True  # asked at the longer size too
    scratch: Callable[[int, int], int] = lambda n, vocab: 2 << 30

    def absence(self, setting: Setting) -> str | None:
        """Why it cannot be asked. Of another machine that is what is expected there."""
        if self.needs_gpu and not setting.on_gpu:
            return NO_GPU
        module, _, function = self.module.partition(":")
        if not (self.expected if setting.elsewhere else util.find_spec(module)):
            return f"skipped: {self.package} is not installed"
        if function and not hasattr(import_module(module), function):
            return f"skipped: {self.package} {self.version} has no {function}"
        return None

    @property
    def version(self) -> str | None:
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return None


# ---- how each is called ----------------------------------------------------------------------------------------------


def _naive() -> Run:
    return backwards(lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels))


CHUNKED = "torch.nn.functional:linear_cross_entropy"


def _torch_chunked() -> Run:
    return backwards(partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()))  # None: not chunked


TRAINER = "trl.trainer.utils"


@contextlib.contextmanager
def _without_trainer() -> Iterator[None]:
    """TRL's backward takes one function from its trainer, which asks for `datasets`. Without ZeRO-3 that function is
    nullcontext; here it stands alone for as long as the block runs."""
    if TRAINER in sys.modules:
        yield
        return
    alone = ModuleType(TRAINER)
    alone.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
    sys.modules[TRAINER] = alone
    try:
        yield
    finally:
        del sys.modules[TRAINER]


def trl_head() -> Run:
    """TRL's fused head, as its trainers call it: hidden (N, H), weight (V, H), labels (N,) -> log-probs (N,), float32."""
    from trl.kernels import ChunkedLogProbFunction

    columns = 32_768  # of a tile, as its trainers choose
    return lambda hidden, weight, labels: ChunkedLogProbFunction.apply(
        hidden, weight, None, labels, 1.0, columns, None, 1.0, ("log_probs",)
    )[0]


def _trl() -> Run:
    head = trl_head()

    def run(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with _without_trainer():
            loss = -head(hidden, weight, labels).sum() / labels.numel()
            loss.backward()
        return loss.detach()

    return run


def _liger() -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    function = LigerFusedLinearCrossEntropyLoss()
    return backwards(lambda hidden, weight, labels: function(weight, hidden, labels))


CCE = ("cut-cross-entropy", "cut_cross_entropy")


def _cce(**options) -> Run:
    from cut_cross_entropy import linear_cross_entropy

    return backwards(partial(linear_cross_entropy, **options))


def _quack() -> Run:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return backwards(partial(chunked_linear_cross_entropy, reduction="mean"))


# Costs are guesses until a GPU has been seen. The naive form keeps float32 logits, their log-softmax and its gradient; CCE
# leaves small probabilities out of its gradients unless told otherwise.
PEERS = (
    Peer("naive PyTorch", _naive, "torch", "torch", 1.5, needs_gpu=False, scratch=lambda n, vocab: 12 * n * vocab),
    Peer("TRL", _trl, "trl", "trl", 1.5, compiles=3.0, needs_gpu=False),
    Peer("Liger", _liger, "liger-kernel", "liger_kernel", 1.4, each=0.12, compiles=6.0),
    Peer("CCE", _cce, *CCE, 2.0, compiles=14.0),
    Peer("CCE, all probabilities", partial(_cce, filter_eps=None), *CCE, 2.5, compiles=3.0, long=False),
    Peer("PyTorch chunked", _torch_chunked, "torch", CHUNKED, 2.0, needs_gpu=False, expected=False),
    Peer(
        "QuACK", _quack, "quack-kernels", "quack", 1.2, compiles=30.0, expected=False,
        scratch=lambda n, vocab: 4 * min(n, 4096) * vocab + (2 << 30),
    ),
)  # fmt: skip
