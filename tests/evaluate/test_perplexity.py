"""Windows of held-out text, and their perplexity against the model's own logits."""

from __future__ import annotations

import math
import os
from itertools import pairwise

import numpy as np
import pytest
import torch

from longpo_ops.evaluate import Scores, evaluate
from longpo_ops.evaluate.perplexity import read_windows
from longpo_ops.evaluate.tables import markdown


def test_windows_are_stretches_of_one_text(world, tokenizer):
    texts = [tokenizer((world / f"held/{name}.txt").read_text())["input_ids"] for name in "bc"]
    long, short = len(texts[0]), len(texts[1])
    few, many = read_windows([str(world / "held")], (long - 1, 50), 1000, tokenizer)[::-1]
    assert (few.length, len(few.ids), few.texts, few.shorter) == (long - 1, 1, 1, 1)
    assert few.ids[0].tolist() == texts[0][: long - 1]
    expected = [ids[at : at + 50] for ids in texts for at in range(0, len(ids) - 49, 50)]
    assert [ids.tolist() for ids in many.ids] == expected and (many.texts, many.shorter) == (2, 0)
    assert len(expected) == long // 50 + short // 50


def test_windows_are_spread_and_begin_as_the_tokenizer_begins(world, tokenizer):
    from copy import deepcopy

    from tokenizers.processors import TemplateProcessing

    begins = deepcopy(tokenizer)
    begins.bos_token = "<|user|>"
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begins.bos_token_id)]
    )
    (all_,) = read_windows([str(world / "held")], (40,), 1000, begins)
    (some,) = read_windows([str(world / "held")], (40,), 5, begins)
    assert all(len(ids) == 40 and ids[0] == begins.bos_token_id for ids in all_.ids)
    places = [next(i for i, ids in enumerate(all_.ids) if ids is each or (ids == each).all()) for each in some.ids]
    gaps = [b - a for a, b in pairwise(places)]
    assert len(places) == 5 and places[0] == 0 and max(gaps) - min(gaps) <= 1
    ids = tokenizer((world / "held/b.txt").read_text())["input_ids"]
    assert all_.ids[1].tolist()[1:] == ids[39:78]


@pytest.mark.parametrize(
    ("sources", "lengths", "message"),
    [
        ("held", (64, 100_000), r"no text is long enough for perplexity at 100000 tokens: the longest has \d+; give"),
        ("held", (1,), "perplexity at 1 tokens; expected at least 2"),
        ("needles/nothing", (64,), "no documents at"),
    ],
)
def test_what_cannot_be_read_is_said(sources, lengths, message, world, tokenizer):
    with pytest.raises(ValueError, match=message):
        read_windows([str(world / sources)], lengths, 5, tokenizer)
    (world / "empty.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"no text for perplexity in .*empty.txt \(empty \(first: empty.txt\)\)"):
        read_windows([str(world / "empty.txt")], (64,), 5, tokenizer)


def test_files_that_give_no_text_are_named_in_the_results(settings, world, tmp_path):
    odd = tmp_path / "odd"
    odd.mkdir()
    (odd / os.fsdecode(b"\xff\n.txt")).write_bytes(b"\xe9")
    (odd / "b.txt").write_text((world / "text/a.txt").read_text())
    given = dict(lengths=(96,), texts=(str(odd),), perplexity=(str(odd),), perplexity_lengths=(32,), samples=1)
    scores, told = evaluate(settings(**given)), r"1 left out: not UTF-8 (first: \xff\n.txt)"
    assert scores.notes == (f"texts: {told}", f"perplexity: {told}")
    assert scores.perplexity and "names" in scores.tasks


def test_perplexity_is_that_of_the_logits(settings, world, model, tokenizer):
    from transformers import AutoModelForCausalLM

    held = (str(world / "held"),)
    scores = evaluate(settings(tasks=(), needles=None, perplexity=held, perplexity_lengths=(32, 200), samples=4))
    truth, network = {}, AutoModelForCausalLM.from_pretrained(model)
    for windows in read_windows(held, (32, 200), 4, tokenizer):
        ids = torch.from_numpy(np.stack(windows.ids)).long()
        with torch.no_grad():
            logits = network(ids).logits[:, :-1].double()
        told = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
        truth[windows.length] = math.exp(-told.mean())
    assert scores.perplexity.keys() == truth.keys()
    for length, value in truth.items():
        assert scores.perplexity[length] == pytest.approx(value, rel=1e-5)
    assert scores.counts["perplexity/200"] == {"windows": 4, "failed": 0, "texts": 2, "shorter": 0}


def test_windows_that_fail_are_counted_and_left_out(settings, world):
    from benchmarks.loop.openai_server import OpenAIServer, Reply

    held = dict(tasks=(), needles=None, perplexity=(str(world / "held"),), perplexity_lengths=(32,), samples=4)

    def behave(number, seen):
        return Reply(400, {"error": "too long"}) if number in (2, 3) else None

    with OpenAIServer(behave) as server:
        some = evaluate(settings(endpoints=(server.url,), concurrency=1, **held))
    with OpenAIServer() as server:
        whole = evaluate(settings(endpoints=(server.url,), concurrency=1, **held))
        assert len(server.seen) == 2  # the others are kept
    assert some.counts["perplexity/32"]["failed"] == 2 and whole.counts["perplexity/32"]["failed"] == 0
    assert "2 of 4 windows failed, last: the engine refused: 400" in " ".join(some.notes)
    assert 0 < some.perplexity[32] != whole.perplexity[32] and whole.notes == ()
    assert whole.complete and not some.complete and "requests failed without which" in markdown(some)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf"), 1.0, -9999.0])
def test_a_window_with_a_log_prob_that_is_none_is_a_failed_window(bad, settings, world, tmp_path):
    from benchmarks.loop.openai_server import OpenAIServer, Reply

    def behave(number, seen):
        scores = [None, *([-1.0] * (len(seen.body["prompt"]) - 1)), -1.0]
        scores[7] = bad if number == 2 else -1.0
        return Reply(200, {"choices": [{"text": "", "logprobs": {"token_logprobs": scores}}]})

    held = dict(tasks=(), needles=None, perplexity=(str(world / "held"),), perplexity_lengths=(32,), samples=4)
    with OpenAIServer(behave) as server:
        some = evaluate(settings(endpoints=(server.url,), concurrency=1, **held))
        assert some.counts["perplexity/32"]["failed"] == 1 and not some.complete
        assert "1 of 4 windows failed, last: no log-probs: number 7 of 31" in str(some.notes)
        assert some.perplexity == {32: pytest.approx(math.e)} and not Scores.load(tmp_path / "out").complete
        whole = evaluate(settings(endpoints=(server.url,), concurrency=1, **held))  # asks for what failed alone
        assert whole.complete and whole.counts["perplexity/32"]["failed"] == 0 and len(server.seen) == 5
    assert "NaN" not in (tmp_path / "out/results.json").read_text()
