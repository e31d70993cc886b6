"""Plans of several ranks: their predictions against what the allocator of a rank really gave, and `fit: auto` on all ranks."""

import dataclasses
import json
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from longpo_ops.attention import use_shared_prefix
from longpo_ops.memory import tile_layers
from longpo_ops.memory.mesh import Mesh
from longpo_ops.memory.plan import ERROR, Machine, Settings, Work, predict
from longpo_ops.ops.head import attach
from longpo_ops.ops.logprobs import linear_cross_entropy
from longpo_ops.parallel import Shards
from longpo_ops.train import checks

from ..memory.models import small
from ..memory.test_plan import allocated
from ..train.tiny import make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

GIB = 1 << 30
ROWS = 4096
PAIRS = [make_pair(i) for i in range(4)]
# Rows and hidden states of a pack on one rank or on two; a large head; tiles.
CASES = {
    "packs of its own": (small(), 1, None),
    "a shared pack": (small(), 2, None),
    "a shared pack in tiles": (small(intermediate_size=1024), 2, 256),
    "a large head": (small("qwen2", vocab_size=16384, num_hidden_layers=2, tie_word_embeddings=False), 2, 256),
    "a large tied head": (small("qwen2", vocab_size=16384, num_hidden_layers=2, tie_word_embeddings=True), 2, 256),
}


def work_of(config, ranks: int) -> Work:
    mesh = Mesh(2, ranks, mixed_precision="no")
    return Work(config, ROWS, dtype=torch.float32, workspace_bytes=8 << 20, mesh=mesh)


def shard(model) -> None:
    """As accelerate shards a model: each layer, the embedding, norm and head, which stay gathered from forward to backward."""
    body, head = model.model, model.lm_head
    for layer in body.layers:
        fully_shard(layer)
    tail = [body.norm, head]
    if head.weight is body.embed_tokens.weight:
        tail.insert(1, body.embed_tokens)
    else:
        fully_shard(body.embed_tokens)
    fully_shard(tail, reshard_after_forward=False)
    fully_shard(model)


def measured(config, ranks: int, tile_rows: int | None) -> int:
    """Peak bytes of a rank's second forward and backward, its shard of the weights included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    use_shared_prefix(model)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    init_device_mesh("cpu", (2,))
    shard(model)
    shards = Shards(ROWS, dist.group.WORLD) if ranks == 2 else None
    rows = slice(None) if shards is None else shards.rows
    tokens = torch.randint(config.vocab_size, (1, ROWS))
    given = {"position_ids": torch.arange(ROWS)[None, rows], "shards": shards}

    def step() -> None:
        def loss(hidden, head):
            told = dict(loss=linear_cross_entropy, workspace_bytes=8 << 20, shards=shards)
            return head(hidden[0], tokens[0], **told)

        model(input_ids=tokens[:, rows].clone(), use_cache=False, compute=loss, **given).backward()

    tiles = tile_layers(model, tile_rows) if tile_rows else mock.MagicMock()
    with tiles:
        step()
        model.zero_grad()
        return sum(p.to_local().nbytes for p in model.parameters()) + allocated(step)


def fitted(folder, **settings):
    """What a trainer chooses; rank 1 has half the memory of rank 0."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    real = checks.machine_here

    def machine_here(*given, **more):
        here = real(*given, **more)
        return dataclasses.replace(here, device_bytes=here.device_bytes >> dist.get_rank())

    seen = []

    def fit(work, machine, lossy):
        seen.append((work.mesh, machine))
        return real_fit(work, machine, lossy)

    real_fit = checks.search.fit
    settings = {"sequence_parallel": 2, "reference": "precompute"} | settings
    with mock.patch.object(checks, "machine_here", machine_here), mock.patch.object(checks.search, "fit", fit):
        trainer = make_trainer(folder, "longpo", PAIRS, make_model(), make_model(1), fit="auto", **settings)
    return seen, trainer.memory


def refused(folder, case: str) -> str:
    try:
        if case == "whole weights":
            fitted(folder, sequence_parallel=1)
        if case == "kept otherwise":
            own = folder / f"rank-{dist.get_rank()}"
            (own / "checkpoint-1").mkdir(parents=True)
            (own / "memory.json").write_text(json.dumps({"states": "float32", "tile_rows": 5 + dist.get_rank()}))
            with mock.patch.object(checks, "memory_file", lambda config: own / "memory.json"):
                fitted(own)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def by_two(folder):
    real = {name: measured(*case) for name, case in CASES.items()}
    return real, fitted(folder / "fit"), {case: refused(folder, case) for case in ("whole weights", "kept otherwise")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(by_two, 2, folder, prelude=gpus_of_cpus), folder


@pytest.mark.parametrize("name", CASES)
def test_the_peak_of_a_rank_is_within_the_error_that_plans_leave_room_for(ranks, name):
    config, shared, tile_rows = CASES[name]
    plan = predict(work_of(config, shared), Settings(tile_rows=tile_rows), Machine(GIB, device_reserve=0, error=0.0))
    peaks = [sum(phase.parts.values()) - phase.parts["optimizer states"] for phase in plan.phases[:-1]]
    for real, *_ in ranks[0]:
        assert abs(max(peaks) / real[name] - 1) < ERROR, (max(peaks), real[name], plan.peak)


def test_fit_chooses_the_same_on_every_rank_for_the_one_with_the_least_memory(ranks):
    (first, second), folder = ranks
    (seen, memory), (seen_too, memory_too) = first[1], second[1]
    assert seen == seen_too and memory == memory_too
    ((mesh, machine),) = seen
    assert (mesh.cards, mesh.sequence_parallel, mesh.cards_per_node) == (2, 2, 2)
    assert machine.device_bytes > 0
    assert json.loads((folder / "fit" / "memory.json").read_text()) == dataclasses.asdict(memory)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("whole weights", "fit='auto' plans one process, or several that shard .* by FSDP2; 2 came without it"),
        ("kept otherwise", r"ranks hold different memory.json \(rank 0: Memory.*tile_rows=5.*rank 1: .*tile_rows=6"),
    ],
)
def test_what_ranks_cannot_plan_alike_is_refused_on_all(ranks, case, said):
    told = [each[2][case] for each in ranks[0]]
    assert told[0] == told[1]
    with pytest.raises(ValueError, match=said):
        raise ValueError(told[0])
