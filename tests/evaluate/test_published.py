"""InfiniteBench and LongBench-Chat from small files in their published formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.engines.judging import rating
from longpo_ops.evaluate import Sample, Scores, evaluate, score
from longpo_ops.evaluate.published import (
    PROMPTS,
    Published,
    cut_middle,
    judge_prompt,
    read_published,
    references,
    rouge_l_sum,
)
from longpo_ops.evaluate.samples import Counter

BOOK = "The bell rang at noon. Nobody saw the boats. The wind turned, and the lamps went out. " * 6
OPTIONS = ["Cleo", "Finn", "Dan", "Eve"]
ROWS = {
    "passkey": ("What is the pass key?", ["71432"], []),
    "number_string": ("What is the sequence of digits?", ["2200012222"], []),
    "kv_retrieval": ('Key: "a1"\nThe value associated with the specified key is: ', ["b2-c3"], []),
    "longbook_sum_eng": ("", ["The bell rang.\nThe boats were gone."], []),
    "longbook_choice_eng": ("Who rang the bell?", ["Finn"], OPTIONS),
    "longbook_qa_eng": ("Who rang the bell?", ["Finn", "Old Finn"], []),
    "longbook_qa_chn": ("谁？", ["老芬恩"], []),
    "longdialogue_qa_eng": ("", ["FINN"], []),
    "math_find": ("You should answer with only one number. The largest number of the list is: ", [99], []),
    "math_calc": ("1 + 2 - 4 + 9", [1, 3, -1, 8], []),
    "code_run": ("Please give me the exact number of the return value of func_1(-3).", [-8], []),
    "code_debug": ("", ["b.run"], ["a.run", "b.run", "c.run", "d.run"]),
}


def write(folder: Path, name: str, records: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + "\n", encoding="utf-8")
    return file


def record(name: str, **changes) -> dict:
    asked, answer, options = ROWS[name]
    return {"id": 0, "context": BOOK, "input": asked, "answer": answer, "options": options} | changes


@pytest.fixture
def infinite(tmp_path) -> Path:
    """A folder with a file of each task."""
    for name in ROWS:
        write(tmp_path / "infinite", name, [record(name), record(name, id=1, context="Short.")])
    return tmp_path / "infinite"


@pytest.fixture
def chat(tmp_path) -> Path:
    """LongBench-Chat's file of three."""
    records = [
        {
            "idx": i,
            "prompt": f"{BOOK}\nWhat of {name}?",
            "query": f"What of {name}?",
            "answer": f"{name} rang {{query}}.",
        }
        for i, name in enumerate(OPTIONS[:3], 1)
    ]
    (tmp_path / "chat").mkdir()
    (tmp_path / "chat/test_cases.json").write_text(json.dumps(records))
    return tmp_path / "chat/test_cases.json"


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("passkey", "71432. Remember it", 1.0),
        ("passkey", "is 7143 or 71432", 0.0),  # the first number counts
        ("number_string", "2200012222", 1.0),
        ("kv_retrieval", 'is "b2-c3".', 1.0),
        ("kv_retrieval", "b2-c34", 0.0),
        ("longbook_choice_eng", "B. Finn", 1.0),
        ("longbook_choice_eng", "Because of the bell, A", 1.0),  # it begins with a letter that is an option: B
        ("longbook_choice_eng", "the answer is: B", 1.0),
        ("longbook_choice_eng", "the answer is: Finn", 1.0),
        ("longbook_choice_eng", "the answer is: C, not B", 1.0),  # the last letter alone counts
        ("longbook_choice_eng", "it was C or B", 1.0),
        ("longbook_choice_eng", "Surely B.\nAnd not C", 1.0),  # of the first line that has one
        ("longbook_choice_eng", "Surely C.\nAnd not B", 0.0),
        ("longbook_choice_eng", "(b)", 0.0),
        ("longbook_choice_eng", "Finn", 1.0),
        ("longbook_choice_eng", "it was Finn", 0.0),
        ("longbook_choice_eng", "I think the answer is\nFinn", 1.0),
        ("longbook_choice_eng", "I think the answer is\n\tFinn", 0.0),
        ("longbook_choice_eng", "Dan, or the answer is: Finn", 0.0),  # it begins with a letter
        ("longbook_choice_eng", "the answer is:", 0.0),
        ("longbook_choice_eng", "", 0.0),
        ("longbook_qa_eng", "The Finn!", 1.0),
        ("longbook_qa_eng", "it was old Finn", 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("longbook_qa_eng", "Cleo", 0.0),
        ("longbook_qa_chn", "老芬恩》。", 1.0),
        ("longbook_qa_chn", "《老芬恩》。", 6 / 7),  # published: the opening mark is a character as others are
        ("longbook_qa_chn", "「老 芬\u3000恩」……【】", 1.0),
        ("longbook_qa_chn", "", 0.0),
        ("longbook_qa_chn", "。。", 0.0),
        ("longbook_qa_chn", "芬恩", 0.8),
        ("longdialogue_qa_eng", "finn, I think", 1.0),
        ("longdialogue_qa_eng", "Finnegan", 1.0),  # published: anywhere
        ("longdialogue_qa_eng", "FIN N", 0.0),
        ("math_find", "99 is", 1.0),
        ("math_find", "99.0", 0.0),  # published: a fraction is no integer
        ("math_find", "9", 0.0),
        ("math_find", "9" * 5000, 0.0),
        ("math_calc", "[1, 3, 1, 9]", 0.5),  # published: signs are not read
        ("math_calc", "[01, 003, 1", 0.5),
        ("math_calc", "1, " + "3" * 5000, 0.25),  # longer than what int() reads
        ("code_run", "The value is -8.", 1.0),
        ("code_run", "-8 or so", 0.0),
        ("code_run", "8", 0.0),
        ("code_debug", "B. b.run", 1.0),
        ("code_debug", "The answer is: `b.run`", 1.0),
        ("code_debug", "Option answer: B", 1.0),
        ("code_debug", "The answer is: C", 0.0),
        ("code_debug", "B", 1.0),
        ("code_debug", " b.run is wrong", 1.0),
        ("code_debug", "`b.run` is wrong", 0.0),  # published: what takes the mark's place is no beginning
        ("code_debug", "A, no: B", 1.0),
        ("code_debug", "First A,\nthen B", 0.0),
        ("code_debug", "the answer is:", 0.0),
    ],
)
def test_scores_are_the_published_ones(name, text, value, infinite, tokenizer):
    (published,) = read_published([str(infinite / f"{name}.jsonl")])
    sample, _ = published.sample(0, 40_000, Counter(tokenizer))
    assert score(sample, text) == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "answer", "values"),
    [
        ("math_find", 0.5, {"0.5": 1.0, "0.50,": 1.0, "5": 0.0, "": 0.0}),
        ("math_find", [1e16], {"10000000000000000": 1.0, "10000000000000000.0": 1.0}),
        ("math_find", [2**60 + 1], {str(2**60 + 1): 1.0, str(2**60): 0.0}),
        ("math_calc", [[1, 3, -1, 8]], {"1, 3": 0.5}),  # a list in a list
        ("code_run", -8, {"-8": 1.0, "it is: `-8`.": 1.0, "－8": 0.0, "8_0": 0.0}),
        ("passkey", "71432", {"71432": 1.0, "0071432": 0.0, "": 0.0}),
        ("longdialogue_qa_eng", ["FINN", "OLD FINN"], {"He is old  Finn": 1.0, "Old": 0.0}),
        ("longdialogue_qa_eng", ["STONE LEE"], {"stone lee": 1.0}),
        ("longbook_sum_eng", ["a b c d", "x y"], {"y x": 0.5, "A-B!\nC": 6 / 7}),  # the best of them
        ("longbook_qa_eng", ["the old bell"], {"A bell, an oldie": 0.5, "the the": 0.0}),
    ],
)
def test_answers_of_every_kind_are_read(name, answer, values):
    sample = Sample("i", name, 0, "p", references=references(name, {"answer": answer}), metric=f"infinitebench/{name}")
    assert {text: score(sample, text) for text in values} == pytest.approx(values)


def test_chinese_marks_go_and_stay_as_published():
    sample = Sample("i", "longbook_qa_chn", 0, "p", references=("芬",), metric="infinitebench/longbook_qa_chn")
    values = {
        mark: score(sample, f"{mark}芬")
        for mark in "》「」『』【】〔〕〖〗（）［］｛｝。，、！？：；…—‘’“”％～·《〈〉．・‚〒〓"
    }
    stay = {mark for mark, value in values.items() if value == pytest.approx(2 / 3)}
    assert stay == set("·《〈〉．・‚〒〓") and {values[mark] for mark in values if mark not in stay} == {1.0}


def test_summaries_share_words_in_order_line_by_line():
    assert rouge_l_sum("a b c\nd e", "a b c\nd e") == 1.0
    assert rouge_l_sum("a b c d", "b x d") == pytest.approx(2 * 2 / 7)  # in order: b, d
    assert rouge_l_sum("a b c d", "d c b a") == pytest.approx(2 * 1 / 8)
    assert rouge_l_sum("w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5") == pytest.approx(2 * 4 / 15)  # Lin 2004
    assert rouge_l_sum("a", "") == 0.0


def test_summaries_score_as_the_package_that_is_published():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeLsum"])
    texts = [
        "The cat, 9 lives.\nIt sat on a mat.",
        "A cat sat.\nThe mat!\n\nNine lives it had, it sat",
        "x\ny z\nx",
        BOOK,
        "cat",
    ]
    for one in texts:
        for other in texts:
            truth = scorer.score(one, other)["rougeLsum"].fmeasure
            assert rouge_l_sum(one, other) == pytest.approx(truth), (one, other)


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_every_task_has_a_prompt_with_all_it_needs(infinite, tokenizer):
    found = {each.name: each for each in read_published([str(infinite)])}
    assert list(found) == list(PROMPTS) and len(PROMPTS) == 12
    counter = Counter(tokenizer)
    for name, each in found.items():
        sample, cut = each.sample(0, 40_000, counter)
        assert not cut and BOOK in sample.prompt and "{" not in sample.prompt + sample.prefill and sample.length == 0
        assert sample.id == f"{name}/40000/0" and sample.max_tokens == PROMPTS[name][2] and sample.depth is None
        asked = ROWS[name][0]
        if name in ("code_run", "math_find"):
            assert ("func_1(-3)" if name == "code_run" else "What is the largest number in") in sample.prompt
        elif name != "math_calc":
            assert asked in sample.prompt
        for letter, option in zip("ABCD", ROWS[name][2]):
            assert f"\n{letter}. {option}" in sample.prompt
    assert found["code_run"].sample(0, 40_000, counter)[0].prefill == "The value of func_1(-3) is"


def test_a_long_text_loses_its_middle_and_nothing_else(infinite, tokenizer):
    each = read_published([str(infinite / "longbook_qa_eng.jsonl")])[0]
    counter, words = Counter(tokenizer), " ".join(f"word{i}" for i in range(300))
    each = Published(each.name, (record("longbook_qa_eng", context=words),))
    whole, _ = each.sample(0, 40_000, counter)
    sample, cut = each.sample(0, 500, counter)
    assert cut and 440 < counter.count(sample.prompt, sample.prefill) <= 500 - sample.max_tokens
    same = next(i for i, (a, b) in enumerate(zip(whole.prompt, sample.prompt)) if a != b)
    assert whole.prompt.endswith(sample.prompt[same:]) and sample.prompt.endswith("Question: Who rang the bell?")
    parts = [counter.tokenizer(part)["input_ids"] for part in (sample.prompt[:same], sample.prompt[same:])]
    assert abs(len(parts[0]) - len(parts[1])) <= 6
    with pytest.raises(ValueError, match="leave no room for the text in 4 tokens"):
        cut_middle(words, "", 4, counter)
    with pytest.raises(ValueError, match="math_calc writes up to 30000 tokens; expected --length of at least 30064"):
        read_published([str(infinite / "math_calc.jsonl")])[0].sample(0, 30_000, counter)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.jsonl", "{}", "expected one of InfiniteBench's names: passkey, "),
        ("passkey.jsonl", "", "has no records"),
        ("passkey.jsonl", '{"a": 1', "passkey.jsonl, line 1: no valid JSON"),
        ("passkey.jsonl", "[]", "line 1: expected an object with context, input, answer"),
        ("passkey.jsonl", '{"context": 1, "input": "x"}', "line 1: context, answer missing or of another type"),
        ("passkey.jsonl", '{"context": "c", "input": "x", "answer": []}', "line 1: an empty list of answers"),
        ("code_debug.jsonl", '{"context": "c", "input": "x", "answer": ["f"]}', "line 1: 0 options; expected 4"),
        (
            "longbook_choice_eng.jsonl",
            '{"context": "c", "input": "x", "answer": ["f"], "options": ["a", "b", "c", "d"]}',
            "is none of the options",
        ),
        ("math_find.jsonl", '{"context": "c", "input": "x", "answer": 1}', "expected one that asks for 'The ... of'"),
        ("code_run.jsonl", '{"context": "c", "input": "x", "answer": 1}', "expected a call such as"),
        ("test_cases.json", "{}", "expected LongBench-Chat's list of idx, prompt, query and answer"),
        ("test_cases.json", '[{"prompt": "x"}]', "entry 0: query, answer missing"),
    ],
)
def test_files_that_cannot_be_used_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_published([str(tmp_path / name)])


def test_folders_without_files_and_tasks_twice_are_refused(infinite, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"has none of InfiniteBench's files .*nor test_cases\.json, nor question"):
        read_published([str(tmp_path / "none")])
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: expected one of"):
        read_published([str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(ValueError, match="passkey comes twice"):
        read_published([str(infinite), str(infinite / "passkey.jsonl")])


def test_texts_to_be_cut_need_a_length(settings, infinite):
    with pytest.raises(ValueError, match="no lengths for passkey; expected numbers of tokens"):
        evaluate(settings(published=(str(infinite / "passkey.jsonl"),), **ONLY | {"lengths": ()}))


# -- whole evaluations -------------------------------------------------------------------------------------------------

ONLY = dict(tasks=(), needles=None, lengths=(1000,))


def test_infinite_bench_with_a_real_model(settings, infinite):
    (infinite / "math_calc.jsonl").unlink()  # its answers are longer than this model reads
    (infinite / "longbook_sum_eng.jsonl").unlink()
    scores = evaluate(settings(published=(str(infinite),), **ONLY))
    assert set(scores.published) == set(PROMPTS) - {"math_calc", "longbook_sum_eng"}
    for name, counts in scores.counts.items():
        assert counts == {"samples": 2, "failed": 0, "truncated": 0, "unjudged": 0}, name
    cut = evaluate(settings(published=(str(infinite / "passkey.jsonl"),), **ONLY | {"lengths": (160,)}))
    assert cut.counts["passkey"]["truncated"] == 1
    assert "passkey: 1 of 2 inputs lost their middle, to fit 160 tokens with the answer" in cut.notes


def test_failed_records_count_as_zero(settings, infinite):
    def behave(number, seen):
        if "Short." in str(seen.body["messages"]):
            return Reply(200, {"choices": [{"message": {"content": " 71432"}, "finish_reason": "stop"}]})
        return Reply(400, {"error": "too long"}) if number > 1 else None

    records = [record("passkey", context="Short."), record("passkey"), record("passkey", id=2, context="Short. Too.")]
    file = write(infinite, "passkey", records)
    with OpenAIServer(behave) as server:
        scores = evaluate(settings(endpoints=(server.url,), concurrency=1, published=(str(file),), **ONLY))
    assert scores.published["passkey"] == pytest.approx(2 / 3) and scores.counts["passkey"]["failed"] == 1
    assert "passkey: 1 of 3 requests failed, last: the engine refused: 400" in str(scores.notes)


def test_chats_stay_unjudged_without_a_judge(settings, chat):
    with OpenAIServer() as server:
        run = settings(endpoints=(server.url,), published=(str(chat),), **ONLY | {"lengths": (2000,)})
        scores = evaluate(run)
        assert {seen.body["max_tokens"] for seen in server.seen} == {1024}
    assert scores.published == {} and scores.counts["longbench_chat"]["unjudged"] == 3
    assert "3 of 3 answers are unjudged and not in the score; they are in answers.jsonl: name a judge" in str(
        scores.notes
    )
    records = [json.loads(line) for line in (Path(run.out) / "answers.jsonl").read_text().splitlines()]
    assert [r["id"] for r in records] == [f"longbench_chat/2000/{i}" for i in (1, 2, 3)]
    assert all(r["answer"].startswith("The ") and r["score"] is None for r in records)


def test_a_judge_rates_chats(settings, chat, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-judge")
    shots = [[{"answer": f"shot {i}", "score": i}] for i in (1, 2, 3)]
    chat.with_name("few_shots.json").write_text(json.dumps(shots))
    said = {"Cleo": "It is good. [[8]]", "Finn": "[[rating: 3]] no, [[4]]", "Dan": "no rating"}

    def judge(number, seen):
        text = next(text for name, text in said.items() if f"{name} rang" in seen.body["messages"][0]["content"])
        return Reply(200, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    with OpenAIServer() as server, OpenAIServer(judge) as rater:
        given = dict(endpoints=(server.url,), judge=rater.url, published=(str(chat),), **ONLY | {"lengths": (2000,)})
        scores = evaluate(settings(**given))
        assert scores.published == {"longbench_chat": pytest.approx(0.6)}
        assert scores.counts["longbench_chat"]["unjudged"] == 1 and "name a judge" not in str(scores.notes)
        assert evaluate(settings(**given)).published == scores.published and len(server.seen) == 3
        assert len(rater.seen) == 2 + 5  # as published, five times at most; the next run asks nothing again
        assert scores.counts["longbench_chat"]["rated again"] == 1
        low, high = scores.intervals["published/longbench_chat"]
        assert low < 0.6 < high
        prompts = [seen.body["messages"][0]["content"] for seen in rater.seen]
        assert all(seen.headers["authorization"] == "Bearer sk-judge" for seen in rater.seen)
        assert not any("authorization" in seen.headers for seen in server.seen)
    (cleo,) = [prompt for prompt in prompts if "Cleo rang" in prompt]
    assert "What of Cleo?" in cleo and "shot 1" in cleo and "Rating: [[1]]" in cleo and "The " in cleo
    assert "Cleo rang {query}." in cleo  # what is put in is not looked at
    assert Scores.load(settings().out).published == scores.published


def test_a_prompt_without_few_shots_has_none(chat):
    (published,) = read_published([str(chat)])
    assert "[[1]]" not in judge_prompt(published, 0, "an answer") and "an answer" in judge_prompt(
        published, 0, "an answer"
    )
    chat.with_name("few_shots.json").write_text("[[]]")
    with pytest.raises(ValueError, match=r"few_shots\.json: expected a list of answer and score for every idx"):
        read_published([str(chat)])


@pytest.mark.parametrize(
    ("text", "value"),
    [("[[7]]", 0.7), ("[[1]] or [[10]]", 1.0), ("[[7.5/10]]", 0.75), ("[[rating: 5]]", 0.5), ("7", None), ("[[11]]", None),
     ("[[0]]", None), ("[[]]", None)],
)  # fmt: skip
def test_ratings(text, value):
    assert rating(text) == (None if value is None else pytest.approx(value))
