"""What functions over several ranks need of a process group beside its collectives: itself by name, and errors alike.

A registered operator takes a group by its name. An error that one rank alone raised would leave the others waiting in
their next collective, so what can be wrong is checked in a block that all ranks leave alike.

Tests: tests/parallel/test_loss_ranks.py.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def group_named(name: str) -> dist.ProcessGroup:
    """The group whose group_name that is."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # not there in builds without distributed

    return _resolve_process_group(name)


def digest(tensors: Iterable[Tensor | None], *plain: object) -> int:
    """32 bits of the numbers of tensors on the host, of their dtypes and shapes, and of plain values' repr."""
    found = zlib.crc32(repr(plain).encode())
    for tensor in tensors:
        if tensor is not None:
            found = zlib.crc32(repr((tensor.dtype, tensor.shape)).encode(), found)
            found = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), found)
    return found


@contextmanager
def alike(group: dist.ProcessGroup, device: torch.device, found: int = 0, what: str = "arguments") -> Iterator[None]:
    """A block that every rank of the group leaves alike: by a ValueError where `found`, a digest of `what` they must share,
    differs between them, else by that of the first rank which raised one in the block.

    A collective of 2 n numbers on the device, for which the host waits; texts of errors go round only where there are some.
    """
    error = None
    try:
        yield
    except ValueError as raised:
        error = raised
    told = torch.zeros(group.size(), 2, dtype=torch.int64, device=device)
    told[group.rank()] = torch.tensor([found, error is not None], device=device)
    dist.all_reduce(told, group=group)
    digests, wrong = told.cpu().unbind(1)
    if bool((digests != digests[0]).any()):
        ranks = (digests != digests[0]).nonzero().squeeze(-1).tolist()
        raise ValueError(
            f"{what}: ranks {ranks} of {len(digests)} hold others than rank 0; expected the same on every rank"
        ) from error
    if bool(wrong.any()):
        message = [str(error)]
        dist.broadcast_object_list(message, group=group, group_src=int(wrong.argmax()), device=device)
        raise ValueError(message[0]) from error
