"""A judge rates how faithful chosen answers are to their chunks, and turns that it rates low are left out."""

from __future__ import annotations

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.data import read_pairs
from longpo_ops.engines import EngineStopped
from longpo_ops.generate import Prompts, generate
from longpo_ops.generate.report import summarise

JUDGED = "Rate how faithful the answer is"


def rates(ratings: list[str], asked: list[str]):
    """A server that rates, one rating after the other, and answers all else as ever."""

    def behave(number, seen):
        prompt = seen.body["messages"][0]["content"]
        if JUDGED not in prompt:
            return None
        asked.append(prompt)
        return Reply(body={"choices": [{"message": {"content": ratings[len(asked) - 1]}, "finish_reason": "stop"}]})

    return behave


def scores(folder) -> list[list[float | None]]:
    return [pair.provenance["faithfulness"] for pair in read_pairs(folder)]


@pytest.mark.parametrize("own", [True, False])
def test_turns_that_a_judge_rates_low_are_left_out(own, settings, tmp_path):
    asked: list[str] = []
    behave = rates(["Good. [[9]]", "[[3]] no, [[6.5]]", "I cannot say.", "[[7]]"], asked)
    with OpenAIServer(behave if own else None) as server, OpenAIServer(behave) as judge:
        run = settings(
            endpoints=(server.url,),
            max_documents=1,
            concurrency=1,
            min_faithfulness=7,
            judge="self" if own else judge.url,
        )
        result = generate(run)
        seen, rated = len(server.seen), len(judge.seen)
        generate(run)  # goes on where nothing is left to do
        assert (len(server.seen), len(judge.seen)) == (seen, rated) == ((16, 0) if own else (12, 4))
    assert result.outcomes[0]["counts"] == {"unfaithful": 1, "unjudged": 1}
    (pair,) = read_pairs(tmp_path / "pairs")
    assert sorted(scores(tmp_path / "pairs")[0]) == [7.0, 9.0] and len(pair.turns) == 2
    for turn in pair.turns:
        prompt = Prompts.load().ask_judge(turn.chunk, turn.instruction, turn.chosen)
        rating = [9.0, 6.5, None, 7.0][asked.index(prompt)]
        assert pair.provenance["faithfulness"][pair.turns.index(turn)] == rating
    assert pair.provenance["judge"] == ("self" if own else "server")


def test_without_a_least_rating_all_are_kept_with_theirs(settings, tmp_path):
    asked: list[str] = []
    with OpenAIServer(rates(["[[1]]", "[[11]]", "Rating: 5", "[[10]]"], asked)) as server:
        result = generate(settings(endpoints=(server.url,), max_documents=1, judge="self"))
    assert sorted(scores(tmp_path / "pairs")[0], key=str) == [1.0, 10.0, None, None]
    assert summarise(result.outcomes)["left_out"] == {}


def test_a_run_that_was_stopped_goes_on_with_the_ratings_that_it_has(settings, tmp_path):
    asked: list[str] = []
    good = rates(["[[9]]"] * 4, asked)
    stops = OpenAIServer(lambda number, seen: Reply(401, {}) if len(asked) == 2 else good(number, seen))
    with stops as judge, OpenAIServer() as server, pytest.raises(EngineStopped, match="the API key was refused"):
        generate(settings(endpoints=(server.url,), max_documents=1, judge=judge.url, concurrency=1))
    with OpenAIServer(rates(["[[8]]"] * 2, [])) as judge, OpenAIServer() as server:
        generate(
            settings(endpoints=(server.url,), max_documents=1, judge=judge.url)
        )  # two more are asked for, not three
        assert len(judge.seen) == 2
    assert sorted(scores(tmp_path / "pairs")[0]) == [8.0, 8.0, 9.0, 9.0]


def test_what_a_judge_is_asked_holds_texts_as_they_are(tmp_path):
    asked = Prompts.load().ask_judge("a {question} b", "why {answer}?", "so {text}")
    assert (
        asked.startswith("a {question} b\n") and "Question: why {answer}?\n" in asked and "Answer: so {text}\n" in asked
    )
    assert Prompts.load(recipe="official").judge == Prompts.load().judge
    (tmp_path / "judge.txt").write_text("{text} {question}")
    with pytest.raises(ValueError, match=r"judge.txt: expected \{text\}, \{question\} and \{answer\}, each once"):
        Prompts.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_faithfulness": 7}, "min_faithfulness is 7; expected 1 to 10, and a judge"),
        ({"judge": "self", "min_faithfulness": 0.5}, "min_faithfulness is 0.5; expected 1 to 10"),
        ({"judge": "me"}, "judge: no valid URL came"),
        ({"judge": "self", "judge_model": "big"}, "judge_model or judge_options without a judge's server"),
        ({"reasoning_tokens": -1}, "reasoning_tokens is -1"),
    ],
)
def test_settings_of_a_judge_that_make_no_sense_are_refused(changes, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(**changes)
