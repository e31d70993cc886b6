"""MT-Bench's conversations from small files in the published format: asked, kept, rated, and what is refused."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply, sentence
from longpo_ops.engines import EngineStopped
from longpo_ops.engines.transformers import TransformersEngine
from longpo_ops.evaluate import Scores, evaluate
from longpo_ops.evaluate.mt_bench import read_mt_bench
from longpo_ops.evaluate.published import read_published
from tests.evaluate.test_run import asked, run_killed

ONLY = dict(tasks=(), needles=None, lengths=(4096,))
ROWS = [
    {"question_id": 81, "category": "writing", "turns": ["Write of {wind}.", "Now in capitals."]},
    {"question_id": 95, "category": "roleplay", "turns": ["Be a bell.", "Ring."], "reference": ["Dong.", "Dong!"]},
    {"question_id": 101, "category": "reasoning", "turns": ["Who is second?", "And last?"], "reference": ["Eve.", ""]},
    {"question_id": 111, "category": "math", "turns": ["What is 3 + 4?", "Twice that?"], "reference": [7, "14"]},
    {"question_id": 121, "category": "coding", "turns": ["Write a loop.", "Faster."]},
    {"question_id": 131, "category": "extraction", "turns": ["List the boats.", "Sort them."]},
    {"question_id": 141, "category": "stem", "turns": ["Why do tides turn?", "Show it."]},
    {"question_id": 151, "category": "humanities", "turns": ["What is trade?", "Since when?"]},
    {"question_id": 161, "category": "gossip", "turns": ["Who met whom?", "Where?"]},
]
TEMPERATURES = {81: 0.7, 95: 0.7, 101: 0.0, 111: 0.0, 121: 0.0, 131: 0.0, 141: 0.1, 151: 0.1, 161: 0.7}


@pytest.fixture
def questions(tmp_path) -> Path:
    folder = tmp_path / "mt"
    folder.mkdir()
    (folder / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder / "question.jsonl"


def first_message(seen) -> str:
    return seen.body["messages"][0]["content"]


def reply(text: str) -> Reply:
    return Reply(200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})


def graded(prompt: str) -> str:
    return prompt.partition("[Assistant's answer to be graded]\n")[2].partition("\n\n[End")[0]


def test_the_second_question_follows_the_first_answer_at_the_categorys_temperature(settings, questions):
    with OpenAIServer(lambda number, seen: reply(f" {sentence(str(seen.body['messages']))}\n")) as server:
        run = settings(endpoints=(server.url,), published=(str(questions),), seed=5, **ONLY)
        scores = evaluate(run)
    bodies = {(first_message(seen), len(seen.body["messages"])): seen.body for seen in server.seen}
    assert len(server.seen) == len(bodies) == 2 * len(ROWS)
    records = {row["id"]: row for row in map(json.loads, (Path(run.out) / "answers.jsonl").read_text().splitlines())}
    assert list(records) == [f"mt_bench/{row['question_id']}/{turn}" for row in ROWS for turn in (1, 2)]
    for row in ROWS:
        number, (first, second) = row["question_id"], row["turns"]
        said = records[f"mt_bench/{number}/1"]["answer"]
        assert said == sentence(str([{"role": "user", "content": first}])) != records[f"mt_bench/{number}/2"]["answer"]
        talk = [("user", first), ("assistant", said), ("user", second)]
        assert [tuple(each.values()) for each in bodies[first, 3]["messages"]] == talk
        for body in (bodies[first, 1], bodies[first, 3]):
            assert (body["max_tokens"], body["temperature"], body["top_p"]) == (1024, TEMPERATURES[number], 1.0)
            assert body.get("seed") == (5 if TEMPERATURES[number] else None)
    assert scores.published == {} and scores.counts["mt_bench"]["unjudged"] == 18
    assert "18 of 18 answers are unjudged and not in the score; they are in answers.jsonl: name a judge" in str(
        scores.notes
    )


def test_a_judge_gets_other_fields_and_says_which_it_refuses(settings, questions):
    def judge(number, seen):
        if "max_tokens" in seen.body:
            return Reply(400, {"error": {"message": "max_tokens is not supported: use max_completion_tokens"}})
        return reply([{"type": "thinking", "thinking": "[[2]]"}, {"type": "text", "text": "[[7]]"}])

    with OpenAIServer(lambda number, seen: reply("said")) as server, OpenAIServer(judge) as rater:
        given = dict(endpoints=(server.url,), judge=rater.url, published=(str(questions),), **ONLY)
        with pytest.raises(EngineStopped, match="--judge-option max_tokens=max_completion_tokens"):
            evaluate(settings(**given))
        options = {"max_tokens": "max_completion_tokens", "temperature": None}
        scores = evaluate(settings(judge_options=options, **given))
        bodies = [seen.body for seen in rater.seen if "max_tokens" not in seen.body]
        assert all(body["max_completion_tokens"] == 1024 and "temperature" not in body for body in bodies)
        evaluate(settings(judge_options=options | {"temperature": 0.3}, **given))
        again = [seen.body for seen in rater.seen if "temperature" in seen.body and "max_tokens" not in seen.body]
        assert len(again) == len(bodies) > 0 and again[0]["temperature"] == 0.3
    assert scores.published["mt_bench"] == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "http://u:secret@h/v1"}, "judge: the one at h holds a user"),
        ({"judge": "sk-secret"}, "judge: no valid URL came"),
        ({"judge": "http://h/v1", "judge_key_variable": "ODD_KEY"}, r"the API key in \$ODD_KEY has a character"),
        (
            {"judge": "http://h/v1", "judge_options": {"messages": 1}},
            "--judge-option messages: every request has its own",
        ),
        ({"judge_options": {"top_k": 1}}, "judge_model or judge_options without a judge"),
        ({"engine_options": {"prompt": 1}, "endpoints": ("http://h/v1",)}, "--engine-option prompt: every"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_before_anybody_is(changes, message, settings, questions, monkeypatch):
    monkeypatch.setenv("ODD_KEY", "s\u00e9cret")
    with pytest.raises(ValueError, match=message) as error:
        settings(published=(str(questions),), **changes, **ONLY)
    assert "cret" not in str(error.value)


def test_a_judge_rates_each_turn_with_the_references_it_needs(settings, questions):
    beside = questions.with_name("reference_answer")
    beside.mkdir()
    told = {"question_id": 121, "choices": [{"turns": ["for i in x", "map"]}]}
    other = {"question_id": 81, "choices": [{"turns": ["Wind!", "WIND!"]}]}  # writing needs none
    (beside / "gpt-4.jsonl").write_text(json.dumps(told) + "\n" + json.dumps(other) + "\n")

    def behave(number, seen):
        if number <= 18 and first_message(seen) == "List the boats." and len(seen.body["messages"]) == 3:
            return Reply(400, {"error": "no"})
        return reply(f"said {len(seen.body['messages'])} {{x}} to {first_message(seen)}")

    def judge(number, seen):
        text = graded(first_message(seen))
        return reply("no rating" if "Be a bell" in text else f"[[1]] so [[{9 if text.startswith('said 1') else 4}]]")

    with OpenAIServer(behave) as server, OpenAIServer(judge) as rater:
        run = settings(endpoints=(server.url,), judge=rater.url, published=(str(questions),), **ONLY)
        scores = evaluate(run)
        prompts = {graded(first_message(seen)): first_message(seen) for seen in rater.seen}
        assert len(prompts) == len(rater.seen) == 17
        again = evaluate(run)  # the request that failed is asked again, and no other
        assert len(server.seen) == 18 + 1 and len(rater.seen) == 17 + 1
        assert again.published["mt_bench/second"] == pytest.approx(0.4) and again.counts["mt_bench"]["failed"] == 0
    first, second = [0.9] * 8, [0.4] * 7 + [0.0]  # roleplay has no rating, extraction's second answer failed
    assert scores.published == {
        "mt_bench": pytest.approx((sum(first) + sum(second)) / 16),
        "mt_bench/first": pytest.approx(0.9), "mt_bench/second": pytest.approx(0.35),
    }  # fmt: skip
    assert scores.counts["mt_bench"] == {"samples": 18, "failed": 1, "truncated": 0, "unjudged": 2}
    assert "mt_bench: 1 of 18 requests failed, last: the engine refused: 400" in str(scores.notes)
    for row in ROWS:
        one, two = (f"said {n} {{x}} to {row['turns'][0]}" for n in (1, 3))
        assert row["turns"][0] in prompts[one] and row["turns"][1] not in prompts[one]
        if two in prompts:
            assert one in prompts[two] and row["turns"][1] in prompts[two]
    shown = {int(key.partition(" to ")[0].split()[1]): [] for key in prompts}
    for key, prompt in prompts.items():
        if references := re.findall(r"\[Reference answer\]\n(.*)", prompt):
            shown[int(key.split()[1])].append(references)
    assert sorted(shown[1]) == [["7"], ["Eve."], ["for i in x"]]
    assert sorted(shown[3]) == [["7", "14"], ["Eve."], ["for i in x", "map"]]
    assert Scores.load(run.out).published == again.published


def test_after_a_failed_answer_nothing_is_asked(settings, questions):
    def behave(number, seen):
        return Reply(400, {"error": "no"}) if first_message(seen) == "Be a bell." else None

    with OpenAIServer(behave) as server:
        scores = evaluate(settings(endpoints=(server.url,), published=(str(questions),), concurrency=1, **ONLY))
    assert len(server.seen) == 2 * len(ROWS) - 1 and scores.counts["mt_bench"]["failed"] == 2


def test_a_real_model_talks_and_a_killed_run_goes_on_to_the_same_answers(settings, questions, tmp_path, monkeypatch):
    monkeypatch.setattr("longpo_ops.evaluate.mt_bench.MOST", 12)
    lines = questions.read_text().splitlines()
    questions.write_text("\n".join(lines[:3]))
    given = dict(published=(str(questions),), **ONLY | {"lengths": ()})
    whole = settings(out=str(tmp_path / "whole"), **given)
    scores = evaluate(whole)
    assert scores.counts["mt_bench"] == {"samples": 6, "failed": 0, "truncated": 0, "unjudged": 6}
    cut = settings(**given)
    short = "from longpo_ops.evaluate import mt_bench\nmt_bench.MOST = 12\n"
    assert run_killed(cut, 2, before=short) == -signal.SIGKILL
    kept, calls, answer = asked(cut), [], TransformersEngine._answer
    assert 2 <= kept < 6
    monkeypatch.setattr(TransformersEngine, "_answer", lambda *args: calls.append(1) or answer(*args))
    evaluate(cut)
    assert len(calls) == 6 - kept
    files = [(Path(run.out) / "answers.jsonl").read_text() for run in (whole, cut)]
    assert files[0] == files[1] and len(set(files[0].splitlines())) == 6
    evaluate(replace(cut, seed=1))
    assert len(calls) == 6 - kept + 4  # greedy answers are the same ones, drawn ones are not


def test_a_conversation_that_may_not_fit_is_refused_before_a_model_is_loaded(settings, questions, monkeypatch):
    monkeypatch.setattr(TransformersEngine, "_load", lambda self: pytest.fail("loaded"))
    needed = r"mt_bench: question 81 and its answers take up to 2\d\d\d tokens, there is room for {}; expected --length"
    for lengths, room in (((), 1024), ((2000,), 2000)):
        with pytest.raises(ValueError, match=needed.format(room)):
            evaluate(settings(published=(str(questions),), **ONLY | {"lengths": lengths}))


def test_the_set_of_short_contexts_says_where_its_conversations_are_missing(settings, questions, monkeypatch):
    from longpo_ops.evaluate import shots

    monkeypatch.setitem(shots.SHORT, "official", ())  # without the harness, which has tests of its own
    said = "short: official: MT-Bench belongs to it and was not asked"
    with OpenAIServer() as server:
        given = dict(endpoints=(server.url,), short="official", samples=1)
        assert said in str(evaluate(settings(**given)).notes)
        scores = evaluate(settings(published=(str(questions),), **given | {"lengths": (4096,)}))
    assert said not in str(scores.notes) and scores.about["short"] == "official"


def test_the_file_is_found_in_a_folder_and_known_by_its_name(questions):
    (found,) = read_published([str(questions.parent)])
    assert found.name == "mt_bench" and found == read_mt_bench(questions)
    with pytest.raises(ValueError, match="mt_bench comes twice"):
        read_published([str(questions), str(questions.parent)])


GOOD = {"question_id": 1, "category": "math", "turns": ["a", "b"]}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([""], r"question\.jsonl has no records"),
        (["{"], "line 1: no valid JSON"),
        ([GOOD, []], "line 2: expected an object with question_id, category, turns"),
        ([{"question_id": 1, "turns": ["a", "b"]}], "line 1: category missing or of another type"),
        ([GOOD | {"turns": ["a"]}], r"line 1: turns is \['a'\]; expected a list of two texts"),
        ([GOOD | {"turns": ["a", ["b"]]}], r"line 1: turns has \['b'\]; expected a list of two texts"),
        ([GOOD | {"turns": ["a", ""]}], "line 1: turns has an empty question"),
        ([GOOD, GOOD], "line 2: question_id 1 comes twice"),
        ([GOOD | {"reference": "7"}], "line 1: reference is 7; expected a list of two texts"),
    ],
)
def test_damaged_files_are_refused_by_line(lines, message, tmp_path):
    written = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "question.jsonl").write_text("\n".join(written))
    with pytest.raises(ValueError, match=message):
        read_published([str(tmp_path / "question.jsonl")])


def test_damaged_references_are_refused(questions):
    beside = questions.with_name("reference_answer")
    beside.mkdir()
    for text, message in (
        ('{"question_id": 1, "choices": []}', r"gpt-4\.jsonl, line 1: choices\[0\]: expected an object with turns"),
        ('{"question_id": 1, "choices": [{"turns": ["a"]}]}', "line 1: turns is .*; expected a list of two texts"),
        ("x", "line 1: no valid JSON"),
    ):
        (beside / "gpt-4.jsonl").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_mt_bench(questions)
