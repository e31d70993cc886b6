"""benchmarks/gpu: speed.py, peers.py and kernels.py without a GPU: every row is there, what is timed is the right loss, and
what cannot be is told."""

import sys
from collections import Counter
from functools import partial
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F

from benchmarks.gpu import kernels, peers, speed
from benchmarks.gpu.rows import perform, results
from benchmarks.gpu.setting import CARDS, NO_GPU, REHEARSAL
from benchmarks.gpu.tables import failed

H100, H200 = CARDS["H100"], CARDS["H200"]
BACKENDS = ("triton", "cuda", "torch")
SMALL = speed.Size(REHEARSAL, REHEARSAL.vocabularies[0], REHEARSAL.few_rows)

pytestmark = pytest.mark.xdist_group("gpu_check")  # one rehearsal for all


@pytest.fixture(scope="module")
def rehearsal() -> dict[str, list[dict]]:
    speed.matmul_rate.cache_clear()
    return {"loss": list(results(speed.rows(REHEARSAL))), "kernels": list(results(kernels.rows(REHEARSAL)))}


def statuses(rows: list[dict], **wanted) -> Counter:
    return Counter(row["status"] for row in rows if all(row[key] == value for key, value in wanted.items()))


# ---- the rehearsal ---------------------------------------------------------------------------------------------------


def test_the_loss_is_timed_on_every_backend_and_at_every_size(rehearsal):
    rows, sizes = rehearsal["loss"], len(REHEARSAL.vocabularies) + 1  # and the longer one of the first
    ours = {backend: statuses(rows, what="fused_preference_loss", backend=backend) for backend in BACKENDS}
    assert ours == {"triton": {NO_GPU: sizes}, "cuda": {NO_GPU: sizes}, "torch": {"measured": sizes}}
    assert statuses(rows, what="linear_cross_entropy", backend="") == {
        "measured": sizes + 2
    }  # two at the other workspace
    assert statuses(rows, what="linear_cross_entropy", backend="scaled") == {NO_GPU: sizes}
    assert statuses(rows, what="ceiling: matmul") == {"measured": 2 + 1}
    assert statuses(rows, what="ceiling: copy") == {"measured": 1}


def test_the_peers_that_need_no_gpu_are_run(rehearsal):
    sizes = len(REHEARSAL.vocabularies) + 1
    there = ["naive PyTorch", "TRL", *(["PyTorch chunked"] if hasattr(F, "linear_cross_entropy") else [])]
    assert {name: statuses(rehearsal["loss"], what=name) for name in there} == {n: {"measured": sizes} for n in there}
    for name in ("Liger", "CCE, all probabilities", "CCE", "QuACK"):
        assert set(statuses(rehearsal["loss"], what=name)) == {NO_GPU}
    assert all(row["version"] for row in rehearsal["loss"] if row["what"] in there)


def test_the_parts_are_timed_on_every_backend(rehearsal):
    rows = rehearsal["kernels"]
    for function in (*kernels.FUNCTIONS, "linear_logprobs, forward"):
        told = [list(statuses(rows, what=function, backend=backend)) for backend in BACKENDS]
        assert told == [[NO_GPU], [NO_GPU], ["measured"]]
    for product in ("logits", "hidden gradient", "head gradient"):
        assert statuses(rows, what=f"product: {product}") == {"measured": 1}
    assert statuses(rows, what="fused_preference_loss") == {"measured": len(kernels.WORKSPACES)}
    assert statuses(rows, what="torch.mm") == {"measured": 1}
    assert statuses(rows, what="scaled_exps", backend="scaled") == {NO_GPU: 1}
    assert all(row["logp_difference"] < 1e-5 for row in rows if row["what"].startswith("linear_") and "tflops" in row)


def test_timed_rows_say_what_they_are_measured_against(rehearsal):
    for row in rehearsal["loss"] + rehearsal["kernels"]:
        if row["status"] == "measured":
            assert row["milliseconds"] > 0
            assert row["what"].startswith("ceiling") or row.get("fraction_of_matmul", row.get("fraction_of_copy")) > 0
    losses = [row for row in rehearsal["loss"] if row["case"].startswith("N=") and row["status"] == "measured"]
    for row in losses:
        assert row["tflops"] > 0 and row["loss"] > 0
        assert row["peak_extra_bytes"] is None  # the CPU's is not measured here
        assert len(row["milliseconds_runs"]) == row["repeats"]
        assert row["delivered_gradient_bytes"] > 0
        assert abs(row["loss_difference"]) < 1e-5 and row["hidden_gradient_error"] < 1e-5
        assert row["what"] == "fused_preference_loss" or row["head_gradient_error"] < 1e-5


def test_a_ceiling_is_measured_once_for_all(rehearsal):
    sizes = {row["case"] for row in rehearsal["loss"] if row["what"] == "ceiling: matmul"}
    assert speed.matmul_rate.cache_info().misses == len(sizes)


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [H100, H200, REHEARSAL], ids=lambda setting: setting.card)
def test_names_are_unique_and_every_row_has_its_price(setting):
    for question in (speed, kernels):
        rows = list(question.rows(setting))
        names = [tuple(row.key) for row in rows]
        assert len(set(names)) == len(names)
        for row in rows:
            assert (row.seconds > 0) == (row.device_bytes > 0)  # what is only told costs nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("setting", [H100, H200], ids=lambda setting: setting.card)
def test_the_questions_cost_what_they_may(setting):
    cost = [sum(row.seconds for row in q.rows(setting) if row.shortage(setting) is None) for q in (speed, kernels)]
    assert 30 < cost[0] < 80 and 10 < cost[1] < 30
    told = {row.what for row in speed.rows(setting) if row.seconds == 0}
    assert told == {"QuACK", "PyTorch chunked"}  # nobody expects them there


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_rows_come_in_order_of_worth_and_pytorch_s_backend_is_not_timed():
    rows = [row for row in speed.rows(H100) if row.seconds]
    first = [(row.what, row.backend) for row in rows if row.case.startswith("N=4096 H=4096 V=128256")]
    assert first[:4] == [
        ("fused_preference_loss", "triton"),
        ("fused_preference_loss", "cuda"),
        ("linear_cross_entropy", ""),
        ("linear_cross_entropy", "scaled"),  # the candidate for the default, beside it
    ]
    assert [what for what, _ in first[5:9]] == ["naive PyTorch", "TRL", "Liger", "CCE"]
    order = list(dict.fromkeys(row.case.partition(" workspace")[0] for row in rows if row.case.startswith("N=")))
    assert order == [f"N={n} H=4096 V={v}" for n, v in ((4096, 128256), (65536, 128256), (4096, 32000), (4096, 151936))]
    assert not [row for question in (speed, kernels) for row in question.rows(H100) if row.backend == "torch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_ceiling_is_measured_at_the_chunks_of_the_sweep():
    assert speed.ceiling_sizes(H100, 128_256) == [4096, 5120, 8192]  # of 4,096 rows, of 65,536, and another
    assert speed.ceiling_sizes(H100, 151_936) == [4096]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_full_logits_of_65536_rows_fit_an_h200_only():
    def shortage(setting):
        (row,) = [r for r in speed.rows(setting) if r.what == "naive PyTorch" and r.case.startswith("N=65536")]
        return row.shortage(setting)

    assert shortage(H100).startswith("memory: it takes ") and shortage(H200) is None


# ---- what is compared ------------------------------------------------------------------------------------------------


def test_the_truth_is_the_cross_entropy_and_its_gradients():
    size = SMALL._replace(rows=3 * speed.PART)
    inputs = speed.Inputs(size, 3)
    hidden, weight = (t.detach().double().requires_grad_() for t in (inputs.hidden, inputs.weight))
    loss = F.cross_entropy(hidden @ weight.T, inputs.labels)
    loss.backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "BLOCK", 80)  # several blocks, the last one shorter
        found = speed.truth.__wrapped__(size, 3)
    assert -found.logps.double().mean().item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(found.hidden.double(), hidden.grad[: speed.PART], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(found.head.double(), weight.grad[inputs.labels[: speed.PART]], rtol=1e-4, atol=1e-8)


def sum_over_rows(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def other_labels(hidden, weight, labels):
    """Of random labels the loss is nearly the same."""
    return F.cross_entropy(hidden @ weight.T, labels.roll(1))


def frozen_head(hidden, weight, labels):
    return F.cross_entropy(hidden @ weight.T.detach(), labels)


def a_peer(loss) -> peers.Peer:
    return peers.Peer("other", lambda: peers.backwards(loss), "torch", "torch", 1.0, needs_gpu=False)


@pytest.mark.parametrize(
    "loss, why",
    [
        (sum_over_rows, "loss difference"),
        (other_labels, "hidden gradient error"),
        (frozen_head, "head gradient error 1"),
    ],
)
def test_a_peer_that_computes_something_else_gets_no_time(loss, why):
    row = perform(speed._peer(SMALL, a_peer(loss), compiled=True))
    assert row["status"].startswith("skipped: it computes something else: ") and why in row["status"]
    assert "milliseconds" not in row and "loss" in row


def test_of_ours_that_would_be_a_failure():
    other_objective = partial(speed._preference, SMALL, {"objective": "dpo"})
    for compute in (partial(speed._cross_entropy, SMALL, lambda: peers.backwards(other_labels)), other_objective):
        row = perform(speed.Row("ours", "", compute))
        assert row["status"].startswith("failed: it computes something else: ") and "milliseconds" not in row


def test_scoring_that_is_wrong_gets_no_time():
    size = SMALL._replace(rows=48)

    def low(hidden, weight, labels, on_device):
        return (hidden @ weight.T).log_softmax(1).gather(1, on_device[:, None])[:, 0] - 0.01

    row = kernels._score(size, low, 0)
    assert row["status"] == "failed: log-probs are up to 0.01 off, allowed 0.002" and "milliseconds" not in row


def broken(*arguments):
    raise RuntimeError("no kernel image is available")


def out_of_memory(*arguments):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "peer, status",
    [
        (a_peer(broken), "skipped: RuntimeError: no kernel image is available"),
        (a_peer(out_of_memory), "skipped: out of memory"),
        (a_peer(broken)._replace(package="a-peer", module="no_such_module"), "skipped: a-peer is not installed"),
        (a_peer(broken)._replace(module="torch:no_such"), f"skipped: torch {metadata.version('torch')} has no no_such"),
    ],
)
def test_a_peer_that_does_not_run_is_no_failure(peer, status):
    row = perform(speed._peer(SMALL, peer, compiled=True))
    assert row["status"] == status and not failed(row) and "milliseconds" not in row


def test_trl_runs_where_its_trainer_does_not_import(monkeypatch):
    for module in [name for name in sys.modules if name == peers.TRAINER or name.partition(".")[0] == "datasets"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError):
        __import__(peers.TRAINER)
    (trl,) = [peer for peer in peers.PEERS if peer.name == "TRL"]
    row = perform(speed._peer(SMALL, trl, compiled=True))
    assert row["status"] == "measured" and row["head_gradient_error"] < 1e-5
    assert peers.TRAINER not in sys.modules  # who needs the trainer later gets the real one
