"""Two evaluations against each other: made by the tiny model and by servers, and folders that are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.cli import app
from longpo_ops.evaluate import Scores, compare, evaluate
from longpo_ops.evaluate.comparison import markdown
from longpo_ops.evaluate.kept import ANSWERS, VALUES, read_lines, write_lines

ALL, NONE = "Ann Bob Cleo Dan Eve Finn", "nobody"


def said(text: str):
    return lambda number, seen: Reply(200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture
def two(settings, shared, tmp_path):
    """Folders of two evaluations, copied: one whose model knows no name, one whose model knows all; and how they are made."""

    def make(folder: Path, text: str, **changes) -> Path:
        with OpenAIServer(said(text)) as server:
            evaluate(
                settings(
                    endpoints=(server.url,), out=str(folder), **{"samples": 8, "tasks": ("names", "begun")} | changes
                )
            )
        return folder

    for name, text in (("knows-not", NONE), ("knows", ALL)):
        if not (shared / name).exists():
            make(shared / name, text)
        shutil.copytree(shared / name, tmp_path / name)
    return tmp_path / "knows-not", tmp_path / "knows", make


def rows(found, kind: str) -> dict:
    return {(row.what, row.length): row for row in found.rows if row.kind == kind}


def test_every_task_and_their_mean_is_compared_in_pairs(two, tmp_path):
    first, second, _ = two
    found = compare(first, second)
    tasks, means = rows(found, "task"), rows(found, "mean")
    assert set(tasks) == {(task, n) for task in ("names", "begun") for n in (96, 160)}
    for row in [*tasks.values(), *means.values()]:
        assert (row.first, row.second, row.difference, row.paired, row.verdict) == (0.0, 1.0, 1.0, True, "better")
        assert row.interval[0] > 0 and (row.wins, row.losses, row.ties) == (row.samples, 0, 0)
    assert {key: row.samples for key, row in means.items()} == {("mean of 2 local tasks", n): 16 for n in (96, 160)}
    assert means["mean of 2 local tasks", 96].interval[0] > tasks["names", 96].interval[0]  # more samples
    assert found.left_out == found.notes == ()
    back = compare(second, first)
    assert {row.verdict for row in back.rows} == {"worse"} and compare(first, second) == found
    copy = shutil.copytree(first, tmp_path / "copy")
    assert {(row.verdict, row.ties) for row in compare(first, copy).rows} == {("no difference can be shown", 8),
                                                                           ("no difference can be shown", 16)}  # fmt: skip


def test_the_command_shows_and_writes_the_same_numbers(two, tmp_path):
    first, second, _ = two
    done = CliRunner().invoke(app, ["evaluate", "compare", str(first), str(second), "--out", str(tmp_path / "c.json")])
    assert done.exit_code == 0, done.output
    assert all(each in done.output for each in ("Accuracy at 160 tokens", "better", "see "))
    kept = json.loads((tmp_path / "c.json").read_text())
    assert [(row["difference"], row["verdict"]) for row in kept["rows"]] == [(1.0, "better")] * 6
    text = markdown(compare(first, second))
    assert "| names | 0.0 | 100.0 | +100.0 (+" in text and "| 8, 0, 0 | 8 | better |" in text
    for words, message in (
        ((first, first), "are one folder"),
        ((first, tmp_path / "nowhere"), "is no finished evaluation"),
        ((first,), "Missing argument"),
    ):
        done = CliRunner().invoke(app, ["evaluate", "compare", *map(str, words)])
        assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output
    done = CliRunner().invoke(app, ["evaluate", "--help"])
    assert done.exit_code == 0 and "compare A B" in done.output and "--model" in done.output


def test_what_one_run_alone_has_is_named(two, tmp_path):
    first, _, make = two
    other = make(tmp_path / "other", ALL, lengths=(160, 200), tasks=("names",), samples=6)
    found = compare(first, other)
    assert set(rows(found, "task")) == {("names", 160)} and rows(found, "task")["names", 160].samples == 6
    told = " | ".join(found.left_out)
    assert (
        f"task begun: only in {first}" in told and f"length 200: only in {other}" in told and "length 96: only" in told
    )
    assert found.notes == ("names at 160: 6 samples are in both, of 8 and 6",)
    nothing = make(tmp_path / "nothing", ALL, lengths=(300,), tasks=("names",))
    with pytest.raises(ValueError, match="have nothing in common to compare: task begun: only in"):
        compare(first, nothing)


def test_other_questions_are_compared_as_independent_samples(two, tmp_path):
    first, second, make = two
    other = make(tmp_path / "other", ALL, seed=1)
    found, pairs = compare(first, other), compare(first, second)
    assert any("names at 96: the samples have other references" in note for note in found.notes)
    row = rows(found, "task")["names", 96]
    assert not row.paired and row.samples == 16 and row.verdict == "better"
    assert row.interval[1] - row.interval[0] > 0 and "no pairs" in markdown(found)
    assert rows(pairs, "task")["names", 96].paired


def test_the_same_questions_in_other_texts_are_pairs_and_told(two):
    first, second, _ = two
    lines = read_lines(second / ANSWERS, ("id",))
    write_lines(second / ANSWERS, [line | {"asked": "another"} for line in lines])
    found = compare(first, second)
    assert all(row.paired for row in found.rows) and "with other texts or lengths of text around them" in found.notes[0]


def test_samples_that_are_not_those_of_the_results_are_refused(two):
    first, second, _ = two
    whole = (second / ANSWERS).read_text()
    for text, message in (
        (whole[:-40], "no valid JSON"),
        ("".join(whole.splitlines(True)[1:]), "has 7 samples of .*, which are not the 8 of the results"),
        (whole.replace('"score": 1.0', '"score": 0.5', 1), "which are not the 8 of the results"),
        ('{"id": 1}\n', "expected id, task, length"),
    ):
        (second / ANSWERS).write_text(text)
        with pytest.raises(ValueError, match=message):
            compare(first, second)


def test_perplexities_are_compared_by_windows_with_the_same_tokens(settings, world, tmp_path):
    given = dict(tasks=(), needles=None, perplexity=(str(world / "held"),), perplexity_lengths=(64,), samples=9)
    folders = []
    for name, theta in (("a", None), ("b", 50.0)):
        run = settings(out=str(tmp_path / name), rope=theta and {"rope_theta": theta}, **given)
        scores = evaluate(run)
        low, high = scores.intervals["perplexity/64"]
        assert low < scores.perplexity[64] < high and len(read_lines(Path(run.out) / VALUES, ("of",))) == 9
        folders.append(run.out)
    found = compare(*folders)
    (row,) = found.rows
    told = [Scores.load(folder).perplexity[64] for folder in folders]
    assert [row.first, row.second] == pytest.approx(told) and row.difference == pytest.approx(told[1] / told[0])
    assert row.interval[0] < row.difference < row.interval[1] and row.wins + row.losses == 9
    assert (row.verdict == "worse") == (row.interval[0] > 1)
    lines = read_lines(tmp_path / "b" / VALUES, ("of",))
    write_lines(tmp_path / "b" / VALUES, [line | {"asked": "other"} for line in lines])
    with pytest.raises(ValueError, match="perplexity at 64: no window with the same token ids in both"):
        compare(*folders)
