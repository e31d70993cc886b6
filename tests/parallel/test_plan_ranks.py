"""Plans of several ranks: their predictions against what the allocator of a rank really gave, and `fit: auto` on all ranks."""

import dataclasses
import json
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from longpo_ops.attention import use_shared_prefix
from longpo_ops.memory import tile_layers
from longpo_ops.memory.mesh import Mesh
from longpo_ops.memory.plan import ERROR, Machine, Settings, Work, predict
from longpo_ops.ops.head import attach
from longpo_ops.ops.logprobs import linear_cross_entropy
from longpo_ops.parallel import Shards
from longpo_ops.train import LongPOConfig, checks

from ..memory.models import small
from ..memory.test_plan import allocated
from ..train.tiny import make_model, make_pair, make_trainer
from .ranks import gpus_of_cpus, run_ranks

GIB = 1 << 30
ROWS = 2048
WORKSPACE = 8 << 20  # about the least; the CPU's loss, which reads the head by blocks, takes only an eighth of it
SHARED = {"sequence_parallel": 2}
PAIRS = [make_pair(i) for i in range(4)]
# A pack's model, the ranks that share it, rows of a tile. Two layers, as attention is what takes the time here.
LAYERS = dict(num_hidden_layers=2)
HEAD = dict(vocab_size=8192, **LAYERS)
CASES = {
    "packs of its own": (small(**LAYERS), 1, None),
    "a shared pack in tiles": (small(intermediate_size=1024, **LAYERS), 2, 256),
    "a large head": (small("qwen2", **HEAD, tie_word_embeddings=False), 2, 256),
    "a large tied head": (small("qwen2", **HEAD, tie_word_embeddings=True), 2, 256),
}


class InPlace(DefaultReduceScatter):
    """Sums gradients in the memory that they are handed over in, as NCCL does; gloo's own sums a copy of all of them."""

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        chunks = input_tensor.chunk(dist.get_world_size(group))
        for rank, chunk in enumerate(chunks):
            dist.reduce(chunk, rank, op=op, group=group)
        output_tensor.copy_(chunks[dist.get_rank(group)])


def work_of(config, ranks: int) -> Work:
    mesh = Mesh(2, ranks, mixed_precision="no")
    return Work(config, ROWS, dtype=torch.float32, workspace_bytes=WORKSPACE // 8, mesh=mesh)


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
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(InPlace())


def measured(config, ranks: int, tile_rows: int | None) -> int:
    """Peak bytes of a rank's forward and backward once FSDP2 has gradients, its shard of the weights included. Of two, the
    least: threads of gloo let go of what they sent when they come to it, sometimes late."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    use_shared_prefix(model)
    attach(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    init_device_mesh("cpu", (2,))
    shard(model)

    def step(length: int = ROWS) -> None:
        shards = Shards(length, dist.group.WORLD) if ranks == 2 else None
        rows = slice(None) if shards is None else shards.rows
        tokens = torch.randint(config.vocab_size, (1, length))
        given = {"position_ids": torch.arange(length)[None, rows], "shards": shards}

        def loss(hidden, head):
            told = dict(loss=linear_cross_entropy, workspace_bytes=WORKSPACE, shards=shards)
            return head(hidden[0], tokens[0], **told)

        model(input_ids=tokens[:, rows].clone(), use_cache=False, compute=loss, **given).backward()

    tiles = tile_layers(model, tile_rows) if tile_rows else mock.MagicMock()
    with tiles:
        step(64)
        peaks = []
        for _ in range(2):
            model.zero_grad()
            peaks.append(allocated(step))
        return sum(p.to_local().nbytes for p in model.parameters()) + min(peaks)


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
    settings = SHARED | {"reference": "precompute"} | settings
    with mock.patch.object(checks, "machine_here", machine_here), mock.patch.object(checks.search, "fit", fit):
        trainer = make_trainer(folder, "longpo", PAIRS, make_model(), make_model(1), fit="auto", **settings)
    return seen, trainer.memory


def refused(folder, case: str) -> str:
    try:
        if case == "whole weights":
            fitted(folder, sequence_parallel=1)
        if case == "kept otherwise":
            os.environ.pop("ACCELERATE_USE_FSDP", None)
            own = folder / f"rank-{dist.get_rank()}"  # which a trainer refuses first; a run asks before it has one
            (own / "checkpoint-1").mkdir(parents=True)
            (own / "memory.json").write_text(json.dumps({"states": "float32", "tile_rows": 5 + dist.get_rank()}))
            checks.agreed_memory(
                LongPOConfig(output_dir=str(own), objective="longpo", use_cpu=True, fit="auto", **SHARED)
            )
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
    real = min(each[0][name] for each in ranks[0])
    assert abs(max(peaks) / real - 1) < ERROR, (max(peaks), real, plan.peak)


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
