"""Cells, tables, the heat map, and what is read back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from longpo_ops.evaluate import Cell, Scores
from longpo_ops.evaluate.report import markdown, tenth


@pytest.fixture
def scores() -> Scores:
    cells = {128: Cell(0.5, 4, 1, False), 256: Cell(0.25, 4, 0, False)}
    tasks = {"codes": cells, "vt": {128: Cell(1.0, 4)}}
    depths = {128: {0: Cell(1.0, 2), 9: Cell(0.0, 1)}, 256: {4: Cell(0.5, 2)}}
    counts = {"perplexity/128": {"windows": 3, "shorter": 2}, "math_find": {"samples": 2, "truncated": 1}}
    return Scores(
        tasks, depths, {128: 7.25}, {"mmlu": 0.625}, {"math_find": 0.5}, 12.0, counts, {"mmlu": {"acc,none": 0.625}},
        ("a note",), {"model": "m", "rope": None}, harness_settings={"mmlu": {"shots": 5, "metric": "acc"}},
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


def test_accuracy_is_the_mean_over_the_tasks_of_a_length(scores):
    assert scores.accuracy(128) == 0.75 and scores.accuracy(256) == 0.25 and scores.lengths() == [128, 256]
    with pytest.raises(KeyError, match="512"):
        scores.accuracy(512)


def test_the_tables_say_what_is_not_comparable_what_failed_and_what_is_unfinished(scores):
    text = markdown(scores)
    for line in (
        r"| codes \* | 50.0 (1 of 4 failed) | 25.0 |",
        "| vt | 100.0 |  |",
        "| **mean** | **75.0** | **25.0** |",
        "| 128 | 7.250 | 3 windows, 2 shorter |",
        "| mmlu | 5 | acc | 0.6250 |",
        "| math_find | 50.0 | 2 samples, 1 truncated |",
        "* a note",
        "model: m  ",
    ):
        assert line in text.splitlines(), line
    assert "not comparable with published scores" in text and "rope" not in text and "Unfinished" not in text
    assert "![accuracy" in text and "![accuracy" not in markdown(scores, picture=False)
    comparable = replace(scores, tasks={"vt": {128: Cell(1.0, 4)}}, complete=False)
    assert "not comparable" not in markdown(comparable) and "Unfinished" in markdown(comparable)
    unjudged = replace(scores, published={}, counts={"longbench_chat": {"truncated": 0, "unjudged": 3}})
    assert "| longbench_chat | unjudged | 3 unjudged |" in markdown(unjudged)


def test_depths_lie_in_tenths():
    assert [tenth(depth) for depth in (0.0, 0.0999, 0.1, 0.55, 0.999, 1.0)] == [0, 0, 1, 5, 9, 9]
