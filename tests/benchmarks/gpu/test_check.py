"""benchmarks/gpu/check.py without a GPU: the rehearsal has every row, and a wrong kernel does not pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.budget import judge, worst
from benchmarks.gpu import attention, check, correctness
from benchmarks.gpu.setting import REHEARSAL, Setting, attempt
from benchmarks.stamp import ROOT
from longpo_ops.attention import kernels
from longpo_ops.ops.objectives import OBJECTIVES
from longpo_ops.ops.tiles import TorchTiles

BACKENDS = ("torch", "triton", "cuda")


pytestmark = pytest.mark.xdist_group("gpu_check")  # one rehearsal for all


def run_script(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict[str, dict]:
    """Piece -> its report, of one run of the whole script; in one process, which saves the imports of seven."""
    out = tmp_path_factory.mktemp("gpu_check")
    done = run_script(out, "--rehearse", "--here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return {piece: json.loads((out / f"gpu_check_{piece}.json").read_text()) for piece in check.PIECES}


def test_a_piece_in_its_own_process(tmp_path):
    done = run_script(tmp_path, "--rehearse", "--piece", "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu_check_ceilings.json").read_text())
    assert report["state"].startswith("finished") and "--here --piece ceilings" in report["command"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_check_ceilings.json"]


def test_every_piece_finishes_with_its_stamp(rehearsal):
    for piece, report in rehearsal.items():
        assert report["piece"] == piece
        assert report["state"] == f"finished: {len(report['rows'])} rows, 0 failed"
        assert report["rehearsal"] is True
        assert report["versions"]["torch"] and report["date"].endswith("+00:00")
        assert report["command"] == "python -m benchmarks.gpu.check --rehearse --here"
        assert check.PIECES[piece][1] < 9 * 60


def statuses(report: dict, **wanted) -> list[str]:
    return [row["status"] for row in report["rows"] if all(row.get(key) == value for key, value in wanted.items())]


def test_correctness_has_every_function_option_and_dtype(rehearsal):
    report = rehearsal["correctness"]
    cases = {(row["what"], row["case"]) for row in report["rows"] if row["backend"] == "torch"}
    for dtype in ("float32", "float16", "bfloat16"):
        assert {("rows", f"{name}, {dtype}") for name in correctness.MAPS} <= cases
        for kind in ("forward", "reverse", "jsd"):
            assert ("divergence_", f"{kind} {dtype} student=True teacher=True") in cases
    assert {("rows", f"extreme: {name}") for name in correctness.EXTREMES} <= cases
    assert any(what == "segment_sums" for what, _ in cases)
    assert set(statuses(report, backend="torch")) == {"passed"}
    for backend in ("triton", "cuda"):
        assert statuses(report, backend=backend) == ["skipped: no GPU"]


def test_attention_is_judged_for_every_kernel(rehearsal):
    report = rehearsal["attention"]
    assert {row["backend"] for row in report["rows"]} == {"torch flash attention for CPU", "blockwise PyTorch"}
    assert len(report["rows"]) == 2 * 3 * 2 * 3 * 2  # kernels, layouts, heads, dtypes, windows
    assert set(statuses(report, backend="blockwise PyTorch")) == {"passed"}
    told = {status.partition(":")[0] for status in statuses(report, backend="torch flash attention for CPU")}
    assert told == {"passed", "skipped"}


def test_wrong_attention_is_a_failed_row(monkeypatch):
    right = kernels.BLOCKWISE

    def backward(*arguments):
        dq, dk, dv = right.backward(*arguments)
        return dq, dk * 1.05, dv

    monkeypatch.setattr(kernels, "BLOCKWISE", right._replace(backward=backward))
    rows = [row for row in attention.rows(REHEARSAL) if row["backend"] == right.name]
    assert all(row["status"].startswith("failed: error") for row in rows)


def test_public_functions_are_all_judged(rehearsal):
    report = rehearsal["public"]
    for dtype in ("float32", "float16", "bfloat16"):
        wanted = {("fused_preference_loss", f"{name}, {dtype}") for name in OBJECTIVES}
        wanted |= {("linear_kl", f"{kind}, {dtype}") for kind in ("forward", "reverse", "jsd")}
        wanted |= {("linear_cross_entropy", f"mean, {dtype}"), ("linear_logprobs", f"plain, {dtype}")}
        assert wanted <= {(row["what"], row["case"]) for row in report["rows"] if row["status"] == "passed"}


def test_speeds_have_every_backend_and_size(rehearsal):
    sizes = len(REHEARSAL.vocabularies)
    functions = ("logps", "gradient_", "logps_gradient_", "divergence_")
    for what in [f"epilogue: {f}" for f in functions] + ["loss: fused_preference_loss", "loss: linear_cross_entropy"]:
        report = rehearsal[what.split(":")[0]]
        assert statuses(report, what=what, backend="torch") == ["measured"] * sizes
        for backend in ("triton", "cuda"):
            assert statuses(report, what=what, backend=backend) == ["skipped: no GPU"] * sizes
    for product in ("logits", "hidden gradient", "head gradient"):
        assert statuses(rehearsal["ceilings"], what=f"product: {product}") == ["measured"] * sizes
    assert len(statuses(rehearsal["ceilings"], what="ceiling: copy")) == sizes
    assert statuses(rehearsal["logprobs"], what="linear_logprobs, forward", backend="torch") == ["measured"] * sizes
    workspaces = statuses(rehearsal["workspace"], what="workspace: fused_preference_loss")
    assert workspaces == ["measured"] * len(REHEARSAL.workspaces)
    for peer in ("longpo_ops", "naive", *(["torch chunked"] if hasattr(F, "linear_cross_entropy") else [])):
        assert statuses(rehearsal["peers"], what=f"peer: {peer}") == ["measured"] * sizes
    for peer in ("liger", "cce", "quack"):
        assert statuses(rehearsal["peers"], what=f"peer: {peer}") == ["skipped: no GPU"] * sizes


def test_timed_rows_say_what_they_are_measured_against(rehearsal):
    for piece in ("loss", "workspace"):
        for row in rehearsal[piece]["rows"]:
            if row["status"] == "measured":
                assert row["milliseconds"] > 0 and row["tflops"] > 0 and row["fraction_of_matmul"] > 0
                assert row["peak_extra_bytes"] is None  # the CPU's is not measured here
    for row in rehearsal["epilogue"]["rows"]:
        assert row["status"] != "measured" or row["fraction_of_copy"] > 0


# ---- a wrong kernel --------------------------------------------------------------------------------------------------


class Wrong(TorchTiles):
    """The PyTorch form with one result off by a little."""

    def __init__(self, function: str):
        self.function = function

    def logps(self, *arguments):
        logps, stats = super().logps(*arguments)
        return (logps * 1.001 if self.function == "logps" else logps), stats

    def gradient_(self, *arguments):
        dz = super().gradient_(*arguments)
        return dz.mul_(1.03) if self.function == "gradient_" else dz

    def logps_gradient_(self, *arguments):
        logps, dz = super().logps_gradient_(*arguments)
        if self.function == "logps_gradient_":
            dz[-1, -1] += 1.0  # the last element of the last row
        return logps, dz

    def divergence_(self, *arguments):
        values, *gradients = super().divergence_(*arguments)
        return (values * 1.001 if self.function == "divergence_" else values), *gradients

    def segment_sums(self, values, segments, out):
        super().segment_sums(values if self.function != "segment_sums" else values.bfloat16().float(), segments, out)


@pytest.mark.parametrize("function", ["logps", "gradient_", "logps_gradient_", "divergence_", "segment_sums"])
def test_a_wrong_result_is_a_failed_row(function):
    what = function if function in ("divergence_", "segment_sums") else "rows"
    rows = list(correctness.tile_rows(Wrong(function), REHEARSAL))
    failures = [row for row in rows if check.failed(row)]
    assert {row["what"] for row in failures} == {what}
    assert len(failures) > len([row for row in rows if row["what"] == what]) / 3


def test_a_wrong_result_fails_the_piece_and_the_script(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(Setting, "backends", lambda self: iter([("torch", Wrong("logps_gradient_"))]))
    assert check.main(["--rehearse", "--here", "--piece", "correctness"]) == 1
    report = json.loads((tmp_path / "gpu_check_correctness.json").read_text())
    failures = sum(row["status"].startswith("failed: error") for row in report["rows"])
    assert failures > 0 and report["state"].endswith(f"{failures} failed")


def test_nan_in_the_wrong_place_fails():
    truth = torch.tensor([1.0, float("nan"), float("-inf")], dtype=torch.float64)
    assert judge(truth.float(), truth.float(), truth)["status"] == "passed"
    for wrong in (
        [1.0, 2.0, float("-inf")],
        [float("nan")] * 3,
        [1.0, float("nan"), -1e30],
        [1.1, float("nan"), -1e999],
    ):
        assert judge(torch.tensor(wrong), truth.float(), truth)["status"].startswith("failed")
    one, other = judge(truth.float(), truth.float(), truth), {"status": "failed: error"}
    assert worst({"a": one, "b": other})["status"] == "failed: error (b)"


def test_an_exception_is_a_failed_row():
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    row = attempt({"what": "rows"}, broken)
    assert row["status"] == "failed: RuntimeError: an illegal memory access was encountered"


def test_a_piece_that_hangs_is_stopped_and_leaves_no_older_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    path = tmp_path / "gpu_check_peers.json"
    path.write_text(
        json.dumps({"piece": "peers", "state": "finished: 1 rows, 0 failed", "rows": [{"status": "measured"}]})
    )
    monkeypatch.setitem(check.PIECES, "peers", (check.PIECES["peers"][0], 0.05))
    assert check.main(["--rehearse", "--piece", "peers"]) == 1
    assert json.loads(path.read_text()) == {"piece": "peers", "rows": [], "state": "failed: stopped after 0.05 s"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert check.main([]) == 1
    assert "--rehearse" in capsys.readouterr().out
