"""Answers of thinking models: scored without their reasoning, and counted where they were cut off inside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.evaluate import Scores, evaluate

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
ALL = "It may be " + " or ".join(NAMES)  # each name, so that it scores 1 wherever it is scored
MT = {"question_id": 81, "category": "math", "turns": ["What is 3 + 4?", "Twice that?"]}


def said(text, finish: str = "stop", **more) -> Reply:
    return Reply(200, {"choices": [{"message": {"content": text, **more}, "finish_reason": finish}]})


def records(run) -> list[dict]:
    return [json.loads(line) for line in (Path(run.out) / "answers.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("reply", "score", "cut"),
    [
        (said(f"<think>{ALL}</think>\n\nNobody."), 0.0, 0),
        (said(f"<think>Nobody.</think>\n\n{ALL}"), 1.0, 0),
        (said(f"<think>{ALL}", "length"), 0.0, 2),
        (said("Nobody.", reasoning_content=ALL), 0.0, 0),
        (said(None, "length", reasoning_content=ALL), 0.0, 2),
        (said(f"Between <think> and </think>: {ALL}"), 1.0, 0),
    ],
)
def test_an_answer_is_scored_without_its_reasoning(reply, score, cut, settings):
    with OpenAIServer(lambda number, seen: reply) as server:
        run = settings(endpoints=(server.url,), lengths=(160,), samples=2, reasoning_tokens=cut)
        scores = evaluate(run)
        assert {seen.body["max_tokens"] for seen in server.seen} == {12 + cut}
        assert evaluate(run).tasks == scores.tasks and len(server.seen) == 2  # the same out of the journal
    cell = scores.tasks["names"][160]
    assert (cell.score, cell.samples, cell.failed, cell.cut) == (score, 2, 0, cut)
    assert Scores.load(run.out).tasks == scores.tasks
    told = "names at 160 tokens: 2 of 2 answers were cut off inside the model's reasoning and score 0: raise --reas"
    assert (told in str(scores.notes)) == bool(cut)
    table = (Path(run.out) / "results.md").read_text()
    assert (", n=2, 2 cut off in reasoning" in table) == bool(cut)
    for record in records(run):
        assert (record["answer"] is None) == bool(cut) and record["score"] == score
        assert "think>" not in str(record["answer"]) or score == 1.0


def test_a_template_that_opens_the_reasoning_tells_what_is_one(settings, tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    own.save_pretrained(tmp_path / "model")

    def behave(number, seen):
        return [said(f"{ALL}</think> Nobody."), said(ALL, "length"), said(ALL)][number % 3]

    with OpenAIServer(behave) as server:
        more = dict(endpoints=(server.url,), lengths=(160,), samples=3, concurrency=1)
        run = settings(model=str(tmp_path / "model"), tasks=("names", "begun"), **more)
        scores = evaluate(run)
    names, begun = (scores.tasks[name][160] for name in ("names", "begun"))
    assert (names.score, names.cut) == (pytest.approx(1 / 3), 1)  # the third: the server kept its reasoning to itself
    assert begun.cut == 0  # a server goes on with a begun answer, of which no template opens the reasoning


def test_a_conversation_goes_on_without_the_reasoning_and_so_does_the_judge(settings, tmp_path):
    file = tmp_path / "question.jsonl"
    file.write_text(json.dumps(MT) + "\n" + json.dumps(MT | {"question_id": 82, "turns": ["And 5 + 6?", "Half?"]}))

    def behave(number, seen):
        if seen.body["messages"][0]["content"].startswith("And"):
            return said("<think>11, or", "length")
        return said(f"<think>Hm.</think>\n\nSeven {len(seen.body['messages'])}")

    def judge(number, seen):
        if "Twice that?" in seen.body["messages"][0]["content"]:
            return said("<think>Is it [[9]]", "length")
        return said("<think>[[1]]? No.</think>[[8]] is fair")

    with OpenAIServer(behave) as server, OpenAIServer(judge) as rater:
        only = dict(tasks=(), needles=None, lengths=(4096,), published=(str(file),), reasoning_tokens=7)
        run = settings(endpoints=(server.url,), judge=rater.url, **only)
        scores = evaluate(run)
    second = next(seen.body["messages"] for seen in server.seen if len(seen.body["messages"]) == 3)
    assert second[1] == {"role": "assistant", "content": "Seven 1"}
    assert {seen.body["max_tokens"] for seen in (*server.seen, *rater.seen)} == {1024 + 7}
    assert all("Hm." not in seen.body["messages"][0]["content"] for seen in rater.seen) and len(rater.seen) == 2
    counts = {"samples": 4, "failed": 0, "truncated": 0, "unjudged": 1, "cut off in reasoning": 2}
    assert scores.counts["mt_bench"] == counts
    assert scores.published["mt_bench"] == pytest.approx((0.8 + 0 + 0) / 3)
    assert "mt_bench: 2 of 4 answers were cut off inside the model's reasoning and score 0" in str(scores.notes)
    assert "mt_bench: 1 of the judge's answers were cut off inside its reasoning and rate nothing" in str(scores.notes)


@pytest.mark.parametrize("answer", ["the boats", "the wind and the boats " * 12 + ALL])
def test_tokens_for_reasoning_are_none_for_the_answer(answer, settings, tokenizer):
    with OpenAIServer(lambda number, seen: said(f"<think>{ALL}</think>{answer}")) as server:
        run = settings(endpoints=(server.url,), lengths=(160,), samples=1, reasoning_tokens=500)
        scores = evaluate(run)
    (record,) = records(run)
    ids = tokenizer(answer)["input_ids"]
    assert record["answer"] == tokenizer.decode(ids[:12]) and answer.startswith(record["answer"])
    assert scores.tasks["names"][160].score == 0.0 and server.seen[0].body["max_tokens"] == 512


@pytest.mark.parametrize("tokens", [-1, 1.5, True])
def test_reasoning_tokens_are_a_number(tokens, settings):
    with pytest.raises(ValueError, match=r"reasoning_tokens.*expected"):
        settings(endpoints=("http://127.0.0.1:9/v1",), reasoning_tokens=tokens)
