"""benchmarks/gpu/steps.py without a GPU: plans for both cards and what all costs by them, all rows in rehearsal, trouble."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import check, questions, report, steps
from benchmarks.gpu.rows import perform
from benchmarks.gpu.setting import CARDS as BY_CARD
from benchmarks.gpu.setting import H100, H200, REHEARSAL
from benchmarks.stamp import ROOT
from benchmarks.training import step as training
from longpo_ops.memory import pieces
from longpo_ops.memory.plan import CARDS, Phase

QUESTIONS = (steps.step, steps.longest, steps.pairs, steps.offload, steps.long)


@pytest.fixture(scope="module")
def cards() -> dict[str, dict[str, list]]:
    return {card.card: {q.__name__: list(q(card)) for q in QUESTIONS} for card in (H100, H200)}


@pytest.fixture
def no_torchao(monkeypatch):
    def missing():
        raise ValueError("states='8bit' needs torchao")

    training.no_8bit_states.cache_clear()
    monkeypatch.setattr(pieces, "_torchao", missing)
    yield
    training.no_8bit_states.cache_clear()


@pytest.mark.parametrize("setting", [H100, H200], ids=["H100", "H200"])
def test_every_row_fits_the_card_and_its_time(cards, setting):
    questions = cards[setting.card]
    rows = [row for rows in questions.values() for row in rows]
    assert all(row.shortage(setting) is None for row in rows)
    assert all(0 < row.device_bytes <= setting.device_bytes and row.host_bytes <= setting.host_bytes for row in rows)
    assert all(len({tuple(row.key) for row in rows}) == len(rows) for rows in questions.values())
    assert sum(row.seconds for name in ("step", "longest", "pairs", "offload") for row in questions[name]) < 320


def test_the_headlines_are_the_lengths_of_the_card(cards):
    for rows in (cards[card]["long"] for card in cards):
        assert [row.case for row in rows[:2]] == ["llama-3-8b, 262144 tokens", "llama-3-8b, 196608 tokens"]
        assert rows[0].seconds < 300
    first, _, *parts = cards["H200"]["long"]
    assert [row.case.partition(", 524288 tokens, ")[2] for row in parts] == [
        "4 layers",
        "backward of the last 4 layers",
    ]
    assert first.seconds + sum(row.seconds for row in parts) < 700  # of the 720 that docs/measured.md gives them
    assert parts[1].device_bytes > first.device_bytes - (4 << 30)


def test_what_it_costs_can_be_listed_without_a_gpu(capsys):
    assert check.main(["--list"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["seconds", "on", *BY_CARD]
    for question, line in zip((*questions.QUESTIONS, *questions.LONG), lines, strict=True):
        seconds = line.split()[1 : 1 + len(BY_CARD)]
        assert line.startswith(question.name) and line.endswith(question.asks)
        assert all(0 < int(each) < (900 if question in questions.LONG else 120) for each in seconds), line


@pytest.mark.skipif(torch.cuda.is_available(), reason="costs are listed for a machine without a GPU")
def test_the_committed_costs_are_the_codes(tmp_path):
    assert report.main(["--costs", "--docs", str(tmp_path)]) == 0
    old, new = ((root / report.MEASURED).read_text() for root in (ROOT, tmp_path))
    assert new == old, "run `python -m benchmarks.gpu.report --costs`: docs/measured.md is old"
    for question in (*report.QUESTIONS, *report.LONG):
        assert re.search(rf"^\| `{question.name}`", new, re.MULTILINE)


def test_a_longest_step_has_float32_states_where_they_fit():
    settings = steps.possible(H200, steps.FLOAT32, steps.ALL, steps.ON_HOST)
    plans = [steps.plan_for(card, steps.shape_of(card, 131_072), settings) for card in (H200, H100)]
    assert [(plan.settings.states, plan.settings.host) for plan in plans] == [("float32", False), ("8bit", False)]
    assert not any(plan.shortfalls for plan in plans)


def test_plans_are_made_with_the_rates_of_the_card():
    machines = [steps.machine_of(card) for card in (H100, H200)]
    assert [machine.device_memory for machine in machines] == [
        CARDS[card]["device_memory"] for card in ("H100", "H200")
    ]
    assert machines[0].device_memory < machines[1].device_memory


@pytest.mark.parametrize("length", [65_536, 131_072, 262_144])
def test_without_torchao_states_go_to_the_host_and_fit(length):
    plan = steps.plan_for(H100, steps.shape_of(H100, length), (steps.FLOAT32, steps.ON_HOST))
    assert plan.settings.host and plan.settings.states == "float32" and not plan.shortfalls


def test_what_is_planned_is_what_the_row_costs(cards):
    shape = steps.shape_of(H100, 262_144)
    plan = steps.plan_for(H100, shape, (steps.ALL,))
    (row, _) = cards["H100"]["long"]
    assert row.device_bytes == plan.peak.total and row.host_bytes == sum(plan.host.values())
    assert row.seconds > plan.step_seconds + steps.COMPILE
    part = replace(shape, backward_layers=4)
    saved = plan.seconds["backward"] * 28 / 32
    assert steps.seconds_of(plan, shape) - steps.seconds_of(plan, part) == pytest.approx(saved)


def rehearse(question, setting=REHEARSAL) -> list[dict]:
    rows = [row.name | perform(row) for row in question(setting)]
    json.dumps(rows)
    return rows


@pytest.mark.parametrize("states", ["as they come", "without torchao"])
def test_rehearsed_steps_are_measured_beside_their_plans(states, request):
    if states == "without torchao":
        request.getfixturevalue("no_torchao")
    for row in rehearse(steps.step) + rehearse(steps.longest):
        assert row["status"] == "measured" and row["seconds"] > 0 and row["warm_up_seconds"] > 0
        assert row["planner_error_seconds"] == pytest.approx(row["seconds"] / row["predicted_seconds"] - 1)
        assert row["settings"]["offload"] and row["settings"]["on_host"] == 3
        if states == "without torchao":
            assert row["settings"]["states"] == "float32" and "torchao" in row["no_8bit_states"]


def test_a_shorter_step_follows_one_that_did_not_work(monkeypatch):
    whole, shorter = rehearse(steps.long)
    assert whole["status"] == "measured" and whole["targets"] == steps.TARGETS and whole["within_targets"] is False
    assert shorter["status"].startswith("skipped: a longer")

    def full(shape, *_):
        if shape.length == 262_144 // steps.SHRINK:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return {"status": "measured", "planner_error_peak": -0.02, "planner_error_seconds": 0.1}

    monkeypatch.setattr(steps, "measure_plan", full)
    whole, shorter = rehearse(steps.long)
    assert whole["status"] == "failed: out of memory: CUDA out of memory." and whole["planned_device_bytes"] > 0
    assert shorter["status"] == "measured" and shorter["within_targets"] is True


def test_proofs_in_parts_have_no_rate_of_a_whole_step():
    *_, layers, backward = steps.long(replace(REHEARSAL, card="H200"))
    layers, backward = (row.name | perform(row) for row in (layers, backward))
    assert layers["tflops"] > 0 and "planner_error_seconds" in layers
    assert backward["status"] == "measured" and not {"tflops", "planner_error_seconds"} & set(backward)


def test_errors_are_shares_of_what_the_plan_expects():
    peak = Phase("loss", {"reserve": 20, "weights": 700, "loss": 100, "error": 88})
    plan = SimpleNamespace(peak=peak, step_seconds=4.0, host={"layer inputs": 7}, settings=steps.ALL)
    told = training.compare_with_plan(plan, {"seconds": 5.0, "peak_device_bytes": 840})
    assert told["planner_error_seconds"] == pytest.approx(0.25) and told["planner_error_peak"] == pytest.approx(0.05)
    assert (told["predicted_peak_bytes"], told["planned_device_bytes"], told["planned_host_bytes"]) == (800, 908, 7)


def test_one_sequence_against_two():
    (row,) = rehearse(steps.pairs)
    assert row["status"] == "measured" and row["faster"] > 0 and row["memory"] > 0
    assert row["faster"] == pytest.approx(row["two"]["seconds"] / row["one"]["seconds"])


def test_offload_is_bitwise_and_all_is_measured():
    rows = rehearse(steps.offload)
    assert {row["status"] for row in rows} == {"measured"}
    offloaded = [row for row in rows if row["case"].endswith(steps.offloading.COMPARED[1])]
    assert len(offloaded) == 2 and all(row["bitwise"] and row["offloaded_bytes"] > 0 for row in offloaded)
    rates, *host = rows[-3:]
    assert set(rates["share_of_one_copy"]) == {"out", "in"}
    assert [row["case"] for row in host] == ["float32 states", "8bit states"]
    assert all(row["seconds_per_billion"] > row["seconds"] > 0 for row in host)


def test_a_wrong_gradient_fails_where_kernels_repeat_themselves(monkeypatch):
    digests = dict.fromkeys(steps.offloading.COMPARED, "right")
    monkeypatch.setattr(
        steps.offloading,
        "perform",
        lambda shape, name: {"gradients": digests[name], "norm": 1.0, "seconds": 1.0, "used_bytes_after": 0},
    )
    name = steps.offloading.COMPARED[1]
    assert "failed" not in str(rehearse(steps.offload))
    digests[name] = "wrong"
    failed = [row for row in rehearse(steps.offload) if row["status"].startswith("failed: offload changed")]
    assert {row["case"].partition(": ")[2] for row in failed} == {name} and len(failed) == 2


def test_host_states_without_torchao_are_skipped(no_torchao):
    *_, row = steps.offload(REHEARSAL)
    assert perform(row)["status"].startswith("skipped: no 8-bit states: states='8bit' needs torchao")
