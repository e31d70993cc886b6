"""Weights and optimizer states on their way between a folder and a model that FSDP2 may hold in shards.

    plain      model.safetensors or adapter_model.safetensors, optimizer.pt      by one process, and by DDP
    sharded    pytorch_model_fsdp_0/, optimizer_0/ (torch's DCP, by names)       under FSDP2, by all processes together

Trainer and accelerate read a checkpoint of the run's own kind; of sharded ones any number of processes take their shards. One
of the other kind is read here: every process reads whole tensors and keeps what it holds of each, so that none waits for
another. Nothing is skipped: a name that is missing or unknown, another shape and a wider dtype are a ValueError.

Cost. A gathered model is whole in the host memory of the first process, and on the devices one weight at a time. The other
kind of checkpoint is whole in every process's host memory while it is read.

Tests: tests/parallel/test_checkpoints_ranks.py.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils.constants import FSDP_MODEL_NAME
from accelerate.utils.constants import OPTIMIZER_NAME as FSDP_OPTIMIZER_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME

MODEL_FOLDER, OPTIMIZER_FOLDER = f"{FSDP_MODEL_NAME}_0", f"{FSDP_OPTIMIZER_NAME}_0"


def is_sharded(checkpoint: str | Path) -> bool:
    """Whether it was written under FSDP2."""
    return Path(checkpoint, MODEL_FOLDER).is_dir()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a model's folder."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors", "adapter_model.safetensors"]
    if not (folder / names[0]).exists() and index.exists():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    return [folder / name for name in names if (folder / name).exists()]


def gather(model: nn.Module) -> dict[str, Tensor]:
    """A collective of all processes -> the model's weights, of a PEFT model those that train, whole and on the host of the
    first one; nothing on the others. Tied weights have one name."""
    adapters, others, parameters = hasattr(model, "get_base_model"), other_names(model), dict(model.named_parameters())
    frozen = {name for name, weight in parameters.items() if not weight.requires_grad} if adapters else set()
    whole = {name: _gathered(weight) for name, weight in model.state_dict().items() if name not in others | frozen}
    return {name: weight for name, weight in whole.items() if weight is not None}


def _gathered(weight: Tensor) -> Tensor | None:
    """A weight on the host of the first process, None on others. FSDP2 cuts rows into equal parts but for the last ones."""
    if isinstance(weight, DTensor):
        (dim,) = (i for i, placement in enumerate(weight.placements) if not placement.is_replicate())
        group, rows = weight.device_mesh.get_group(dim), weight.shape[0]
        if weight.placements[dim] != Shard(0):
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} is {weight.placements[dim]}; expected Shard(dim=0)"
            )
        local, size, first = weight.to_local(), dist.get_world_size(group), dist.get_rank(group) == 0
        sent = local.new_zeros(-(-rows // size), *weight.shape[1:])
        sent[: local.shape[0]] = local
        came = [torch.empty_like(sent) for _ in range(size)] if first else None
        dist.gather(sent, came, group=group, group_dst=0)
        weight = torch.cat(came)[:rows] if first else None
    return weight.cpu() if dist.get_rank() == 0 else None


def load_weights(folder: str | Path, model: nn.Module) -> None:
    """Weights of a checkpoint, or of a finished run, into a model of whole weights or of shards."""
    folder, own = Path(folder), _held(model)
    kept = read_dcp(folder / MODEL_FOLDER)["model"] if is_sharded(folder) else _read_plain(folder, model)
    known = own | model.state_dict()  # with the other names of tied weights
    if differing := [*(own.keys() - kept.keys()), *(kept.keys() - known.keys())]:
        raise ValueError(
            f"{folder}: {len(differing)} of its weights are of another model ({min(differing)}, ...); go on with the settings "
            "it began with, or give another output_dir"
        )
    with torch.no_grad():
        for name, weight in own.items():
            _check_fits(folder, name, kept[name], weight)
            weight.copy_(shard_like(kept[name], weight))


def load_optimizer(checkpoint: str | Path, model: nn.Module, optimizer: Optimizer) -> None:
    """The state of a checkpoint's optimizer into one that steps whole weights or shards. Raises ValueError for another's."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    named_groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    if is_sharded(checkpoint):
        kept = _by_position(read_dcp(Path(checkpoint, OPTIMIZER_FOLDER))["optimizer"], named_groups)
    else:
        kept = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
    states = {
        position: {name: _state_like(value, stepped[position]) for name, value in state.items()}
        for position, state in kept["state"].items()
    }
    optimizer.load_state_dict(kept | {"state": states})


def read_dcp(folder: Path) -> dict[str, Any]:
    """What a DCP folder holds, nested as it was saved, in whole tensors on the host."""
    reader = dcp.FileSystemReader(folder)
    metadata = reader.read_metadata()
    flat = {
        key: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for key, kept in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process reads it
        dcp.load(flat, storage_reader=reader, no_dist=True)
    nested: dict[str, Any] = {}
    for key, path in metadata.planner_data.items():
        here = nested
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = flat[key]
    return nested


def _read_plain(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """Adapters as they lie there; a model under its own names, which for a mixture of experts are not those of the files."""
    if hasattr(model, "get_base_model"):
        return {name: weight for file in weight_files(folder) for name, weight in load_file(file).items()}
    kind = next(k for k in type(model).__mro__ if issubclass(k, PreTrainedModel) and not issubclass(k, FSDPModule))
    whole, found = kind.from_pretrained(folder, dtype="auto", use_safetensors=True, output_loading_info=True)
    if wrong := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
        raise ValueError(f"{folder}: {len(wrong)} of its weights are missing or unknown to the model ({wrong[0]}, ...)")
    return whole.state_dict()


def shard_like(whole: Tensor, held: Tensor) -> Tensor:
    """whole, or the shards of it that a sharded tensor has of its own; a copy of no other process's is asked for."""
    if not isinstance(held, DTensor):
        return whole
    return distribute_tensor(whole.to(held.device), held.device_mesh, held.placements, src_data_rank=None)


def _held(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model, each tied weight once: adapters of a PEFT model, else all weights."""
    if hasattr(model, "get_base_model"):
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(model, adapter_name=model.active_adapters[0])
    others = other_names(model)
    return {name: weight for name, weight in model.state_dict().items() if name not in others}


def other_names(model: nn.Module) -> set[str]:
    """Those of tied weights but the first."""
    return dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()


def _check_fits(folder: Path, name: str, kept: Tensor, own: Tensor) -> None:
    if kept.shape != own.shape:
        raise ValueError(f"{folder}: {name} has the shape {tuple(kept.shape)}, the model's has {tuple(own.shape)}")
    if torch.promote_types(kept.dtype, own.dtype) != own.dtype:
        raise ValueError(
            f"{folder}: {name} is {kept.dtype}, in which the run stepped it, and the model holds {own.dtype}, which would lose "
            "its last steps in rounding; go on as the run began (FSDP2 steps float32 weights where bf16 or fp16 is set), or "
            "set dtype=float32"
        )


def _by_position(kept: dict[str, Any], named_groups: list[list[str]]) -> dict[str, Any]:
    """An optimizer's state by names -> by positions in its groups, as its own state_dict has it."""
    groups = [kept["param_groups"][number] for number in sorted(kept["param_groups"])]
    of_names = {frozenset(group["params"]): group for group in groups}
    position, state, placed = 0, {}, []
    for names in named_groups:
        group = of_names[frozenset(names)]
        placed.append(group | {"params": list(range(position, position + len(names)))})
        for name in names:
            state[position] = kept["state"][name]
            position += 1
    return {"state": state, "param_groups": placed}


def _state_like(value: Any, parameter: Tensor) -> Any:
    """A value of a parameter's state: sharded as the parameter is where it has a number for each of its own."""
    whole = isinstance(value, Tensor) and value.shape == parameter.shape
    return shard_like(value, parameter) if whole else value
