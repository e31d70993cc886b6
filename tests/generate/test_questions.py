"""The two readings of lists of questions, and how a list is asked for: once more where it cannot be read, as JSON where that
is to be had.
"""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.loop.openai_server import OpenAIServer, Reply
from longpo_ops.data import read_pairs
from longpo_ops.engines import Completion, EngineStopped
from longpo_ops.generate import Prompts, generate
from longpo_ops.generate.makers import MAKERS
from longpo_ops.generate.questions import parse_marked, parse_questions, question
from longpo_ops.generate.report import summarise, values_of

pytestmark = pytest.mark.usefixtures("short_pauses")

FOUR = ["What is A?", "How does B work?", "Why C?", "When D?"]
PLAIN = "\n".join(f"{i}. {each}" for i, each in enumerate(FOUR, 1))


def marked(*marks: str) -> str:
    return "\n".join(f"{mark}{each}" for mark, each in zip(marks, FOUR, strict=True))


ALL_FOUR = {  # the first twenty less three: the forms that were seen when models were asked
    "plain": PLAIN,
    "preface": f"Here are four questions about the text:\n\n{PLAIN}",
    "closing remark": f"{PLAIN}\n\nLet me know if you need more!",
    "bold numbers": marked("**1.** ", "**2.** ", "**3.** ", "**4.** "),
    "bold questions": "\n".join(f"{i}. **{each}**" for i, each in enumerate(FOUR, 1)),
    "1)": marked("1) ", "2) ", "3) ", "4) "),
    "1:": marked("1: ", "2: ", "3: ", "4: "),
    "Question 1:": marked("Question 1: ", "Question 2: ", "Question 3: ", "Question 4: "),
    "wrapped line": PLAIN.replace("How does B work?", "How does B\nwork?"),
    "five questions": f"{PLAIN}\n5. More?",
    "empty thought": f"<think>\n\n</think>\n\n{PLAIN}",
    "thought": f"<think>\nThe user wants 4.\n</think>\n\n{PLAIN}",
    "bullets below": f"{PLAIN}\n   - sub",
    "heading": f"### Questions\n{PLAIN}",
    "1\u3001": marked("1\u3001", "2\u3001", "3\u3001", "4\u3001"),
    "full width": marked("\uff11\uff0e", "\uff12\uff0e", "\uff13\uff0e", "\uff14\uff0e"),
    "no space": PLAIN.replace(". ", "."),
    "CJK numerals": marked("\u4e00\u3001", "\u4e8c\u3001", "\u4e09\u3001", "\u56db\u3001"),
    "circled": marked("\u2460", "\u2461 ", "\u2462", "\u2463"),
    "Arabic-Indic": marked("\u0661. ", "\u0662. ", "\u0663. ", "\u0664. "),
    "Devanagari": marked("\u0967) ", "\u0968) ", "\u0969) ", "\u096a) "),
    "Chinese word": marked(*(f"\u95ee\u9898{number}\uff1a" for number in "\u4e00\u4e8c\u4e09\u56db")),
    "brackets": marked("[1] ", "(2) ", "[3]: ", "\u30104\u3011"),
    "Q1.": marked("Q1. ", "Q2. ", "Q3. ", "Q4. "),
    "word and number in bold": marked("**Question 1:** ", "**Question 2:** ", "**Question 3**: ", "**Question 4.** "),
    "number on a line": marked("**Question 1**\n", "**Question 2**\n\n", "## 3.\n", "4:\n"),
    "headings as numbers": marked("### 1. ", "### 2. ", "### 3. ", "### 4. "),
    "dashes": marked("1 - ", "2 - ", "3 \u2013 ", "4 \u2014 "),
    "bullets": "Of course!\n" + marked("- ", "- ", "* ", "\u2022 ") + "\nGood luck!",
    "Q:": marked("Q: ", "Q: ", "**Q:** ", "Q: ").replace("?\n", "?\nA: The one that stands above.\n"),
    "letters": marked("a) ", "b) ", "C. ", "(d) "),
    "no marks": "Sure, here they are:\n\n" + "\n".join(FOUR) + "\n\nShall I go on?",
    "numbers behind bullets": "\n".join(f"* **Question {i}: {each}**" for i, each in enumerate(FOUR, 1)),
    "quotes": "\n".join(f'{i}. "{each}"' for i, each in enumerate(FOUR, 1)),
    "themes": "\n".join(f"{i}. **Theme {i}:** {each}" for i, each in enumerate(FOUR, 1)),
    "answers behind": "\n".join(f"{i}. {each} It is so because of the wind." for i, each in enumerate(FOUR, 1)),
    "answers below": "\n".join(f"{i}. {each}\n   Answer: the wind.\n   - Is it so?" for i, each in enumerate(FOUR, 1)),
    "indented": " 1. " + "\n 2. ".join(FOUR),
    "numbers below numbers": PLAIN.replace("Why C?", "Why C?\n   1. Why so?\n   2. Why not?"),
    "bullets below themes": f"1. The first half\n   - {FOUR[0]}\n   - {FOUR[1]}\n2. The second\n   - {FOUR[2]}\n   - {FOUR[3]}",
    "statements between": PLAIN.replace("\n3.", "\n3. The wind turns.\n4."),
    "JSON": json.dumps({"questions": FOUR}),
    "JSON in a fence": "Here:\n```json\n" + json.dumps(FOUR, indent=1) + "\n```\nEnjoy!",
    "JSON of objects": json.dumps([{"id": i, "question": f"{i}. {each}"} for i, each in enumerate(FOUR)]),
}  # fmt: skip
FEWER = {
    "three": (PLAIN.rpartition("\n")[0], FOUR[:3], "stop"),
    "cut": (PLAIN[:-4], FOUR[:3], "length"),
    "cut behind a question": (PLAIN, FOUR[:3], "length"),  # that is not to be seen
    "the same twice": (PLAIN.replace("Why C?", "**what** is a?"), [FOUR[0], FOUR[1], FOUR[3]], "stop"),
    "JSON that was cut": (json.dumps({"questions": FOUR})[:-5], FOUR[:3], "length"),
    "answers to choose from": (
        "1. Which is right?\n a) one\n b) two\n2. Which of these? A) one B) two\n3. Why?\n4. Who?", ["Why?", "Who?"], "stop",
    ),
    "gaps": ("1. What ... ?\n2. The ____ is what?\n3. Why?\n4. Who\u2026?", ["Why?"], "stop"),
    "statements": ("1. The wind turns.\n2. Why?\n3. It asks \"why?\" and ends.\n4. Explain it.", ["Why?"], "stop"),
    "prose": ("What is it? It is the wind.\nAnd why? Nobody knows.\nWhere? Here.\nWhen? Now.", [], "stop"),
    "lines with a remark": ("\n".join([*FOUR[:3], "", "Would you like more?"]), [], "stop"),
    "lines apart": ("\n\n".join([*FOUR[:3], "Would you like more?"]), [], "stop"),
    "too few lines": ("\n".join(FOUR[:2]) + "\n\nShall I go on?", [], "stop"),
    "no text": ("", [], "stop"),
    "other text": ("The harbour lies in the north.\n\nWhy? Nobody knows.", [], "stop"),
}  # fmt: skip


@pytest.mark.parametrize("text", ALL_FOUR.values(), ids=ALL_FOUR)
def test_the_questions_of_a_list_are_read_however_it_is_written(text):
    assert parse_questions(text, 4) == FOUR


@pytest.mark.parametrize(("text", "questions", "finish"), FEWER.values(), ids=FEWER)
def test_nothing_else_is_a_question(text, questions, finish):
    assert parse_questions(text, 4, finish) == questions


MARKED = [
    ("1: A?\n2: B?", ["A?", "B?"]),
    ("Here they are.\n\n**1.** Who?\n\n### 2 - What,\nand why?\n", ["Who?", "What,\nand why?"]),
    ("1: ** A? **\n2!! #B.!", ["A?", "B"]),
    ("7) no mark 5: A? 5: A?", ["A?", "A?"]),  # numbers and equal questions are not looked at
    ("1: When did it end, in 1984? 2: B", ["When did it end, in", "2: B"]),  # a year is a mark, and takes a character
    ("1: v2: B?", ["v2: B?"]),  # no word begins at the 2
    ("1: A?\n2:\n3: B?", ["A?", "3: B?"]),
    ("1: **\n2: A \n\n B", ["*", "A \n\n B"]),
    ("1: A?\n2:", ["A?"]),
    ("1: A?\n2: \n", ["A?"]),
    ("A?\nB?", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "questions"), MARKED)
def test_the_published_recipe_reads_what_stands_behind_numbers(text, questions):
    count = len(questions)
    assert parse_marked(text, count) == questions
    assert parse_marked(text, count + 1) is parse_marked(text, count - 1) is None


def test_a_question_is_a_whole_sentence_without_what_is_around_it():
    told = {
        "What is __init__ for, and **why**?": "What is __init__ for, and why?",
        "Why does f(**a) equal g(**a)?": "Why does f(**a) equal g(**a)?",
        'Why does "Who goes there?" matter': None,
        'Who says "who goes there?"': 'Who says "who goes there?"',
        "**Why?** (two sentences)": "Why?",
        "What is A? And B?": "What is A?",
        "Given that A holds. What is B?": "Given that A holds. What is B?",
        "\u4ec0\u4e48\u662f\u706f\u5854\uff1f\u8bf7\u8bf4\u660e\u3002": "\u4ec0\u4e48\u662f\u706f\u5854\uff1f",
        "\u706f\u53f0\u306f\u4f55\u3067\u3059\u304b\u3002": "\u706f\u53f0\u306f\u4f55\u3067\u3059\u304b\u3002",
        "\u0645\u0627 \u0647\u0648\u061f": "\u0645\u0627 \u0647\u0648\u061f",
        "???": None,
        "Explain it.": None,
    }
    assert {text: question(text) for text in told} == told


@pytest.mark.parametrize("recipe", ["default", "official"])
def test_what_a_recipe_s_request_asks_for_is_what_it_reads(recipe):
    asked = Prompts.load(recipe=recipe).ask(4)
    read = parse_marked if recipe == "official" else parse_questions
    assert "{count}" not in asked and "numbered list" in asked
    assert ('"1:"' in asked and '"4:"' in asked) is (recipe == "official")
    mark = ":" if recipe == "official" else "."
    questions = ["Why?", "Who?", "When?", "Where?"]
    assert read("\n".join(f"{i}{mark} {question}" for i, question in enumerate(questions, 1)), 4) == questions


# -- how it is asked for -----------------------------------------------------------------------------------------------


def said(text: str, finish: str = "stop") -> Reply:
    return Reply(body={"choices": [{"message": {"content": text}, "finish_reason": finish}]})


@pytest.mark.parametrize(
    ("text", "finish", "why"),
    [
        ("1. Why?", "stop", "questions: too few"),
        ("1. Why?\n2. Who", "length", "questions: cut off"),
        ("No.", "stop", "questions: none"),
        ("1. Why?\n2. Who?", "stop", None),
        ("1. Why?\n2. Who?\n3.", "length", None),
    ],
)
def test_half_of_the_questions_are_enough(text, finish, why):
    found = MAKERS["default"].questions(Completion(text, finish, 1, 1), 4)
    assert found == (["Why?", "Who?"] if why is None else why)


def lists(server) -> list[dict]:
    """The requests for lists."""
    return [seen.body for seen in server.seen if seen.body["max_tokens"] == 80]


def message(body: dict) -> str:
    return body["messages"][0]["content"]


AGAIN = Prompts.load().ask(4, again=True)


def test_a_list_that_cannot_be_read_is_asked_for_once_more_with_other_words_and_another_seed(settings, tmp_path):
    """Of 16 lists the first ones cannot be read, and 4 of the second ones."""
    second = []

    def behave(number, seen):
        if seen.body["max_tokens"] != 80 or (message(seen.body).endswith(AGAIN) and len(second) >= 4):
            return None
        second.extend([seen] if message(seen.body).endswith(AGAIN) else [])
        return said("1. Why?" if message(seen.body).endswith(AGAIN) else "1. Well, no.")

    with OpenAIServer(behave) as server:
        result = generate(settings(endpoints=(server.url,)))
        summary = {"recipe": ""} | summarise(result.outcomes)
        asked = [body for body in lists(server) if "response_format" not in body]
    assert summary["left_out"] == {"questions: too few": 4} and summary["asked_again"] == 12 and summary["turns"] == 12
    again = [body for body in asked if message(body).endswith(AGAIN)]
    assert len(asked) == 32 == len({body["seed"] for body in asked}) and len(again) == 16
    chunks = [message(body).removesuffix(AGAIN) for body in again]
    assert all(sum(message(body).startswith(chunk) for body in asked) == 2 for chunk in chunks)
    told = dict(values_of(result, summary))
    assert told["lists read at the second asking"] == "12" and told["turns left out: questions: too few"] == "4"


def test_what_was_asked_again_is_not_asked_a_third_time(settings, tmp_path):
    """Stopped behind the second list, a run goes on with what it has."""

    def behave(number, seen, stop=True):
        if seen.body["max_tokens"] == 80:
            return None if message(seen.body).endswith(AGAIN) else said("No.")
        return Reply(401, {}) if stop else None

    run = dict(max_documents=1, concurrency=1)
    with OpenAIServer(behave) as server:
        with pytest.raises(EngineStopped):
            generate(settings(endpoints=(server.url,), **run))
        assert len(lists(server)) == 2 * 4 + 1
    with OpenAIServer(lambda number, seen: behave(number, seen, False)) as server:
        result = generate(settings(endpoints=(server.url,), **run))
        assert lists(server) == [] and result.outcomes[0]["counts"] == {"lists read at the second asking": 4}
    with OpenAIServer(lambda number, seen: behave(number, seen, False)) as server:
        generate(settings(endpoints=(server.url,), out=str(tmp_path / "whole"), **run))
    (stopped,), (whole,) = (list(read_pairs(tmp_path / name)) for name in ("pairs", "whole"))
    assert stopped == whole


def test_lists_come_as_json_where_a_server_holds_answers_to_a_schema(settings, tmp_path, caplog):
    with OpenAIServer() as server:
        generate(settings(endpoints=(server.url,), out=str(tmp_path / "held"), max_documents=1))
        asked = lists(server)
    held = asked[0]["response_format"]["json_schema"]["schema"]
    assert len(asked) == 4 and all(body["response_format"] == asked[0]["response_format"] for body in asked)
    assert held["properties"]["questions"]["maxItems"] == 4 and "JSON" in message(asked[0])[-200:]

    def refuses(number, seen):
        return Reply(400, {"message": "no response_format here"}) if "response_format" in seen.body else None

    def ignores(number, seen):
        seen.body = {name: value for name, value in seen.body.items() if name != "response_format"}
        return None

    def fails(number, seen):
        return Reply(500, {}) if "response_format" in seen.body else None

    made = {"held": list(read_pairs(tmp_path / "held"))}
    for behave in (refuses, ignores, fails):
        caplog.clear()
        with OpenAIServer(behave) as server:
            name = behave.__name__
            result = generate(
                settings(endpoints=(server.url,), out=str(tmp_path / name), concurrency=1, max_documents=1)
            )
            plain = [body for body in lists(server) if "JSON" not in message(body)[-200:]]
        made[name] = list(read_pairs(tmp_path / name))
        assert len(plain) == 4 and len(server.seen) == 4 * 3 + (5 if name == "fails" else 1)
        assert caplog.text.count("does not hold answers to a JSON schema") == 1 and not any(
            outcome["counts"] for outcome in result.outcomes
        )
    turns = [[pair.turns for pair in each] for each in made.values()]
    assert turns[1:] == turns[:-1]


def test_json_that_ends_with_the_tokens_is_asked_for_once_more_in_words(settings):
    """As of a small model that was never taught JSON."""

    def behave(number, seen):
        return said('{"questions": ["a a a a a', "length") if "response_format" in seen.body else None

    with OpenAIServer(behave) as server:
        result = generate(settings(endpoints=(server.url,), max_documents=1))
        first, second = (
            [body for body in lists(server) if ("response_format" in body) == held] for held in (True, False)
        )
    assert result.outcomes[0]["counts"] == {"lists read at the second asking": 4} and result.made == 1
    assert len(first) == len(second) == 4 and all(message(body).endswith(AGAIN) for body in second)


def test_a_refusal_after_an_answer_that_was_held_costs_that_request_alone(settings):
    def behave(number, seen):
        return Reply(400, {}) if number == 3 else None

    with OpenAIServer(behave) as server:
        generate(settings(endpoints=(server.url,), max_documents=1, concurrency=1))
        asked = lists(server)
    assert sum("response_format" in body for body in asked) == 4 and len(asked) == 5


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_a_model_that_may_think_first_is_given_no_schema(kwargs, settings, tokenizer, tmp_path):
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    closed = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    role, prompt = "<|{{ message['role'] }}|>\n", "{% if add_generation_prompt %}<|assistant|>\n"
    answered = "{% if message['role'] == 'assistant' %}" + closed + "{% endif %}"
    assert role in own.chat_template and prompt in own.chat_template
    own.chat_template = own.chat_template.replace(role, role + answered).replace(prompt, prompt + closed)
    own.save_pretrained(tmp_path / "model")
    with OpenAIServer() as server:
        given = dict(model=str(tmp_path / "model"), prompts=None, max_documents=1, template_kwargs=kwargs)
        generate(settings(endpoints=(server.url,), **given))
        assert {"response_format" in body for body in lists(server)} == {kwargs == {"enable_thinking": False}}


def test_the_official_recipe_asks_once_and_in_words(tmp_path):
    prompts = Prompts.load(recipe="official")
    assert prompts.again == prompts.json == ""
    (tmp_path / "questions_again.txt").write_text("Ask {count}.")
    with pytest.raises(ValueError, match="recipe 'official' asks nothing with it"):
        Prompts.load(tmp_path, "official")
    assert Prompts.load(tmp_path).ask(3, again=True) == "Ask 3."
