"""What a reader can tell of an evaluation that is at work, was stopped, or is finished with failures; killed: test_run.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines import server as server_engine
from longpo_ops.evaluate import Scores, evaluate


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(server_engine, "FIRST_PAUSE", 0.02)


def table(run) -> str:
    return (Path(run.out) / "results.md").read_text()


def test_a_run_says_that_it_runs_and_who_is_at_work(settings):
    seen = []

    def look(done, total, label):
        if (Path(run.out) / "results.json").exists():
            seen.append((Scores.load(run.out).state, table(run)))

    with OpenAIServer() as server:
        run = settings(endpoints=(server.url,), samples=2)
        scores = evaluate(run, look)
    assert {state for state, _ in seen} == {"running"}
    assert all("**Running when this was written, by process" in text and "work/lock" in text for _, text in seen)
    assert (scores.state, scores.why, scores.complete) == ("finished", "", True) and "**Running" not in table(run)


def test_ctrl_c_says_so_and_the_same_command_goes_on(settings):
    def interrupt(done, total, label):
        if label.endswith("160 tokens"):
            raise KeyboardInterrupt

    with OpenAIServer() as server:
        run = settings(endpoints=(server.url,), concurrency=1)
        with pytest.raises(KeyboardInterrupt):
            evaluate(run, interrupt)
        found = Scores.load(run.out)
        assert (found.state, found.why, found.complete, found.lengths()) == ("stopped", "Ctrl-C", False, [96])
        assert "**Stopped: Ctrl-C. Here is what was measured; the same command goes on.**" in table(run)
        assert evaluate(run).state == "finished" == Scores.load(run.out).state


def test_requests_that_failed_are_told_apart_from_a_stop(settings, world):
    def fail(number, seen):
        return Reply(400, {"error": "no"}) if number == 2 else None

    with OpenAIServer(fail) as server:
        scores = evaluate(settings(endpoints=(server.url,), concurrency=1))
        assert (scores.state, scores.complete, scores.failed) == ("finished", True, 1)
        assert "requests that failed: 1" in table(settings()) and "**Stopped" not in table(settings())
    with OpenAIServer(fail) as server:
        given = dict(tasks=(), needles=None, perplexity=(str(world / "held"),), perplexity_lengths=(50,), samples=3)
        run = settings(endpoints=(server.url,), concurrency=1, out=settings().out + "-windows", **given)
        scores = evaluate(run)
    assert (scores.state, scores.complete, scores.failed) == ("finished", False, 1)
    assert "**Finished, but requests failed without which a number is another" in table(run)


def test_a_run_that_ends_before_its_first_length_leaves_earlier_results_as_they_are(settings):
    def stop(done, total, label):
        if done:
            raise KeyboardInterrupt

    with OpenAIServer() as server:
        run = settings(endpoints=(server.url,), samples=2)
        whole = evaluate(run)
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings(endpoints=(server.url,), samples=3), stop)
    assert Scores.load(run.out) == whole
