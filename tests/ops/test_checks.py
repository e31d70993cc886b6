# ruff: noqa: E501 -- a table of one line per mistake
"""Wrong input: each failure is a ValueError that names the argument, what came and what was expected."""

from types import SimpleNamespace

import pytest
import torch

from longpo_ops import (
    DPO,
    KTOPair,
    fused_preference_loss,
    linear_cross_entropy,
    linear_kl,
    linear_logprobs,
    packed_preference_loss,
)
from longpo_ops.ops.checks import check_workspace
from longpo_ops.ops.sweep import scratch_bytes
from longpo_ops.parallel import Shards

B, T, H, V, N = 2, 6, 8, 11, 12


def fused(**changes):
    labels = torch.randint(V, (B, T))
    given = dict(
        chosen_hidden=torch.randn(B, T, H), rejected_hidden=torch.randn(B, T, H), weight=torch.randn(V, H),
        chosen_labels=labels, rejected_labels=labels, ref_chosen_logps=torch.zeros(B), ref_rejected_logps=torch.zeros(B),
    ) | changes  # fmt: skip
    return fused_preference_loss(**given)


def packed(**changes):
    sequences = torch.arange(N) // 3
    given = dict(
        hidden=torch.randn(N, H), weight=torch.randn(V, H), labels=torch.randint(V, (N,)), sequences=sequences,
        num_chosen=2, rejected_pair=torch.tensor([0, 1]), objective="simpo",
    ) | changes  # fmt: skip
    return packed_preference_loss(**given)


def rows(call, **changes):
    given = dict(hidden=torch.randn(N, H), weight=torch.randn(V, H), labels=torch.randint(V, (N,))) | changes
    return call(**given)


def logprobs(**changes):
    return rows(linear_logprobs, **changes)


def cross_entropy(**changes):
    return rows(linear_cross_entropy, **changes)


def kl(**changes):
    given = dict(
        hidden=torch.randn(N, H),
        weight=torch.randn(V, H),
        teacher_hidden=torch.randn(N, 5),
        teacher_weight=torch.randn(V, 5),
    )
    given |= changes
    return linear_kl(**given)


ids = lambda *shape: torch.randint(V, shape)  # noqa: E731
NOTHING = torch.full((B, T), -100)
BAD = {
    # shapes
    "hidden of another width": (fused, dict(chosen_hidden=torch.randn(B, T, 9)), ["chosen_hidden.shape=(2, 6, 9)", "weight.shape=(11, 8)", "same H"]),
    "flat hidden": (fused, dict(rejected_hidden=torch.randn(T, H)), ["rejected_hidden.shape=(6, 8)", "(sequences, tokens, H)"]),
    "batched rows": (logprobs, dict(hidden=torch.randn(2, 6, H)), ["hidden.shape=(2, 6, 8)", "(N, H)", "flatten"]),
    "weight that is a vector": (logprobs, dict(weight=torch.randn(H)), ["weight.shape=(8,)", "(V, H)"]),
    "weight without rows": (logprobs, dict(weight=torch.randn(0, H)), ["weight.shape=(0, 8)", "neither of them 0"]),
    "bias of another length": (fused, dict(bias=torch.randn(V - 1)), ["bias.shape=(10,)", "(11,)"]),
    "labels of another shape": (fused, dict(chosen_labels=ids(B, T + 1)), ["chosen_labels.shape=(2, 7)", "(2, 6)"]),
    "rejected labels of another shape": (fused, dict(rejected_labels=ids(T)), ["rejected_labels.shape=(6,)", "(2, 6)"]),
    "nll labels of another shape": (fused, dict(nll_labels=ids(B, 3)), ["nll_labels.shape=(2, 3)", "(2, 6)"]),
    "row labels of another length": (logprobs, dict(labels=ids(N + 1)), ["labels.shape=(13,)", "(12,)"]),
    "sequences of another length": (packed, dict(sequences=ids(N - 1)), ["sequences.shape=(11,)", "(12,)"]),
    "nll weights of another length": (packed, dict(nll_weights=torch.rand(3)), ["nll_weights.shape=(3,)", "(12,)"]),
    "row weights of another length": (cross_entropy, dict(row_weights=torch.rand(3)), ["row_weights.shape=(3,)", "(12,)"]),
    "teacher with other rows": (kl, dict(teacher_hidden=torch.randn(3, 5)), ["teacher_hidden has 3 rows", "12", "aligned"]),
    "teacher with another vocabulary": (kl, dict(teacher_weight=torch.randn(12, 5)), ["teacher_weight has V=12", "V=11"]),
    "mask of another length": (kl, dict(mask=torch.ones(3, dtype=torch.bool)), ["mask", "(3,)", "(12,)"]),
    # dtypes
    "integer hidden": (fused, dict(chosen_hidden=ids(B, T, H)), ["chosen_hidden.dtype=torch.int64", "float16, bfloat16"]),
    "integer weight": (logprobs, dict(weight=ids(V, H)), ["weight.dtype=torch.int64", "float32"]),
    "hidden that is no tensor": (logprobs, dict(hidden=[[1.0]]), ["hidden", "expected a tensor", "list"]),
    "weight that is a module": (fused, dict(weight=torch.nn.Linear(H, V)), ["weight", "expected a tensor", "Linear"]),
    "int32 labels": (fused, dict(chosen_labels=ids(B, T).int()), ["chosen_labels", "int64", "torch.int32"]),
    "float labels": (logprobs, dict(labels=torch.rand(N)), ["labels", "int64", "torch.float32"]),
    "labels that are a list": (logprobs, dict(labels=[1] * N), ["labels", "tensor of int64", "list"]),
    "two dtypes": (fused, dict(weight=torch.randn(V, H).bfloat16()), ["float32", "weight is torch.bfloat16", "one dtype"]),
    "two hidden dtypes": (fused, dict(rejected_hidden=torch.randn(B, T, H).half()), ["rejected_hidden is torch.float16", "chosen_hidden"]),
    "integer row weights": (cross_entropy, dict(row_weights=ids(N)), ["row_weights", "float32", "int64"]),
    "integer references": (fused, dict(ref_chosen_logps=ids(B)), ["ref_chosen_logps", "float32", "int64"]),
    "float mask": (kl, dict(mask=torch.ones(N)), ["mask", "float32", "bool"]),
    "mask that is a list": (kl, dict(mask=[True] * N), ["mask", "list", "bool"]),
    "teacher of another dtype": (kl, dict(teacher_hidden=torch.randn(N, 5).half(), teacher_weight=torch.randn(V, 5).half()), ["teacher", "torch.float16", "torch.float32"]),
    # devices
    "weight on another device": (fused, dict(weight=torch.randn(V, H, device="meta")), ["weight is on meta", "chosen_hidden on cpu", "one device"]),
    "rejected on another device": (fused, dict(rejected_hidden=torch.randn(B, T, H, device="meta")), ["rejected_hidden is on the meta device", "expected a tensor on a device"]),
    "bias on another device": (logprobs, dict(bias=torch.randn(V, device="meta")), ["bias is on meta", "hidden on cpu"]),
    "teacher on another device": (kl, dict(teacher_hidden=torch.randn(N, 5, device="meta"), teacher_weight=torch.randn(V, 5, device="meta")), ["teacher_hidden is on the meta device"]),
    # pairs
    "different pair counts": (fused, dict(rejected_hidden=torch.randn(3, T, H), rejected_labels=ids(3, T), ref_rejected_logps=torch.zeros(3)), ["3 rejected sequences for 2 chosen", "rejected_pair"]),
    "pair out of range": (fused, dict(rejected_pair=torch.tensor([0, 2])), ["rejected_pair", "0 to 2", "B=2"]),
    "negative pair": (fused, dict(rejected_pair=torch.tensor([-1, 1])), ["rejected_pair", "-1 to 1", "0 <= pair"]),
    "pair without rejected": (fused, dict(rejected_pair=torch.tensor([0, 0])), ["rejected_pair=[0, 0]", "at least one rejected"]),
    "pairs of another shape": (fused, dict(rejected_pair=torch.tensor([0])), ["rejected_pair.shape=(1,)", "(2,)"]),
    "float pairs": (fused, dict(rejected_pair=torch.tensor([0.0, 1.0])), ["rejected_pair", "int64", "float32"]),
    "packed pairs as a list": (packed, dict(rejected_pair=[0, 1]), ["rejected_pair", "tensor of int64", "list"]),
    "several rejected where one is meant": (fused, dict(objective=KTOPair(), rejected_hidden=torch.randn(3, T, H), rejected_labels=ids(3, T), ref_rejected_logps=torch.zeros(3), rejected_pair=torch.tensor([0, 1, 1])), ["kto_pair", "one rejected", "3 for 2"]),
    "num_chosen negative": (packed, dict(num_chosen=-1), ["num_chosen=-1", "int >= 0"]),
    "num_chosen no int": (packed, dict(num_chosen=2.0), ["num_chosen=2.0", "int >= 0"]),
    "sequence out of range": (packed, dict(sequences=torch.arange(N) // 2), ["sequences", "0 to 5", "< 4"]),
    "sequence below -1": (packed, dict(sequences=torch.arange(N) // 3 - 2), ["sequences", "-2", "expected -1"]),
    "num_pairs zero": (fused, dict(num_pairs=0), ["num_pairs=0", "> 0"]),
    "num_pairs nan": (fused, dict(num_pairs=float("nan")), ["num_pairs=nan", "finite"]),
    "num_pairs a tensor": (fused, dict(num_pairs=torch.tensor(2)), ["num_pairs=tensor(2)", "finite number"]),
    # references
    "reference missing": (fused, dict(ref_chosen_logps=None), ["ref_chosen_logps is missing", "longpo", "(2,)"]),
    "rejected reference missing": (fused, dict(ref_rejected_logps=None), ["ref_rejected_logps is missing", "reference"]),
    "reference not needed": (fused, dict(objective="simpo"), ["ref_chosen_logps was given", "simpo", "None"]),
    "reference of another length": (fused, dict(ref_rejected_logps=torch.zeros(3)), ["ref_rejected_logps.shape=(3,)", "(2,)"]),
    "unknown objective": (fused, dict(objective="dpoo"), ["objective='dpoo'", "longpo, dpo"]),
    "objective class": (fused, dict(objective=DPO), ["objective=", "expected one of"]),
    # labels
    "label too large": (fused, dict(chosen_labels=torch.full((B, T), V)), ["labels: 11", "sequence 0, row 0", "V=11", "-100"]),
    "label negative": (logprobs, dict(labels=torch.full((N,), -1)), ["labels: -1 in row 0: ", "0 <= label", "-100"]),
    "nll label too large": (fused, dict(nll_labels=torch.full((B, T), 99), chosen_labels=ids(B, T)), ["labels: 99", "V=11"]),
    "chosen answer without tokens": (fused, dict(chosen_labels=NOTHING), ["chosen answer 0", "no answer tokens", "ignore_index"]),
    "rejected answer without tokens": (fused, dict(rejected_labels=torch.cat([ids(1, T), NOTHING[:1]])), ["rejected answer 1", "no answer tokens"]),
    "answer token that only the shift drops": (fused, dict(chosen_labels=torch.cat([ids(B, 1), NOTHING[:, 1:]], 1)), ["chosen answer 0", "no answer tokens"]),
    "packed pair without tokens": (packed, dict(sequences=torch.where(torch.arange(N) < 9, torch.arange(N) // 3, -1)), ["rejected answer 1", "no answer tokens"]),
    "two labels for one row": (fused, dict(chosen_labels=torch.zeros(B, T).long(), nll_labels=torch.ones(B, T).long()), ["answer token 0", "NLL token 1", "same token"]),
    # options
    "softcap zero": (fused, dict(softcap=0.0), ["softcap=0.0", "> 0"]),
    "negative scale": (logprobs, dict(scale=-1.0), ["scale=-1.0", "> 0"]),
    "zero temperature": (logprobs, dict(temperature=0), ["temperature=0", "> 0"]),
    "zero teacher scale": (kl, dict(teacher_scale=0.0), ["scale=0.0", "> 0"]),
    "scale a tensor": (fused, dict(scale=torch.tensor(1.0)), ["scale=tensor(1.)", "finite number"]),
    "unknown reduction": (cross_entropy, dict(reduction="avg"), ["reduction='avg'", "mean, sum, none"]),
    "unknown kl reduction": (kl, dict(reduction="batchmean"), ["reduction='batchmean'", "mean"]),
    "unknown divergence": (kl, dict(kind="kl"), ["kind='kl'", "forward, reverse, jsd"]),
    "jsd at its end": (kl, dict(kind="jsd", beta=1.0), ["beta=1.0", "0 < beta < 1"]),
    "weights that want a gradient": (cross_entropy, dict(row_weights=torch.rand(N, requires_grad=True)), ["row_weights requires a gradient", "'mean'", "'none'"]),
    "kl weights that want a gradient": (kl, dict(row_weights=torch.rand(N, requires_grad=True)), ["row_weights requires a gradient", "'none'"]),
    "workspace for less than a row": (fused, dict(workspace_bytes=1 << 20), ["workspace_bytes=1048576", "at least", "one row of V=11 logits at H=8"]),
    "workspace negative": (logprobs, dict(workspace_bytes=-1), ["workspace_bytes=-1", "at least"]),
    "workspace a float": (kl, dict(workspace_bytes=1e9), ["workspace_bytes=1000000000.0", "at least", "None"]),
    "unknown back-end": (fused, dict(backend="cudnn"), ["backend='cudnn'", "torch, cpu, triton, cuda"]),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("call, changes, words", BAD.values(), ids=BAD)
def test_wrong_input_is_named(call, changes, words):
    torch.manual_seed(0)
    with pytest.raises(ValueError) as failure:
        call(**changes)
    for word in words:
        assert word in str(failure.value), failure.value


def test_the_right_input_passes():
    for call in (fused, packed, logprobs, cross_entropy, kl):
        out = call()
        assert getattr(out, "loss", out).isfinite().all()


def test_triton_on_cpu_tensors_says_where_it_runs():
    with pytest.raises(ValueError, match="backend='triton' cannot run here: it runs on cuda tensors, these are on cpu"):
        logprobs(backend="triton")
    with pytest.raises(ValueError, match="backend='cpu' cannot run here: float64 runs on the torch back-end only"):
        logprobs(backend="cpu", hidden=torch.randn(N, H).double(), weight=torch.randn(V, H).double())


def test_labels_are_free_where_ignore_index_says_so():
    labels = torch.tensor([[0, 1, 2, 3, 4, 5]] * B)
    out = fused(chosen_labels=labels, rejected_labels=labels, ignore_index=0)
    assert out.loss.isfinite()
    assert fused(
        chosen_labels=labels.masked_fill(labels == 5, -1), rejected_labels=labels, ignore_index=-1
    ).loss.isfinite()


def test_the_smallest_workspace_holds_one_row_and_no_less():
    weight = torch.randn(V, H)
    least = sum(scratch_bytes(weight, torch.float32))
    assert fused(workspace_bytes=least, weight=weight).loss.isfinite()
    with pytest.raises(ValueError, match=f"workspace_bytes={least - 1}: expected at least {least} bytes"):
        fused(workspace_bytes=least - 1, weight=weight)


def test_the_default_workspace_grows_with_a_row_that_does_not_fit():
    weight = torch.empty(1 << 25, 1, device="meta")  # a row of 128 MiB
    assert check_workspace(None, weight, torch.float32) >= 4 * weight.shape[0]


@pytest.mark.parametrize("call", [packed, cross_entropy])
def test_shards_of_one_process_are_all_rows(call):
    def shards(length):
        return Shards(length, SimpleNamespace(size=lambda: 1, rank=lambda: 0))

    found = []
    for given in ({}, {"shards": shards(N)}):
        torch.manual_seed(0)
        out = call(**given)
        found.append(getattr(out, "loss", out))
    assert torch.equal(*found)
    with pytest.raises(
        ValueError, match=f"hidden has {N} rows on rank 0 of 1: expected {N + 1}, rows 0 to {N} of {N + 1}"
    ):
        call(shards=shards(N + 1))
    with pytest.raises(ValueError, match=r"shards: expected a longpo_ops\.parallel\.Shards, got slice"):
        call(shards=slice(0, N))
