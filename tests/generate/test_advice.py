"""Where much is lost to one reason, the summary says which setting helps."""

from __future__ import annotations

import inspect
import re

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.generate import commands, generate_and_summarise
from longpo_ops.generate.advice import DOCUMENTS, NEEDS_NONE, TURNS, advice, helps
from longpo_ops.generate.report import values_of
from tests.generate.test_docs import reasons


def test_every_reason_has_an_advice_or_is_named_as_needing_none():
    filtered = reasons("generate/filters.py") - {"chosen equal or nearly equal to rejected"}
    counted = {f"{which}: {reason}" for reason in filtered for which in ("chosen", "rejected")}
    counted |= reasons() - (filtered - {"empty"})  # a document may be empty, too
    assert {"questions: none", "chosen: cut off", "shorter than wanted", "unfaithful", "unjudged"} <= counted
    told = {reason for table in (TURNS, DOCUMENTS) for reason in counted if helps(reason, table)}
    assert told | {reason for reason in counted if reason in NEEDS_NONE} == counted
    assert not told & NEEDS_NONE


def test_every_advice_names_options_that_exist_and_what_they_are_now(settings):
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(commands.generate).parameters}
    now = settings(answer_tokens=24).now()
    for text in (*TURNS.values(), *DOCUMENTS.values()):
        assert set(re.findall(r"--[a-z-]+", text)) <= known | {"--max-model-len"}
        assert set(re.findall(r"\{(\w+)\}", text)) <= now.keys()
    assert now["min_chunk"] == 48 and now["min_document"] == 256


def test_more_than_a_tenth_is_much():
    lost, now = {"chosen: cut off": 2, "chosen: refusal": 1, "rejected: empty": 9}, {"answer_tokens": 128}
    assert list(advice("turns", 7, lost, now)) == [
        '2 of 19 turns were lost to "chosen: cut off": raise --answer-tokens (now 128), or ask for short answers '
        "(--prompts with lead_ins.txt)"
    ]
    assert next(advice("turns", 8, lost | {"chosen: refusal": 0}, now)).startswith("2 of 19")
    assert list(advice("turns", 9, lost, now)) == []  # 2 of 21
    assert "--column (now body)" in next(advice("documents", 0, {"no text in column 'text'": 1}, {"column": "body"}))


def test_a_summary_says_what_would_help(settings, tmp_path):
    def behave(number, seen):
        cut = {"message": {"content": "The bell rings and"}, "finish_reason": "length"}
        return Reply(body={"choices": [cut]}) if seen.body["max_tokens"] == 24 else None

    with OpenAIServer(behave) as server:
        result, summary = generate_and_summarise(settings(endpoints=(server.url,), max_documents=1))
    (line,) = summary["advice"]
    assert line.startswith('4 of 4 turns were lost to "chosen: cut off": raise --answer-tokens (now 24)')
    assert ("much is lost", line) in values_of(result, summary)
    assert "(now 24)" in (tmp_path / "pairs" / "summary.json").read_text()
