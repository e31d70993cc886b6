"""Losses of rows that 2 and 3 ranks share equal those of one process, and what is wrong is the same error on every rank.

All cases run in one group of each size; the parent compares with full logits in float64.
"""

from __future__ import annotations

import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from longpo_ops import LongPO, PreferenceHead, attach, linear_cross_entropy, linear_kl, packed_preference_loss
from longpo_ops.ops import truth
from longpo_ops.ops.sweep import workspace_of
from longpo_ops.parallel import Shards
from tests.budget import check_budget
from tests.ops.preference_cases import OBJECTIVES

from .loss_cases import H, N, Row, V, gathered, gradients
from .ranks import run_ranks

DRAWS = 8  # of numbers in 32 and 16 bits
LOW = (torch.float32, torch.bfloat16, torch.float16)
LONGPO, SEVERAL = OBJECTIVES["longpo"], {"rejected": (2, 0, 1, 0, 1)}
CASES = {name: dict(objective=objective) for name, objective in OBJECTIVES.items()} | {
    f"{name}, answers on the last rank alone": dict(objective=OBJECTIVES[name], late=True)
    for name in ("longpo", "kto_pair", "orpo")
}
CASES |= {
    "several rejected": dict(objective=LONGPO, **SEVERAL),
    "several rejected, no NLL": dict(objective=OBJECTIVES["dpo"], nll="", **SEVERAL),
    "a rank without a weight": dict(objective=LONGPO, late=True, nll=""),
    "NLL on the first rank alone, answers on the last": dict(objective=LONGPO, late=True, nll="early"),
    "frozen head": dict(objective=LONGPO, frozen=("weight",)),
    "frozen body": dict(objective=LONGPO, frozen=("hidden",)),
    "frozen": dict(objective=LONGPO, frozen=("hidden", "weight", "bias"), bias=True),
    "reuse_hidden": dict(objective=LONGPO, reuse_hidden=True),
    "reuse_hidden, a rank without a weight": dict(objective=LONGPO, reuse_hidden=True, late=True, nll=""),
    "softcap, scale and bias": dict(objective=LONGPO, softcap=3.0, scale=0.7, bias=True, **SEVERAL),
    "few rows at a time": dict(
        objective=LONGPO, workspace_bytes=workspace_of(3, torch.empty(V, H).double(), torch.float64)
    ),
}
LOW_CASES = {
    "longpo": dict(objective=LONGPO),
    "longpo in PyTorch": dict(objective=LONGPO, backend="torch"),
    "kto_pair, answers on the last rank alone": dict(objective=OBJECTIVES["kto_pair"], late=True),
    "simpo, soft-cap and bias": dict(objective=OBJECTIVES["simpo"], softcap=3.0, bias=True, **SEVERAL),
    "reuse_hidden": dict(objective=LONGPO, reuse_hidden=True),
}
CROSS_ENTROPY = [(reduction, weighted, False) for reduction in ("sum", "mean") for weighted in (True, False)]
CROSS_ENTROPY += [("mean", True, True), ("sum", False, True)]
KL = [
    (kind, reduction, late)
    for kind in ("forward", "reverse", "jsd")
    for reduction in ("sum", "mean")
    for late in (0, 1)
]


# -- on the ranks ----------------------------------------------------------------------------------------------------


def on_ranks() -> dict:
    """Everything that a rank of the group finds."""
    shards = Shards(N, dist.group.WORLD)
    found = {
        "float64": {name: Row(**case).ours(shards) for name, case in CASES.items()},
        "low": {
            (name, dtype): [Row(**case, dtype=dtype, seed=draw).ours(shards) for draw in range(DRAWS)]
            for name, case in LOW_CASES.items()
            for dtype in LOW
        },
        "cross entropy": {case: Row(LONGPO, bias=True).cross_entropy(*case, shards) for case in CROSS_ENTROPY},
        "kl": {case: divergence(case, shards) for case in KL},
        "kl low": {dtype: [divergence(KL[2], shards, dtype, draw) for draw in range(DRAWS)] for dtype in LOW},
        "errors": errors(shards),
        "collectives": collectives(shards),
        "alone": alone(shards),
        "sharded head": sharded_head(shards),
        "compiled": compiled(shards),
    }
    with torch.no_grad():
        row = Row(LONGPO, **SEVERAL)
        found["no_grad"] = row.outputs(row.leaves(shards.rows), shards=shards)._asdict()
    return found


def divergence(case, shards=None, dtype=torch.float64, draw=0, plain=False) -> dict:
    """Value and gradients of 19 rows of student and teacher; a rank has some of them, with `late` only the last has any."""
    kind, reduction, late = case
    drawn, rows, width = torch.Generator().manual_seed(draw), 19, 12
    sizes = {"hidden": (rows, H), "weight": (V, H), "teacher_hidden": (rows, width), "teacher_weight": (V, width)}
    tensors = {name: torch.randn(*size, generator=drawn, dtype=torch.float64).to(dtype) for name, size in sizes.items()}
    weights, mask = torch.rand(rows, generator=drawn, dtype=torch.float64), torch.arange(rows) % 5 > 0
    if plain:
        leaves = {
            name: t.double().requires_grad_() if plain == "truth" else t.requires_grad_() for name, t in tensors.items()
        }
        log_p, log_q = (
            truth.logits(*pair, temperature=2.0).to(torch.promote_types(pair[0].dtype, torch.float32)).log_softmax(-1)
            for pair in (list(leaves.values())[:2], list(leaves.values())[2:])
        )
        counted = torch.where(mask, weights, 0.0)
        loss = (truth.divergence(log_p, log_q, kind, 0.3) * counted).sum() / (
            counted.sum() if reduction == "mean" else 1
        )
        return {"loss": loss.detach()} | gradients(loss, leaves)
    mine = slice(0, rows)
    if shards is not None:
        edges = [0] * shards.size + [rows] if late else [rows * r**2 // shards.size**2 for r in range(shards.size + 1)]
        mine = slice(edges[shards.rank], edges[shards.rank + 1])
    leaves = {name: (t[mine] if "hidden" in name else t).clone().requires_grad_() for name, t in tensors.items()}
    loss = linear_kl(
        **leaves, kind=kind, beta=0.3, reduction=reduction, temperature=2.0, mask=mask[mine], row_weights=weights[mine],
        group=None if shards is None else shards.group,
    )  # fmt: skip
    return {"loss": loss} | gradients(loss, leaves)


def errors(shards) -> dict[str, tuple[str, float]]:
    """What is wrong -> the message, and seconds until it came."""
    row, last = Row(LONGPO), shards.rank == shards.size - 1
    leaves, labels = row.leaves(shards.rows), row.labels

    def loss(hidden=leaves["hidden"], **more):
        given = dict(
            labels=labels, sequences=row.sequences, num_chosen=3, rejected_pair=row.pair, nll_weights=row.weights,
            objective=row.objective, shards=shards, **row.refs,
        )  # fmt: skip
        return packed_preference_loss(hidden, leaves["weight"], **given | more)

    def entropy(hidden=leaves["hidden"], **more):
        return linear_cross_entropy(hidden, leaves["weight"], **dict(labels=labels, shards=shards) | more)

    def kl(rows=slice(None), **more):
        hidden = leaves["hidden"]
        return linear_kl(hidden, leaves["weight"], hidden[rows].detach(), leaves["weight"], group=shards.group, **more)

    out_of_range = labels.index_fill(0, torch.tensor([N - 1]), V)
    wrong = {
        "a label": lambda: loss(labels=out_of_range),
        "a pair": lambda: loss(sequences=row.sequences.masked_fill(row.sequences == 4, -1)),
        "a reference": lambda: loss(ref_chosen_logps=torch.tensor([-1.0, float("nan"), -1.0])),
        "rows of one": lambda: loss(hidden=leaves["hidden"][: -1 if last else None]),
        "whole rows": lambda: loss(hidden=row.leaves()["hidden"]),
        "fewer rows than ranks": lambda: loss(shards=Shards(shards.size - 1, shards.group)),
        "too few labels": lambda: loss(labels=labels[:-1]),
        "other labels": lambda: loss(labels=labels.roll(1) if last else labels),
        "another objective": lambda: loss(objective=LongPO(beta=0.2) if last else row.objective),
        "a label of cross entropy": lambda: entropy(labels=out_of_range),
        "rows of cross entropy": lambda: entropy(hidden=leaves["hidden"][1 if last else 0 :]),
        "cross entropy of each": lambda: entropy(reduction="none"),
        "other class weights": lambda: entropy(class_weights=torch.full((V,), 1.0 + last), label_smoothing=0.1),
        "teacher": lambda: kl(slice(1 if last else 0, None)),
        "row weights": lambda: kl(row_weights=torch.ones(len(leaves["hidden"]) - last)),
        "kl of each": lambda: kl(reduction="none"),
    }
    told = {}
    for name, call in wrong.items():
        began = time.monotonic()
        with pytest.raises(ValueError) as refused:
            call()
        told[name] = str(refused.value), time.monotonic() - began
    return told


def collectives(shards) -> dict[str, list[int]]:
    """How many numbers each all-reduce of a call takes."""
    told = {}
    for name, call in {
        "longpo": lambda: Row(LONGPO).ours(shards),
        "dpo": lambda: Row(OBJECTIVES["dpo"], nll="").ours(shards),
        "cross entropy": lambda: Row(LONGPO).cross_entropy("mean", True, False, shards),
        "affine": lambda: Row(LONGPO).cross_entropy("mean", True, True, shards),
        "kl": lambda: divergence(("reverse", "sum", 0), shards),
    }.items():
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
            call()
        told[name] = [each.args[0].numel() for each in reduced.call_args_list]
    return told


def alone(shards) -> bool:
    """Whether a group of one rank gives the bits of no group."""
    mine = [dist.new_group([rank]) for rank in range(shards.size)][shards.rank]
    one = Shards(N, mine)
    cases = [
        (Row(LONGPO, dtype=dtype, workspace_bytes=scratch).ours, (), (one,))
        for dtype in (torch.float64, torch.bfloat16, torch.float16)
        for scratch in (None, workspace_of(9, torch.empty(V, H, dtype=dtype), dtype))
    ]
    cases += [
        (Row(LONGPO).cross_entropy, ("mean", True, affine), ("mean", True, affine, one)) for affine in (False, True)
    ]
    cases += [(divergence, (KL[2],), (KL[2], one))]
    return all(
        torch.equal(a, b)
        for call, plain, grouped in cases
        for a, b in zip(call(*plain).values(), call(*grouped).values(), strict=True)
    )


def compiled(shards) -> bool:
    """Whether compiled calls, one graph each, give the bits of plain ones."""
    row, expected = Row(LONGPO), Row(LONGPO).ours(shards)
    leaves = row.leaves(shards.rows)

    def divergence(hidden, weight):
        return linear_kl(hidden, weight, hidden.detach() + 1, weight.detach(), reduction="mean", group=shards.group)

    def whole(hidden, weight):
        return row.outputs({"hidden": hidden, "weight": weight}, shards=shards).loss

    loss = torch.compile(whole, fullgraph=True, backend="aot_eager")(**leaves)
    kl = torch.compile(divergence, fullgraph=True, backend="aot_eager")(**leaves)
    same = torch.equal(kl, divergence(**leaves)) and torch.equal(loss, expected["loss"])
    return same and all(torch.equal(grad, expected[name]) for name, grad in gradients(loss, leaves).items())


def sharded_head(shards) -> tuple[dict, dict]:
    """A head of its own, and an attached model's, under FSDP2: gathered by their forward, gradients by its reduce-scatter."""
    row, mesh = Row(LONGPO), init_device_mesh("cpu", (shards.size,))
    more = dict(
        loss=packed_preference_loss, num_chosen=3, rejected_pair=row.pair, nll_weights=row.weights, num_pairs=5.0,
        objective=row.objective, shards=shards, **row.refs,
    )  # fmt: skip
    head = fully_shard(PreferenceHead(torch.nn.Parameter(row.tensors["weight"].clone())), mesh=mesh)
    hidden = row.leaves(shards.rows)["hidden"]
    loss = head(hidden, (row.labels, row.sequences), **more).loss
    (loss * shards.size).backward()
    own = {"loss": loss, "d hidden": hidden.grad / shards.size, "weight": head.weight.grad.full_tensor()}

    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)

    def compute(hidden, head):
        return head(hidden[0, shards.rows], (row.labels, row.sequences), **more)

    loss = model(input_ids=torch.arange(N)[None] % V, use_cache=False, compute=compute).loss
    (loss * shards.size).backward()
    return own, {"loss": loss} | {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def tiny_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.2,
    )  # fmt: skip
    return attach(LlamaForCausalLM(config))


# -- in the parent ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def found(request, tmp_path_factory) -> list[dict]:
    """What each rank found."""
    return run_ranks(on_ranks, request.param)


def of(found: list[dict], kind: str, name=None) -> list[dict]:
    return [rank[kind] if name is None else rank[kind][name] for rank in found]


def assert_close(ours: dict, expected: dict, relative: float = 1e-12) -> None:
    for name, value in expected.items():
        error = (ours[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
        assert error <= relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_full_logits_and_every_output_that_of_one_process(found, name):
    ours, row = gathered(of(found, "float64", name)), Row(**CASES[name])
    assert_close(ours, row.plain())
    whole = row.ours()
    assert whole.keys() == ours.keys()
    assert_close(ours, {key: value.detach() for key, value in whole.items()})


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", LOW_CASES)
def test_the_loss_in_32_and_16_bits_is_within_the_budget(found, name, dtype):
    rows = [Row(**LOW_CASES[name], dtype=dtype, seed=draw) for draw in range(DRAWS)]
    ours = [gathered(list(parts)) for parts in zip(*of(found, "low", (name, dtype)), strict=True)]
    check_all(ours, [row.plain() for row in rows], [row.plain(torch.float64) for row in rows])


def check_all(ours: list[dict], plain: list[dict], true: list[dict]) -> None:
    for key in true[0]:
        check_budget(key, *([each[key] for each in results] for results in (ours, plain, true)))


@pytest.mark.parametrize("case", CROSS_ENTROPY, ids=str)
def test_cross_entropy_is_that_of_full_logits(found, case):
    assert_close(gathered(of(found, "cross entropy", case)), Row(LONGPO, bias=True).plain_cross_entropy(*case))


ROWWISE = ("d hidden", "d teacher_hidden")


@pytest.mark.parametrize("case", KL, ids=str)
def test_divergences_are_those_of_full_logits_some_ranks_without_rows(found, case):
    assert_close(gathered(of(found, "kl", case), ROWWISE), divergence(case, plain="truth"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_divergence_in_32_and_16_bits_is_within_the_budget(found, dtype):
    ours = [gathered(list(parts), ROWWISE) for parts in zip(*of(found, "kl low", dtype), strict=True)]
    plain, true = (
        [divergence(KL[2], dtype=dtype, draw=draw, plain=kind) for draw in range(DRAWS)] for kind in ("plain", "truth")
    )
    check_all(ours, plain, true)


def test_without_gradients_every_rank_has_the_whole_rows_numbers(found):
    assert_close(
        gathered(of(found, "no_grad")), {k: v for k, v in Row(LONGPO, **SEVERAL).plain().items() if k[0] != "d"}
    )


@pytest.mark.parametrize(
    "name, said",
    {
        "a label": f"labels: {V} in row {N - 1}: expected 0 <= label < V={V}",
        "a pair": "labels: rejected answer 1 has no answer tokens",
        "a reference": "ref_chosen_logps: nan at 1: expected finite",
        "rows of one": "hidden has {shorter} rows on rank {last} of {ranks}: expected {count}",
        "whole rows": f"hidden has {N} rows on rank 0 of {{ranks}}",
        "fewer rows than ranks": "a row of {last} tokens over {ranks} ranks: expected at least a token for each",
        "too few labels": f"labels.shape=({N - 1},): expected ({N},)",
        "other labels": "labels, sequences, weights, groups and the objective: ranks [{last}] of {ranks} hold others",
        "another objective": "ranks [{last}] of {ranks} hold others than rank 0",
        "a label of cross entropy": f"labels: {V} in row {N - 1}",
        "rows of cross entropy": "hidden has {shorter} rows on rank {last} of {ranks}",
        "cross entropy of each": "reduction='none' with shards",
        "other class weights": "labels and weights of rows and classes: ranks [{last}] of {ranks} hold others than rank 0",
        "teacher": "teacher_hidden has {shorter} rows, hidden {count}: expected aligned rows",
        "row weights": "row_weights.shape=({shorter},): expected ({count},)",
        "kl of each": "reduction='none' with group",
    }.items(),
)
def test_what_is_wrong_on_one_rank_is_the_same_error_on_all_within_seconds(found, name, said):
    ranks, last = len(found), len(found) - 1
    count = N - N * last // ranks
    expected = said.format(ranks=ranks, last=last, count=count, shorter=count - 1)
    told = of(found, "errors", name)
    assert {message for message, _ in told} == {told[0][0]}
    assert expected in told[0][0]
    assert max(seconds for _, seconds in told) < 30


def test_a_call_takes_one_number_per_sequence_and_one_for_the_rest(found):
    """After two by each rank, of which all learn that they hold the same and that nothing is wrong."""
    ranks = len(found)
    expected = {
        "longpo": [2 * ranks, 6, 1],
        "dpo": [2 * ranks, 6],
        "cross entropy": [2 * ranks, 1],
        "affine": [2 * ranks, 1],
        "kl": [2 * ranks, 1],
    }
    assert of(found, "collectives") == [expected] * ranks


def test_a_group_of_one_rank_gives_the_bits_of_no_group(found):
    assert of(found, "alone") == [True] * len(found)


def test_compiled_calls_give_the_bits_of_plain_ones(found):
    assert of(found, "compiled") == [True] * len(found)


def test_heads_and_models_under_fsdp2_get_the_whole_rows_gradients(found):
    row = Row(LONGPO)
    head, model = zip(*of(found, "sharded head"), strict=True)
    true = row.plain()
    assert_close(gathered(list(head)), {"loss": true["loss"], "d hidden": true["d hidden"], "weight": true["d weight"]})
    one = tiny_model()
    loss = one(
        input_ids=torch.arange(N)[None] % V, use_cache=False,
        compute=lambda hidden, head: head(
            hidden[0], (row.labels, row.sequences), loss=packed_preference_loss, num_chosen=3, rejected_pair=row.pair,
            nll_weights=row.weights, num_pairs=5.0, objective=row.objective, **row.refs,
        ).loss,
    )  # fmt: skip
    loss.backward()
    expected = {"loss": loss.detach()} | {name: p.grad for name, p in one.named_parameters()}
    assert_close(gathered(list(model)), expected, 1e-4)
