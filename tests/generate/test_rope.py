"""Chunks are read at the model's own RoPE and whole documents at a raised one: one engine after the other, or two servers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.data import join_context, read_pairs
from longpo_ops.engines import Request, Sampling
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.generate import check, generate
from longpo_ops.generate import run as run_module

RAISED = {"rope_theta": 1.3e4}


@pytest.fixture
def own(settings, model, tmp_path):
    """A run of the tiny model at its own RoPE, on two documents."""
    return settings(model=str(model), max_documents=2, chunks=2, out=str(tmp_path / "own"))


def pairs(run) -> list:
    generate(run)
    return list(read_pairs(run.out))


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("*.jsonl"))}


def answer(run, rope: dict | None, context: str, instruction: str) -> str:
    """What an engine of its own says."""

    async def ask() -> str:
        engine = TransformersEngine(run.model, length=1024, rope=rope)
        await engine.start()
        request = Request(join_context(context, instruction), Sampling(run.answer_tokens))
        return (await engine.generate(request)).text.strip()

    return asyncio.run(ask())


def test_only_whole_documents_are_read_at_the_raised_theta(own, tmp_path):
    run = replace(own, rope=RAISED, out=str(tmp_path / "raised"))
    (plain, *_), (raised, *_) = pairs(own), pairs(run)
    assert [(t.instruction, t.chunk, t.chosen) for t in raised.turns] == [
        (t.instruction, t.chunk, t.chosen) for t in plain.turns
    ]
    turn = raised.turns[0]
    assert turn.rejected == (answer(run, RAISED, raised.document, turn.instruction),)
    assert turn.chosen == answer(run, None, turn.chunk, turn.instruction)
    both = replace(run, short_rope=RAISED, out=str(tmp_path / "both"))
    turn = pairs(both)[0].turns[0]
    assert turn.chosen == answer(run, RAISED, turn.chunk, turn.instruction)


def test_a_stop_between_the_phases_asks_nothing_twice(own, tmp_path):
    whole = replace(own, rope=RAISED, out=str(tmp_path / "whole"))
    asked = generate(whole).tally.requests
    for number, stop in enumerate((0.2, 0.8)):
        run, told = replace(whole, out=str(tmp_path / f"stopped-{number}")), []

        def stopped(fraction, documents, made, tally, told=told, stop=stop):
            told.append((fraction, documents, tally.requests))
            if fraction >= stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            generate(run, stopped)
        assert told[0][:2] == (0.25, 0)  # the first pass finishes no document
        assert told[-1][2] + generate(run).tally.requests == asked
        assert files(run.out) == files(whole.out)


def test_two_sets_of_servers_read_what_is_theirs(settings, documents):
    texts = [path.read_text() for path in documents.iterdir()]

    def reads_documents(server) -> set[bool]:
        return {seen.body["messages"][0]["content"].startswith(tuple(texts)) for seen in server.seen}

    with OpenAIServer() as short, OpenAIServer() as long:
        generate(settings(endpoints=(short.url,), long_endpoints=(long.url,)))
        assert reads_documents(short) == {False} and reads_documents(long) == {True}
        assert len(short.seen) == 2 * len(long.seen) == 2 * 16


def test_what_failed_on_a_chunk_is_not_asked_at_the_raised_theta(settings, monkeypatch, tmp_path):
    """Two phases with servers in the place of local engines, as these fail on request."""
    refused = lambda number, seen: Reply(400, {"error": "no"}) if number in (4, 5) else None  # noqa: E731
    with OpenAIServer(refused) as short, OpenAIServer() as long:
        run = settings(endpoints=(short.url,), max_documents=1, concurrency=1)
        engines = run.make_engine(1024), replace(run, endpoints=(long.url,)).make_engine(1024)
        monkeypatch.setattr(run_module, "_phases", lambda *_: [(engines[0], None), (None, engines[1])])
        result = generate(run)
        assert result.outcomes[0]["counts"] == {"the engine refused": 1}
        assert (len(short.seen), len(long.seen)) == (8, 3)  # the list is asked for without a schema, too
    (pair,) = read_pairs(tmp_path / "pairs")
    assert len(pair.turns) == 3


def test_chunks_that_the_model_does_not_read_at_its_own_theta_are_refused(own):
    for changes in ({"max_chunk": 1000}, {"max_chunk": 960, "question_tokens": 48}):
        run = replace(own, rope=RAISED, length=4096, min_document=256, max_document=2000, **changes)
        for refuse in (check, generate):
            with pytest.raises(ValueError, match=r"reads 1024 tokens at its own RoPE.*lower max_chunk"):
                refuse(run)
        assert not Path(run.out).exists()  # which would hold them to the settings that were refused
    with pytest.raises(ValueError, match="long_endpoints without endpoints"):
        replace(own, long_endpoints=("http://h/v1",))
    with pytest.raises(ValueError, match=r"short_rope: rope_theta is -1"):
        replace(own, short_rope={"rope_theta": -1})
