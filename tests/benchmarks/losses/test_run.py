"""benchmarks/losses/run.py: tiny cases from the command line to the table, their truth, and wrong candidates, never timed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.losses import run as runner
from benchmarks.losses import states
from benchmarks.losses.cases import CASES, make
from benchmarks.losses.measurement import MEASURED, Order, perform, verdict
from benchmarks.losses.peers import NAIVE, OURS, SPARSE, TRL, candidates, ours
from benchmarks.losses.truth import ROUNDED, ROWS, truth
from benchmarks.measure import Peak
from benchmarks.stamp import RESULTS, ROOT
from longpo_ops.ops import truth as full

MIB = 1 << 20
TINY = ("tiny", "tiny-preference", "tiny-kl")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[dict, str, str]:
    """JSON, README and output of a run of one case in its own processes."""
    out = tmp_path_factory.mktemp("results")
    options = ["--repeats", "2", "--tokens", "16", "32", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.losses.run", "tiny-preference", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text())
    assert path.name.startswith(f"{content['date'][:10]}-cpu-")
    return content, (out / "README.md").read_text(), done.stdout


def order(case: str, folder: Path, yardstick: dict | None = None) -> Order:
    return Order(case, NAIVE, 1, 1, 60.0, runner.write_truths(CASES[case], folder), yardstick)


def test_a_case_runs_from_the_command_line(report):
    content, readme, printed = report
    rows = {row["candidate"]: row for row in content["rows"]}
    assert set(rows) == set(candidates(CASES["tiny-preference"]))
    for name in (NAIVE, f"{OURS} (torch)"):
        assert rows[name]["status"] == MEASURED
        assert len(rows[name]["seconds"]) == 2 and min(rows[name]["seconds"]) > 0
        assert set(rows[name]["sums"]) == {"16", "32"} and max(rows[name]["sums"].values()) < 1e-2
        assert (
            len(rows[name]["extra_bytes_runs"]) == 2
            and max(rows[name]["extra_bytes_runs"]) == rows[name]["extra_bytes"]
        )
    table = runner.table(content["rows"])
    assert " of 32 |" in table and table in printed and table in readme


def test_a_report_says_where_and_with_what(report):
    content, readme, _ = report
    assert content["hardware"]["cores"] and content["hardware"]["processor"]
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["python"]
    assert content["command"].startswith("python -m benchmarks.losses.run tiny-preference")
    assert content["date"].endswith("+00:00") and "commit" in content and "load" in content
    assert content["versions"]["torch"] in readme and str(ROOT) not in readme


@pytest.mark.parametrize("name", TINY)
def test_truth_is_the_naive_form_in_float64(name):
    """The sampled truth against autograd through full logits of the same inputs in float64."""
    case = CASES[name]
    inputs = make(case)
    expected = truth(case, inputs)
    for key, tensor in inputs.tensors.items():
        if tensor.is_floating_point():
            inputs.tensors[key] = tensor.detach().double().requires_grad_(key in inputs.leaves)
    loss = _float64_loss(case, inputs)
    loss.backward()
    errors = expected.errors(loss.item(), inputs.gradients())
    assert max(errors.values()) < 1e-12, errors


def _float64_loss(case, inputs):
    from longpo_ops.ops import objectives

    if case.op == "cross_entropy":
        return full.cross_entropy(inputs["hidden"], inputs["weight"], inputs["labels"])
    if case.op == "kl":
        log_p = full.logits(inputs["hidden"], inputs["weight"]).log_softmax(-1)
        log_q = full.logits(inputs["teacher_hidden"], inputs["teacher_weight"]).log_softmax(-1)
        return full.divergence(log_p, log_q, "reverse").mean()
    names = ("chosen_hidden", "rejected_hidden", "weight", "chosen_labels", "rejected_labels")
    return full.preference_loss(
        *(inputs[name] for name in names),
        objective=objectives.LongPO(beta=0.1, preference_weight=0.01),
        ref_chosen_logps=inputs["ref_chosen_logps"],
        ref_rejected_logps=inputs["ref_rejected_logps"],
        nll_labels=inputs["nll_labels"],
    )[0]


def test_a_frozen_head_and_rows_by_themselves(tmp_path, monkeypatch):
    """As with a real model's states: the head gets no gradient, and a sparse hidden gradient is judged row by row."""
    case = replace(CASES["tiny"], name="tiny-frozen", rows=150, states="prose", frozen=True)
    drawn = torch.randn(200, case.width), torch.randn(case.vocab, case.width), torch.randint(case.vocab, (200,))
    monkeypatch.setattr(states, "load", lambda kind: drawn)
    monkeypatch.setitem(CASES, case.name, case)
    made = order(case.name, tmp_path)
    plain = perform(made)
    assert plain["status"] == MEASURED and set(plain["errors"]) == {"loss", "hidden", ROWS, ROUNDED}
    ours = perform(replace(made, candidate=SPARSE, yardstick=plain["errors"]))
    assert ours["status"] == MEASURED, ours
    worse = plain["errors"] | {ROWS: 1.01 * plain["errors"][ROUNDED]}
    assert verdict(worse, plain["errors"], case, sparse=True).startswith("wrong: rows of hidden")


@pytest.mark.parametrize("name", ("tiny", "tiny-dpo"))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_trl_is_right(name, dtype, tmp_path, monkeypatch):
    """Its fused head, and DPO through what its DPOTrainer calls, against the truth."""
    pytest.importorskip("trl")
    monkeypatch.setitem(CASES, name, replace(CASES[name], dtype=dtype))
    assert TRL in candidates(CASES[name]) and TRL not in candidates(
        CASES["tiny-preference"]
    )  # an NLL beside it has none
    plain = order(name, tmp_path)
    result = perform(replace(plain, candidate=TRL, yardstick=perform(plain)["errors"]))
    assert result["status"] == MEASURED and result["extra_bytes"] >= 0, result


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_candidate_is_reported_and_not_timed(name, tmp_path):
    right = candidates(CASES[name])[NAIVE]
    made = order(name, tmp_path)
    yardstick = perform(made)["errors"]
    made = order(name, tmp_path, yardstick)
    assert perform(made)["status"] == MEASURED

    def wrong_loss(case, x):
        return right(case, x) + 1e-2

    def wrong_gradient(case, x):
        return right(case, x) + 1e-3 * (x["weight"] - x["weight"].detach()).sum()

    for wrong in (wrong_loss, wrong_gradient):
        result = perform(made, lambda case, wrong=wrong: {NAIVE: wrong})
        assert result["status"].startswith("wrong: "), wrong.__name__
        assert "seconds" not in result


def test_nan_is_wrong_and_a_missing_peer_is_named(tmp_path):
    assert verdict({"loss": float("nan")}, {"loss": 1.0}, CASES["tiny"]).startswith("wrong")

    def absent(case, x):
        raise ImportError("no such package")

    result = perform(order("tiny", tmp_path), lambda case: {NAIVE: absent})
    assert result["status"] == "not installed: no such package"


def test_a_wrong_result_is_shown_without_a_time():
    common = {"case": "c", "threads": 1, "rows": 8, "N": 8, "H": 2, "V": 3, "dtype": "float32"}
    measured = {"status": MEASURED, "median_s": 2.0, "extra_bytes": 0, "errors": {"loss": 0.0, "weight": 0.0}}
    rows = [
        common | measured | {"candidate": NAIVE},
        common | {"candidate": "fast", "status": "wrong: loss is off"},
        common | measured | {"candidate": f"{OURS} (torch)", "median_s": 1.0},
    ]
    lines = runner.table(rows).splitlines()
    assert "wrong: loss is off" in lines[3]
    assert "| 2.00 |" in lines[4] and ours(rows[2]["candidate"])  # 2.0 s of the best peer over 1.0 s


def test_what_misses_a_target_is_told():
    """Filed results reach theirs; a C++ back-end as slow as the best peer does not where bfloat16 is not multiplied."""
    for path in RESULTS.glob("*-cpu-*.json"):
        report = json.loads(path.read_text())
        assert runner.missed(report["rows"], report["hardware"]["features"]) == [], path.name
    common = {"case": "ce-2k", "threads": 2, "rows": 8, "N": 8, "H": 2, "V": 3, "status": MEASURED, "dtype": "bfloat16"}
    peer = common | {"candidate": NAIVE, "median_s": 2.0, "extra_bytes": 1 << 40}
    row = common | {"candidate": f"{OURS} (cpu)", "median_s": 1.0, "extra_bytes": 64 * MIB + 24}
    assert runner.missed([peer, row], ["avx2", "amx_bf16"]) == []
    told = "ce-2k, 2 threads: 2.00 times as fast as the best peer, at least 3.0 required"
    assert runner.missed([peer, row], ["avx2"]) == [told]
    (told,) = runner.missed([peer, row | {"dtype": "float32", "extra_bytes": 66 * MIB}], ["avx2"])
    assert told == "ce-2k, 2 threads: 66 MiB of scratch, at most 64 required"


def test_candidates_far_behind_are_visited_once(monkeypatch):
    took = dict(zip(candidates(CASES["tiny"]), (1.0, 1.4, 1.6, 9.0, 1.2, 0.1), strict=True))  # the last two are ours
    visits = []

    def measured(order):
        visits.append(order.candidate)
        return {
            "status": MEASURED,
            "seconds": [took[order.candidate]],
            "extra_bytes_runs": [0],
            "median_s": took[order.candidate],
        }

    monkeypatch.setattr(runner, "measure", measured)
    rows = runner.measure_case(CASES["tiny"], 1, SimpleNamespace(rounds=3, repeats=1), 1.0, {})
    assert {name: visits.count(name) for name in took} == {name: 3 if s <= 1.5 else 1 for name, s in took.items()}
    assert [len(row["seconds"]) for row in rows] == [visits.count(row["candidate"]) for row in rows]


def test_cases_are_added_to_a_file_of_today(report, tmp_path):
    content, _, _ = report
    row = content["rows"][0]
    more = content | {"rows": [row | {"case": "tiny"}, row | {"case": "tiny-kl"}], "command": "python -m other"}
    runner.write(content | {"rows": [row, row | {"case": "tiny"}]}, tmp_path)
    path = runner.write(runner.added(runner.earlier(tmp_path), more), tmp_path)
    both = json.loads(path.read_text())
    assert [each["case"] for each in both["rows"]] == [row["case"], "tiny", "tiny-kl"]
    assert both["took_s"] == 2 * content["took_s"] and both["earlier"][0]["command"] == content["command"]
    readme = (tmp_path / "README.md").read_text()
    assert f"`{content['command']}` (commit " in readme and ") and `python -m other` (commit " in readme
    path.write_text(json.dumps(content | {"versions": {}}))
    with pytest.raises(ValueError, match="other versions than now"):
        runner.earlier(tmp_path)


def test_the_readme_keeps_what_is_outside_the_markers():
    once = runner.with_section("# Title\n", "a-host", "old")
    both = runner.with_section(once, "b-host", "other")
    again = runner.with_section(both, "a-host", r"new \1")
    assert again.startswith("# Title\n") and r"new \1" in again and "other" in again and "old" not in again


@pytest.mark.parametrize("exact", [True, False])
def test_peak_sees_memory_that_is_gone_again(exact, monkeypatch):
    if not exact:
        monkeypatch.setattr("benchmarks.measure._reset_mark", lambda: False)
    with Peak() as peak:
        for _ in range(3):
            torch.ones(32 * MIB // 4).sum()
    assert 31 * MIB <= peak.bytes < 96 * MIB
