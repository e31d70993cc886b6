"""The ranks of a run on accelerate's mesh: which of them share the rows of a pack, and that they hold the same.

    mesh     (dp_replicate, dp_shard, cp)      the ranks of "cp" share each pack's rows; others have other packs

A rank that holds other data would send wrong rows, or wait for rows that never come. So what must be alike is compared by
name, in a collective that every rank enters whatever it holds, and all raise alike.

Tests: tests/parallel/test_trainer_ranks.py.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

SEQUENCE = "cp"  # the dimension of accelerate whose ranks share rows


def sequence_group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The ranks that share the rows of a pack with this one, or None where it has them all."""
    names = () if mesh is None else mesh.mesh_dim_names or ()
    return mesh[SEQUENCE].get_group() if SEQUENCE in names and mesh[SEQUENCE].size() > 1 else None


def check_alike(held: dict[str, str], group: dist.ProcessGroup | None = None) -> None:
    """A collective over `group`, default all ranks: each gives what it holds under names. Raises ValueError, on all of them
    alike, for names under which they hold different text, or which some do not hold."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    gathered: list[dict[str, str]] = [{}] * dist.get_world_size(group)
    dist.all_gather_object(gathered, held, group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    names = dict.fromkeys(name for each in gathered for name in each)
    held_by_all = {name: [each.get(name, "none") for each in gathered] for name in names}
    different = {name: texts for name, texts in held_by_all.items() if len(set(texts)) > 1}
    if different:
        told = [f"{name} ({_first_of_each(ranks, texts)})" for name, texts in different.items()]
        raise ValueError(
            f"ranks hold different {', '.join(told)}; expected the same on all: the same files and command in every place, and "
            "one version of the library"
        )


def _first_of_each(ranks: list[int], texts: list[str]) -> str:
    first = {text: rank for rank, text in reversed(list(zip(ranks, texts, strict=True)))}
    return "; ".join(f"rank {rank}: {text}" for text, rank in sorted(first.items(), key=lambda item: item[1]))


def owned(tensor: Tensor) -> Tensor:
    """What of a tensor this rank is the first to hold: its shard; nothing where another has the same."""
    if not isinstance(tensor, DTensor):
        return tensor
    place = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    first = all(index == 0 for index, placement in place if placement.is_replicate())
    local = tensor.to_local()
    return local if first else local.flatten()[:0]


def sum_over_ranks(values: Tensor) -> Tensor:
    """values, summed over all ranks where there are several; a collective."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values
