"""benchmarks/gpu/check.py without a GPU: the rehearsal has every row, a wrong kernel does not pass, and nothing is lost to a
worker that dies, a deadline or a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.budget import judge, worst
from benchmarks.gpu import attention, check, correctness
from benchmarks.gpu.questions import QUESTIONS
from benchmarks.gpu.report import read, summary
from benchmarks.gpu.rows import perform, results
from benchmarks.gpu.setting import REHEARSAL
from benchmarks.stamp import ROOT
from longpo_ops.attention import kernels
from longpo_ops.ops.objective import PAIR
from longpo_ops.ops.objectives import OBJECTIVES
from longpo_ops.ops.tiles import TorchTiles
from tests.benchmarks.gpu import trouble

pytestmark = pytest.mark.xdist_group("gpu_check")  # one rehearsal for all


def start_script(out: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu.check", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> dict:
    """The report of one run of the whole script."""
    out = tmp_path_factory.mktemp("gpu_check")
    script = start_script(out, "--rehearse")
    said, _ = script.communicate()
    assert script.returncode == 0, said[-3000:]
    assert [path.name for path in out.iterdir()] == [check.FILE]
    report = json.loads((out / check.FILE).read_text())
    assert said.strip().endswith(summary(report, out / check.FILE))
    return report


def rows_of(report: dict, question: str, **wanted) -> list[dict]:
    rows = [row for row in report["rows"] if row["question"] == question]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def statuses(report: dict, question: str, **wanted) -> list[str]:
    return [row["status"] for row in rows_of(report, question, **wanted)]


def test_the_rehearsal_answers_every_question_with_its_stamp(rehearsal):
    assert rehearsal["state"] == "finished" and rehearsal["running"] is None
    assert list(dict.fromkeys(row["question"] for row in rehearsal["rows"])) == [q.name for q in QUESTIONS]
    assert rehearsal["rehearsal"] is True and rehearsal["card"] == "CPU"
    assert rehearsal["versions"]["torch"] and rehearsal["date"].endswith("+00:00")
    assert rehearsal["command"] == "python -m benchmarks.gpu.check --rehearse"
    names = [(row["question"], *check._key(row)) for row in rehearsal["rows"]]
    assert len(set(names)) == len(names)


def test_correctness_has_every_function_option_and_dtype(rehearsal):
    cases = {(row["what"], row["case"]) for row in rows_of(rehearsal, "tiles", backend="torch")}
    for dtype in ("float32", "float16", "bfloat16"):
        assert {("rows", f"{name}, {dtype}") for name in correctness.MAPS} <= cases
        for kind in ("forward", "reverse", "jsd"):
            assert ("divergence_", f"{kind} {dtype} student=True teacher=True") in cases
    for what in ("rows", "beside"):
        assert {(what, f"extreme: {name}") for name in correctness.EXTREMES} <= cases
    assert {("beside", f"class weights, {name}, bfloat16") for name in correctness.MAPS} <= cases
    assert any(what == "segment_sums" for what, _ in cases)
    assert set(statuses(rehearsal, "tiles", backend="torch")) == {"passed"}
    for backend in ("triton", "cuda"):
        assert statuses(rehearsal, "tiles", backend=backend) == ["skipped: no GPU"]


def test_attention_is_judged_for_every_kernel(rehearsal):
    rows = rows_of(rehearsal, "attention")
    assert {row["backend"] for row in rows} == {"torch flash attention for CPU", "blockwise PyTorch"}
    assert len(rows) == 2 * 2 * 2 * (4 + 1 + 1)  # kernels, heads, windows, layouts of each dtype
    assert set(statuses(rehearsal, "attention", backend="blockwise PyTorch")) == {"passed"}
    told = {
        status.partition(":")[0] for status in statuses(rehearsal, "attention", backend="torch flash attention for CPU")
    }
    assert told == {"passed", "skipped"}


def test_wrong_attention_is_a_failed_row(monkeypatch):
    right = kernels.BLOCKWISE

    def backward(*arguments):
        dq, dk, dv = right.backward(*arguments)
        return dq, dk * 1.05, dv

    monkeypatch.setattr(kernels, "BLOCKWISE", right._replace(backward=backward))
    rows = [perform(row) for row in attention.rows(REHEARSAL) if row.backend == right.name]
    assert rows and all(row["status"].startswith("failed: error") for row in rows)


def test_public_functions_are_all_judged(rehearsal):
    for dtype in ("float32", "float16", "bfloat16"):
        of = {name: "fused_preference" if PAIR in cls.forms else "packed_objective" for name, cls in OBJECTIVES.items()}
        names = of if dtype == "float32" else correctness.NARROW
        wanted = {(f"{of[name]}_loss", f"{name}, {dtype}") for name in names}
        wanted |= {("fused_policy_loss", f"kl, {dtype}")}
        wanted |= {("linear_kl", f"{kind}, {dtype}") for kind in ("forward", "reverse", "jsd")}
        wanted |= {("linear_cross_entropy", f"mean, {dtype}"), ("linear_logprobs", f"plain, {dtype}")}
        wanted |= {
            ("linear_cross_entropy", f"smoothed, z-loss, mean, {dtype}"),
            ("linear_logprobs", f"entropy, {dtype}"),
        }
        assert wanted <= {(row["what"], row["case"]) for row in rows_of(rehearsal, "public", status="passed")}


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
    what = {"gradient_": {"rows", "beside"}, "logps": {"rows"}, "logps_gradient_": {"rows"}}.get(function, {function})
    rows = list(results(correctness.tile_rows(Wrong(function), REHEARSAL)))
    failures = [row for row in rows if check.failed(row)]
    assert {row["what"] for row in failures} == what
    assert len(failures) > len([row for row in rows if row["what"] in what]) / 3


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


# ---- trouble ---------------------------------------------------------------------------------------------------------


@contextmanager
def troubled(out: Path):
    """With questions of trouble.py in the place of the check's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUT", str(out))
        patch.setattr(check, "WORKER", trouble.MODULE)
        patch.setattr(check, "BY_NAME", trouble.QUESTIONS)
        yield


@pytest.fixture
def ask(tmp_path):
    """Asks questions of trouble.py -> exit status, report."""
    with troubled(tmp_path):
        yield lambda *names, options=(): asked(tmp_path, *names, options=options)


@pytest.fixture(scope="module")
def trouble_with_three(tmp_path_factory) -> tuple[int, dict]:
    """Exit status and report of one run, whose workers are started once for several tests."""
    with troubled(out := tmp_path_factory.mktemp("trouble")):
        return asked(out, "crash", "seeds", "costs")


def asked(out: Path, *names: str, options: tuple[str, ...] = ()) -> tuple[int, dict]:
    pieces = [word for name in names for word in ("--piece", name)]
    status = check.main(["--rehearse", *pieces, *options])
    return status, json.loads((out / check.FILE).read_text())


def told(report: dict) -> dict[str, dict]:
    return {row["case"]: row for row in report["rows"]}


def test_a_row_that_kills_its_worker_hides_no_other(trouble_with_three):
    status, report = trouble_with_three
    rows = told({"rows": rows_of(report, "crash")})
    assert status == 1 and report["state"] == "finished"
    assert rows["dies"]["status"] == "failed: its process ended with signal 11"
    assert rows["dies"]["first"] == rows["dies"]["status"]  # it was asked again
    assert rows["passes"]["status"] == rows["fails_once"]["status"] == "passed"
    assert rows["raises"]["status"] == "failed: ValueError: a shape does not fit"
    assert len(rows_of(report, "seeds")) == 3


def test_a_failed_row_is_asked_once_more_with_another_seed(trouble_with_three):
    rows = told({"rows": rows_of(trouble_with_three[1], "seeds")})
    assert (rows["fails_once"]["status"], rows["fails_once"]["seed"]) == ("passed", 1)
    assert rows["fails_once"]["first"] == "failed: error 2, allowed 1"
    assert rows["fails"]["status"] == rows["fails"]["first"] == "failed: error 2, allowed 1"
    assert (rows["passes"]["seed"], "first" in rows["passes"]) == (0, False)


def test_a_row_that_hangs_is_stopped_at_the_deadline(ask):
    start = time.monotonic()
    status, report = ask("stuck", "seeds", options=("--deadline", "40"))
    assert time.monotonic() - start < 90
    rows = rows_of(report, "stuck")
    assert [row["status"] for row in rows] == ["passed", check.STOPPED, check.STOPPED]
    assert [row["case"] for row in rows] == ["passes", "hangs", "the rest"]
    assert [row["status"] for row in rows_of(report, "seeds")] == [check.STOPPED]
    assert (status, report["state"]) == (0, "finished")


def test_what_does_not_fit_says_so(trouble_with_three):
    rows = told({"rows": rows_of(trouble_with_three[1], "costs")})
    assert rows["large"]["status"].startswith("skipped: memory: it takes 8589934592.0 GiB of the device")
    assert rows["host"]["status"].startswith("skipped: memory: it takes 8589934592.0 GiB of the host")
    assert rows["slow"]["status"].startswith("skipped: no time: it would take")
    assert rows["quick"]["status"] == "passed"


def test_only_what_failed_is_asked_again(ask, tmp_path):
    first = ask("seeds", "costs")[1]
    status, report = ask(options=("--only", "failed"))
    assert status == 1 and json.loads((tmp_path / check.BEFORE).read_text()) == first
    assert [(row["question"], row["case"]) for row in report["rows"]] == [("seeds", "fails")]


def test_where_nothing_failed_nothing_is_asked_and_the_report_stays(ask, tmp_path, capsys):
    first = ask("costs")[1]
    assert ask(options=("--only", "failed")) == (0, first)
    assert "no row failed" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [check.FILE]


@pytest.mark.parametrize("content, told", [(None, "run the check first"), ("{broken", "no report of `make gpu-check`")])
def test_a_last_report_that_is_not_there_or_broken_is_wrong_usage(content, told, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "RESULTS", tmp_path / "none")
    if content:
        (tmp_path / check.FILE).write_text(content)
    with pytest.raises(SystemExit) as stop:
        check.main(["--only", "failed"])
    assert stop.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--deadline=-5", "--deadline=nan", "--deadline=soon", "--host-bytes=-1", "--host-bytes=1.5"]
)
def test_wrong_numbers_are_wrong_usage(option, capsys):
    with pytest.raises(SystemExit) as stop:
        check.main(["--rehearse", option])
    assert stop.value.code == 2 and option.partition("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("number", range(6))
def test_a_kill_at_any_time_leaves_a_report_and_no_worker(number, tmp_path):
    """Every other kill comes at a random moment after the first row, the rest at one of the seconds from the start on. The
    first two meet all workers, the others the one that most questions share."""
    pieces = () if number < 2 else ("--piece", "tiles", "--piece", "public")
    script, path = start_script(tmp_path, "--rehearse", *pieces), tmp_path / check.FILE
    begun = number % 2 == 1
    wait_for(lambda: path.exists() and (not begun or read(path).content["rows"]))
    time.sleep(random.uniform(0, 3))
    workers = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    script.send_signal(signal.SIGKILL)
    script.wait()
    report = read(path).content
    assert report["state"] == "running" and report["rehearsal"] is True
    assert bool(report["rows"]) or not begun
    assert isinstance(summary(report), str)
    wait_for(lambda: not any(map(alive, workers)))


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_before_anything_is_unpacked_or_set_aside(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(check, "_carried", None)
    (tmp_path / check.FILE).write_text("an earlier one")
    assert check.main([]) == 1
    assert "--rehearse" in capsys.readouterr().out
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an earlier one"]
