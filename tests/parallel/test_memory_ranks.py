"""Memory under FSDP2: an optimizer of sharded weights is one process's, saves without a trace and resumes on other ranks."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from longpo_ops.memory.optimizer import AdamW, RMSprop
from longpo_ops.memory.settings import Memory
from longpo_ops.memory.states import local

from ..train.tiny import VOCAB, make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

pytest.importorskip("torchao")

KINDS = {
    f"{algorithm.__name__} {states} {master} {dtype} {'host' * host}": (
        dtype,
        partial(algorithm, lr=1e-3, weight_decay=0.1, states=states, master=master, host=host),
    )
    for algorithm, states, master, dtype, host in [
        (AdamW, "float32", "residue", torch.bfloat16, False),
        (AdamW, "float32", "float32", torch.bfloat16, True),
        (AdamW, "float32", "float32", torch.float16, False),
        (AdamW, "float32", "residue", torch.float32, False),
        (AdamW, "8bit", "residue", torch.bfloat16, False),
        (AdamW, "8bit", "float32", torch.bfloat16, True),
        (RMSprop, "float32", "residue", torch.bfloat16, True),
    ]
}
UNEVEN = [(64, 96), (96, 67), (67, 1)]  # (in, out): shards of 34 and 33 rows, of one and none
WHOLE = [
    (256, 32),
    (32, 24),
    (384, 36),
]  # shards whose blocks are those of the whole weight; of (36, 384) two rows hold three


def network(dtype: torch.dtype, sizes=UNEVEN) -> nn.Sequential:
    torch.manual_seed(0)
    # torch's fused AdamW takes the last numbers of a tensor, fewer than a vector, by other code: no bias has a shard of 34.
    return nn.Sequential(*(nn.Linear(*size, bias=size[1] != 67) for size in sizes)).to(dtype)


def shard(model: nn.Sequential) -> nn.Sequential:
    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def set_gradients(model: nn.Module, step: int) -> None:
    """The same on all ranks and in one process."""
    random = torch.Generator().manual_seed(step)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=random).to(p.dtype)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole


def train(model: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        set_gradients(model, step)
        optimizer.step()
        optimizer.zero_grad()


def whole(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()


def numbers_of(model: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Weights and all that is kept of them, whole."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        found |= {f"{name} {k}": whole(v) for k, v in optimizer.state.get(p, {}).items() if isinstance(v, torch.Tensor)}
    return found


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def save(folder: Path, model: nn.Module, optimizer) -> None:
    dcp.save(
        {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=folder,
    )


def load(folder: Path, model: nn.Module, optimizer, **how) -> None:
    held = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(held, checkpoint_id=folder, **how)
    set_model_state_dict(model, held["model"])
    set_optimizer_state_dict(model, optimizer, held["optimizer"])


# -- what each rank does -------------------------------------------------------------------------------------------------


def ranks(folder: Path) -> dict:
    with torch.compiler.set_stance("force_eager"):
        return {
            "one process": {name: equals_one_process(*kind) for name, kind in KINDS.items()},
            "saving": {name: saving_leaves_no_trace(*kind) for name, kind in KINDS.items()},
            "resumed": {name: resumes(folder / name, *kind) for name, kind in KINDS.items()},
            "whole blocks": resumes(folder / "whole", *KINDS[EIGHT_BIT], WHOLE),
            "tiled": {before: tiled_gradients(before) for before in (True, False)},
            "trained": trained(folder / "trained", MEMORY, **FSDP2, gradient_accumulation_steps=1),
            "tiled and trained": trained(folder / "tiled", MEMORY | TILED, **FSDP2, gradient_accumulation_steps=1),
            "bfloat16": trained(folder / "bfloat16", MEMORY, torch.bfloat16, **FSDP2, **SAVED),
            "gone on": trained(folder / "bfloat16", MEMORY, torch.bfloat16, resume=True, **FSDP2, **SAVED),
        }


FLOAT32, EIGHT_BIT = "AdamW float32 residue torch.bfloat16 ", "AdamW 8bit residue torch.bfloat16 "


def equals_one_process(dtype, make) -> dict:
    """All numbers of one process and of shards, after five steps, and how what is kept of a weight is placed."""
    plain, model = network(dtype), shard(network(dtype))
    optimizers = [make(m.parameters()) for m in (plain, model)]
    for m, optimizer in zip((plain, model), optimizers, strict=True):
        train(m, optimizer, range(5))
    placed = [
        kept.placements == p.placements and local(kept).device == local(p).device
        for p in model.parameters()
        for kept in optimizers[1].state[p].values()
        if isinstance(kept, DTensor)
    ]
    theirs, ours = (numbers_of(m, o) for m, o in zip((plain, model), optimizers, strict=True))
    return {"placed": placed, "one": theirs, "shards": ours}


def saving_leaves_no_trace(dtype, make) -> list[bool]:
    """Before the first step and after some: numbers and random states are as they were, and so are the steps after."""
    quiet, model = shard(network(dtype)), shard(network(dtype))
    others, optimizer = make(quiet.parameters()), make(model.parameters())
    kept = []
    for steps in (range(0), range(0, 2)):
        train(quiet, others, steps)
        train(model, optimizer, steps)
        before, random = numbers_of(model, optimizer), torch.get_rng_state()
        get_optimizer_state_dict(model, optimizer)
        after = numbers_of(model, optimizer)
        kept.append(same(before, {name: after[name] for name in before}))
        kept.append(torch.equal(random, torch.get_rng_state()) and all(p.grad is None for p in model.parameters()))
        kept.append({float(state["step"]) for state in optimizer.state.values()} == {float(len(steps))})
    train(quiet, others, range(2, 4))
    train(model, optimizer, range(2, 4))
    return [*kept, same(numbers_of(quiet, others), numbers_of(model, optimizer))]


def resumes(folder: Path, dtype, make, sizes=UNEVEN) -> dict:
    """By torch.distributed.checkpoint and by the state itself; the checkpoint stays, for another number of ranks."""
    model = shard(network(dtype, sizes))
    optimizer = make(model.parameters())
    train(model, optimizer, range(3))
    save(folder, model, optimizer)
    again = shard(network(dtype, sizes))
    other = make(again.parameters())
    load(folder, again, other)
    loaded = same(numbers_of(model, optimizer), numbers_of(again, other))
    twin = shard(network(dtype, sizes))
    third = make(twin.parameters())
    third.load_state_dict(optimizer.state_dict())
    set_model_state_dict(twin, get_model_state_dict(model))
    for m, o in ((model, optimizer), (again, other), (twin, third)):
        train(m, o, range(3, 5))
    ended = numbers_of(model, optimizer)
    return {
        "loaded": loaded,
        "ended": [same(ended, numbers_of(m, o)) for m, o in ((again, other), (twin, third))],
        "end": ended,
    }


TILED = {"tile_rows": 7, "offload": True, "host_bytes": 64 << 20, "save_attention": True}


def tiled_gradients(before: bool | None) -> dict[str, torch.Tensor]:
    """Of a model that is tiled and offloaded before it is sharded, as Trainer does it, or after; of a plain one for None."""
    model = make_model()
    with ExitStack() as stack:
        if before:
            stack.enter_context(Memory(**TILED).attached(model))
        if before is not None:
            for layer in model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        if before is False:
            stack.enter_context(Memory(**TILED).attached(model))
        ids = torch.randint(VOCAB, (1, 50), generator=torch.Generator().manual_seed(0))
        model.train()(input_ids=ids, labels=ids).loss.backward()
    return {name: whole(p.grad) for name, p in model.named_parameters()}


MEMORY = {"states": "float32"}
PAIRS = [make_pair(seed, turns=1) for seed in range(12)]
RUN = dict(
    max_steps=5, learning_rate=1e-3, warmup_steps=0, lr_scheduler_type="constant", seed=3, reference="precompute"
)
SAVED = dict(save_strategy="steps", save_steps=2, gradient_accumulation_steps=2)
FSDP2 = dict(
    fsdp="full_shard",
    fsdp_config={
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    },
    gradient_checkpointing_kwargs={"use_reentrant": False},
)


def trained(folder: Path, memory: dict, dtype=torch.float64, resume=False, **options) -> dict:
    policy, reference = make_model(0, dtype), make_model(1, dtype)
    trainer = make_trainer(folder, "longpo", PAIRS, policy, reference, **RUN | {"memory": memory} | options)
    seen = []
    made = trainer.create_optimizer()
    made.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(
            {(p.dtype, p.grad.dtype) for g in optimizer.param_groups for p in g["params"]}
        )
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    rows = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": rows,
        "dtypes": seen[-1],
        "weights": {name: whole(p) for name, p in trainer.model.named_parameters()},
        "step": [float(state["step"]) for state in trainer.optimizer.state.values()],
    }


def steps_in_backward() -> str:
    """Weights that are sharded after the optimizer was made of them, on one rank."""
    model = nn.Linear(8, 8)
    optimizer = AdamW(model.parameters(), step_in_backward=True)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # as accelerate does
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError) as refused:
        optimizer.step()
    return str(refused.value)


# -- what is to be seen --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def seen(folder) -> list[dict]:
    return run_ranks(ranks, 2, folder, prelude=gpus_of_cpus, timeout=900.0)


@pytest.mark.parametrize("name", KINDS)
def test_sharded_weights_step_as_one_process_does(seen, name):
    for rank in seen:
        found = rank["one process"][name]
        assert all(found["placed"]) and found["placed"]
        assert found["one"].keys() == found["shards"].keys()
        if "8bit" not in name:
            assert same(found["one"], found["shards"])


def test_8_bit_states_of_shards_are_as_good_as_one_processs(seen):
    """Where blocks of a shard are others, weights end about as far from those of float32 states as one process's do."""
    exact = seen[0]["one process"][FLOAT32]["one"]
    rough = seen[0]["one process"][EIGHT_BIT]
    assert not torch.equal(rough["one"]["1.weight"], rough["shards"]["1.weight"])  # 33 rows of 96 are no whole blocks
    for name in (name for name in exact if name.endswith(("weight", "bias"))):
        one, shards = (float((rough[which][name].float() - exact[name].float()).norm()) for which in ("one", "shards"))
        assert shards <= 1.5 * one, name


@pytest.mark.parametrize("name", KINDS)
def test_saving_leaves_no_trace(seen, name):
    assert [rank["saving"][name] for rank in seen] == [[True] * 7] * 2


@pytest.mark.parametrize("name", KINDS)
def test_two_ranks_go_on_bitwise(seen, name):
    for rank in seen:
        assert rank["resumed"][name]["loaded"] and rank["resumed"][name]["ended"] == [True, True]


def alone_from(checkpoint: Path, dtype, make, sizes=UNEVEN) -> dict[str, torch.Tensor]:
    """What two ranks saved after three steps goes on in this process, without a group, for two more."""
    model = network(dtype, sizes)
    optimizer = make(model.parameters())
    load(checkpoint, model, optimizer, no_dist=True)
    with torch.compiler.set_stance("force_eager"):
        train(model, optimizer, range(3, 5))
    return numbers_of(model, optimizer)


@pytest.mark.parametrize("name", [name for name in KINDS if "8bit" not in name])
def test_one_process_goes_on_from_two_bitwise(seen, folder, name):
    assert same(alone_from(folder / name, *KINDS[name]), seen[0]["resumed"][name]["end"])


def test_8_bit_states_of_whole_blocks_go_on_bitwise(seen, folder):
    assert seen[0]["whole blocks"]["loaded"]
    assert same(alone_from(folder / "whole", *KINDS[EIGHT_BIT], WHOLE), seen[0]["whole blocks"]["end"])


def test_8_bit_states_whose_blocks_lie_otherwise_are_refused(seen, folder):
    told = r"shape \(67, 96\) were saved by 2 shards of 34 rows, and it has 1 shard of 67 rows now: .* 8 rows of 96 hold whole"
    with pytest.raises(ValueError, match=told):
        alone_from(folder / EIGHT_BIT, *KINDS[EIGHT_BIT])


def test_sharded_weights_do_not_step_in_backward():
    (told,) = run_ranks(steps_in_backward, 1)
    assert "step_in_backward: weights are sharded" in told


@pytest.mark.parametrize("before", [True, False])
def test_tiles_and_offload_of_sharded_layers_are_one_processs(seen, before):
    expected = tiled_gradients(None)
    for rank in seen:
        for name, gradient in rank["tiled"][before].items():
            assert (gradient - expected[name]).norm() <= 1e-12 * expected[name].norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return trained(tmp_path_factory.mktemp("alone"), MEMORY, gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", ["trained", "tiled and trained"])
def test_trainers_steps_are_one_processs(seen, alone, name):
    start = {n: p.detach() for n, p in make_model(0).named_parameters()}
    for found in (rank[name] for rank in seen):
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-9) and len(found["losses"]) == 5
        assert found["dtypes"] == {(torch.float64, torch.float64)}
        for n, weight in alone["weights"].items():
            assert (found["weights"][n] - weight).norm() <= 1e-6 * (weight - start[n]).norm(), n


def test_16_bit_weights_keep_their_dtype_sum_in_float32_and_go_on_bitwise(seen):
    for rank in seen:
        first, again = rank["bfloat16"], rank["gone on"]
        assert first["dtypes"] == again["dtypes"] == {(torch.bfloat16, torch.float32)}
        assert all(torch.equal(first["weights"][n], again["weights"][n]) for n in first["weights"])
        assert set(first["step"]) == set(again["step"]) == {5.0}
