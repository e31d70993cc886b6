"""vLLM in this process: greedy texts and scores as with transformers, prefix caching by its counters, whole runs."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from longpo_ops.data import ChatFormat, read_pairs
from longpo_ops.engines import Request, RequestFailed, Sampling
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.engines.vllm import VLLMEngine
from longpo_ops.generate import generate
from longpo_ops.generate.prompts import list_schema
from tests.engines import tiny

OPTIONS = {"enforce_eager": True}


def question(document: int, turn: int, **sampling) -> Request:
    text = f"{tiny.document(document)}\n\n{tiny.QUESTIONS[turn]}"
    return Request(text, Sampling(24, **sampling), group=f"document {document}", logprobs=True)


@pytest.fixture(scope="module")
def engines(model):
    """vLLM and transformers, both started, and what runs a coroutine in the loop they live in."""
    vllm = VLLMEngine(str(model), length=1024, dtype="float32", options=OPTIONS | {"disable_log_stats": False})
    transformers = TransformersEngine(str(model), length=1024, dtype="float32")
    with asyncio.Runner() as runner:
        try:
            for engine in (vllm, transformers):
                runner.run(engine.start())
            yield vllm, transformers, runner.run
        finally:
            for engine in (vllm, transformers):
                runner.run(engine.close())


def test_vllm_agrees_with_transformers_and_shares_prefills(engines):
    from vllm.v1.metrics.reader import get_metrics_snapshot

    vllm, transformers, run = engines
    greedy = [question(document, turn) for document in range(2) for turn in range(4)]
    drawn = question(0, 0, temperature=1.5, seed=5)

    async def ask(engine):
        texts = [*await engine.batch(greedy[:1]), *await engine.batch(greedy[1:])]
        ids = engine.tokenizer(greedy[0].content)["input_ids"]
        return texts, await engine.batch([drawn, drawn]), await engine.score(ids)

    texts, twice, scores = run(ask(vllm))
    with pytest.raises(RequestFailed, match="the engine refused"):
        run(vllm.generate(Request("The wind turned. " * 1000, Sampling(24))))
    found = {metric.name: metric for metric in get_metrics_snapshot()}
    counted = {name: found[f"vllm:prefix_cache_{name}"].value for name in ("queries", "hits")}
    truth, _, expected = run(ask(transformers))
    assert [answer.text for answer in texts] == [answer.text for answer in truth]
    assert [answer.token_ids for answer in texts] == [answer.token_ids for answer in truth]
    assert [answer.finish for answer in texts] == [answer.finish for answer in truth]
    for ours, theirs in zip(texts, truth, strict=True):
        assert np.abs(np.subtract(ours.logprobs, theirs.logprobs)).max() < 1e-3
        assert ours.prompt_tokens == theirs.prompt_tokens
    assert np.abs(scores - expected).max() < 1e-3
    assert twice[0].text == twice[1].text  # drawn with the same seed
    # The three later questions of the first document found all whole blocks of its prefill in the cache.
    assert texts[0].cached_tokens == 0
    assert all(answer.cached_tokens > 0.85 * answer.prompt_tokens for answer in texts[1:4])
    assert counted["hits"] >= sum(answer.cached_tokens for answer in texts) and counted["queries"] > counted["hits"]


def test_a_prefill_and_token_ids_go_on_as_with_transformers(engines):
    *both, run = engines
    asked = Request(f"{tiny.document(2)}\n\n{tiny.QUESTIONS[0]}", Sampling(24))

    async def ask(engine):
        whole = await engine.generate(asked)
        begun = engine.tokenizer.decode(whole.token_ids[:2])
        prompt = engine.tokenizer.apply_chat_template(asked.messages, add_generation_prompt=True, return_dict=False)
        raw = replace(asked, prompt_ids=(*prompt, *whole.token_ids[:2]))
        rest = await engine.batch([replace(asked, prefill=begun), raw, replace(asked, prefill="Eve")])
        assert rest[0].text == rest[1].text == whole.text.removeprefix(begun)
        assert rest[0].prompt_tokens == rest[1].prompt_tokens == whole.prompt_tokens + 2
        return [whole.text, *(each.text for each in rest)]

    ours, theirs = (run(ask(engine)) for engine in both)
    assert ours == theirs


def test_chunks_and_documents_are_read_by_one_vllm_after_the_other(model, settings, tmp_path):
    """In one process, chunks at the model's own theta, documents at a raised one."""
    run = dict(model=str(model), dtype="float32", temperature=0.0, max_documents=1)
    raised = run | {"rope": {"rope_theta": 2e5}}
    generate(settings(**raised, engine="vllm", out=str(tmp_path / "vllm"), engine_options=OPTIONS))
    generate(settings(**raised, out=str(tmp_path / "raised")))
    generate(settings(**run, out=str(tmp_path / "plain")))
    (ours,), (theirs,), (plain,) = (list(read_pairs(tmp_path / name)) for name in ("vllm", "raised", "plain"))
    assert (ours.document, ours.turns) == (theirs.document, theirs.turns)
    chosen, rejected = (
        {turn.instruction: getattr(turn, kind) for turn in plain.turns} for kind in ("chosen", "rejected")
    )
    assert all(turn.chosen == chosen.get(turn.instruction, turn.chosen) for turn in ours.turns)
    assert any(turn.rejected != rejected.get(turn.instruction, turn.rejected) for turn in ours.turns)


def test_a_whole_run_makes_the_pairs_that_transformers_makes(model, settings, tmp_path):
    run = dict(model=str(model), dtype="float32", temperature=0.0, reference_logps=True)
    result = generate(settings(**run, engine="vllm", out=str(tmp_path / "vllm"), engine_options=OPTIONS))
    generate(settings(**run, out=str(tmp_path / "transformers")))
    ours, theirs = (list(read_pairs(tmp_path / name)) for name in ("vllm", "transformers"))
    assert len(ours) >= 1 and [(pair.document, pair.turns) for pair in ours] == [(p.document, p.turns) for p in theirs]
    assert result.tally.cached_tokens > 0
    from transformers import AutoTokenizer

    chat = ChatFormat(AutoTokenizer.from_pretrained(model), max_length=1024)
    for pair, other in zip(ours, theirs, strict=True):
        assert chat.tokenize(pair).ref_chosen_logp == pytest.approx(other.ref_chosen_logp, abs=1e-2)
        assert pair.ref_rejected_logps == pytest.approx(other.ref_rejected_logps, abs=1e-2)


def test_an_answer_is_held_to_a_schema(engines):
    vllm, _, run = engines
    request = Request(tiny.document(0), Sampling(200, temperature=0.7, seed=1), schema=list_schema(2))
    answer = run(vllm.generate(request))
    assert answer.finish == "length" or len(json.loads(answer.text)["questions"]) == 2
    assert answer.text.lstrip().startswith("{")
