"""Cells, tables, the heat map, and what is read back."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest

from longpo_ops.evaluate import Cell, Scores
from longpo_ops.evaluate.report import tenth
from longpo_ops.evaluate.tables import markdown


@pytest.fixture
def scores() -> Scores:
    cells = {128: Cell(0.5, 4, 1, False, 0, 0.5), 256: Cell(0.25, 4, 0, False, 0, 0.5)}
    tasks = {"codes": cells, "vt": {128: Cell(1.0, 4, deviation=0.0)}}
    depths = {128: {0: Cell(1.0, 2), 9: Cell(0.0, 1)}, 256: {4: Cell(0.5, 2)}}
    counts = {"perplexity/128": {"windows": 3, "shorter": 2}, "math_find": {"samples": 2, "truncated": 1}}
    return Scores(
        tasks, depths, {128: 7.25}, {"mmlu": 0.625}, {"math_find": 0.5}, 12.0, counts, {"mmlu": {"acc,none": 0.625}},
        ("a note",), {"model": "m", "rope": None}, harness_settings={"mmlu": {"shots": 5, "metric": "acc"}},
        intervals={"perplexity/128": (6.5, 8.0), "harness/mmlu": (0.5, 0.75)},
    )  # fmt: skip


def test_a_cell_is_the_same_in_any_order_and_a_failure_scores_nothing():
    values = [random.Random(i).random() for i in range(99)] + [None]
    cells = {Cell.of(random.Random(i).sample(values, len(values)), False) for i in range(20)}
    (cell,) = cells
    assert (cell.samples, cell.failed, cell.comparable) == (100, 1, False)
    assert cell.score == pytest.approx(sum(values[:-1]) / 100)


def test_what_is_saved_is_read_back(scores, tmp_path):
    scores.save(tmp_path)
    assert Scores.load(tmp_path) == scores
    assert (tmp_path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "results.md").read_text() == markdown(scores)
    (tmp_path / "results.json").write_text('{"tasks": 1}')
    with pytest.raises(ValueError, match=r"no finished evaluation .*; run `longpo evaluate --out"):
        Scores.load(tmp_path)
    with pytest.raises(ValueError, match="No such file"):
        Scores.load(tmp_path / "nowhere")


def test_results_of_an_earlier_version_are_read_and_have_no_intervals(scores, tmp_path):
    scores.save(tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    for name in ("means", "intervals", "state", "why"):
        del found[name]
    for cell in (cell for name in ("tasks", "depths") for row in found[name].values() for cell in row.values()):
        del cell["deviation"], cell["interval"]
    for complete, state in ((True, "finished"), (False, "")):
        (tmp_path / "results.json").write_text(json.dumps(found | {"complete": complete}))
        old = Scores.load(tmp_path)
        assert old.state == state and old.tasks["vt"][128].interval is None and old.mean(128, "local").interval is None
        assert ("Unfinished: it was stopped, or requests failed" in markdown(old)) != complete
    (tmp_path / "results.json").write_text(json.dumps(found | {"state": "resting"}))
    with pytest.raises(ValueError, match="its state is 'resting'"):
        Scores.load(tmp_path)


def test_comparable_and_local_tasks_have_a_mean_each(scores):
    assert (scores.accuracy(128, "local"), scores.accuracy(128, "comparable"), scores.accuracy(256)) == (0.5, 1.0, 0.25)
    assert (
        scores.lengths() == [128, 256]
        and scores.kinds(128) == ["comparable", "local"]
        and scores.kinds(256) == ["local"]
    )
    with pytest.raises(
        ValueError, match="accuracy at 128 tokens has two means, which are not averaged: name comparable or local"
    ):
        scores.accuracy(128)
    with pytest.raises(KeyError, match="no comparable task was measured at 256"):
        scores.mean(256, "comparable")
    mean = scores.mean(128, "local")
    assert (mean.tasks, mean.samples, mean.interval) == (1, 4, scores.tasks["codes"][128].interval)
    with pytest.raises(KeyError, match="512"):
        scores.accuracy(512)


def test_the_tables_say_what_is_not_comparable_what_failed_and_what_is_unfinished(scores):
    text = markdown(scores)
    for line in (
        r"| codes \* | 50.0 (15.4 to 84.6), n=4, 1 failed | 25.0 (1.8 to 73.2), n=4 |",
        "| vt | 100.0 (45.0 to 100.0), n=4 |  |",
        "| **mean of 1 comparable** | **100.0** (45.0 to 100.0), n=4 |  |",
        r"| **mean of 1 local** \* | **50.0** (15.4 to 84.6), n=4 | **25.0** (1.8 to 73.2), n=4 |",
        "| 128 | 7.250 | 6.500 to 8.000 | 3 windows, 2 shorter |",
        "| mmlu | 5 | acc | 0.6250 | 0.5000 to 0.7500 |  |",
        "| math_find | 50.0 | 2 samples, 1 truncated |",
        "* a note",
        "model: m  ",
    ):
        assert line in text.splitlines(), line
    assert "not comparable with published scores" in text and "rope" not in text and "**" not in text.split("## ")[0]
    assert "![accuracy" in text and "![accuracy" not in markdown(scores, picture=False)
    comparable = replace(scores, tasks={"vt": {128: Cell(1.0, 4)}}, complete=False, state="stopped", why="Ctrl-C")
    assert "not comparable" not in markdown(comparable) and "**Stopped: Ctrl-C." in markdown(comparable)
    assert "| vt | 100.0, n=4 |" in markdown(comparable)  # nothing is known of its spread
    unjudged = replace(scores, published={}, counts={"longbench_chat": {"truncated": 0, "unjudged": 3}})
    assert "| longbench_chat | unjudged | 3 unjudged |" in markdown(unjudged)


def test_depths_lie_in_tenths():
    assert [tenth(depth) for depth in (0.0, 0.0999, 0.1, 0.55, 0.999, 1.0)] == [0, 0, 1, 5, 9, 9]
