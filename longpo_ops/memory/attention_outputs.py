"""Attention outputs kept from a layer's forward for its recomputation, which then skips the attention kernels.

    forward        o, l = kernel(q, k, v)      o (B, H, T, D) and l (B, H, T) are stored
    recomputation  o, l = what was stored      bitwise the same; all around it runs as ever

Works below autograd, on the operators themselves, so it serves any attention whose kernel is one operator: PyTorch's
own, flash-attn's, and the parts that shared-prefix attention merges. Memory: as much as the outputs, wherever `keep`
puts them. A layer's i-th kernel call of the forward is its i-th of every recomputation. Not covered: attention written
out in several operators, which has no output to keep.

Tests: tests/memory/test_offload.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KERNELS = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "flash_attn::_flash_attn_forward",
}
SMALL = 4096  # bytes: random states and lengths stay where they are


class _Keep(TorchDispatchMode):
    """Stores what attention kernels return, where `keep` takes it."""

    def __init__(self, keep: Callable[[Tensor], object | None], calls: list):
        super().__init__()
        self.keep, self.calls = keep, calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        if function.name() in KERNELS:
            self.calls.append(self._stored(results))
        return results

    def _stored(self, results: tuple) -> list | None:
        """Per result itself or what stands for it; None where one of them found no place."""
        stored = []
        for result in results:
            if isinstance(result, Tensor) and result.nbytes > SMALL:
                place = self.keep(result)
                if place is None:
                    return None
                stored.append(_Away(place))
            else:
                stored.append(result)
        return stored


class _Away:
    def __init__(self, place):
        self.place = place


class _Recall(TorchDispatchMode):
    """Gives stored results in the place of attention kernels."""

    def __init__(self, calls: list):
        super().__init__()
        self.calls, self.next = calls, 0

    def __enter__(self):
        self.next = 0  # each recomputation starts over: with retain_graph there are several
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in KERNELS:
            stored, self.next = self.calls[self.next], self.next + 1
            if stored is not None:
                return tuple(s.place.load() if isinstance(s, _Away) else s for s in stored)
        return function(*args, **(kwargs or {}))


def recall_contexts(keep: Callable[[Tensor], object | None]) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """The two contexts of a checkpoint, for its forward and its recomputations.

    keep(tensor) stores a tensor and returns something whose load() gives it back, or None where there is no room.
    """
    calls: list[list | None] = []
    return _Keep(keep, calls), _Recall(calls)
