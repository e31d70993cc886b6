"""The prompt files, the strict reading of question lists, and the filters."""

from __future__ import annotations

import pytest

from longpo_ops.engines import Completion
from longpo_ops.generate import Filters, Prompts
from longpo_ops.generate.filters import overlap, repeated_share, split_words
from longpo_ops.generate.prompts import parse_questions

GOOD = "The keeper of the old harbour writes the log at dusk."


def answer(text: str, finish: str = "stop") -> Completion:
    return Completion(text, finish, 1, 1)


@pytest.mark.parametrize("text", ["1. A?\n2. B?\n3. C?", "\n 1) A? \n\n2) B?\n3) C?\n\n"])
def test_a_list_of_questions_is_read(text):
    assert parse_questions(text, 3) == ["A?", "B?", "C?"]


@pytest.mark.parametrize(
    "text",
    [
        "", "A?\nB?\nC?", "1. A?\n2. B?", "1. A?\n2. B?\n3. C?\n4. D?", "1. A?\n3. B?\n2. C?", "1. A?\n2. A?\n3. C?",
        "Here they are:\n1. A?\n2. B?\n3. C?", "1. A?\n2. B?\n3. C?\nGood luck!",
        "1. A?\n2.\n3. C?", "- A?\n- B?\n- C?",
    ],
)  # fmt: skip
def test_anything_else_is_no_list(text):
    assert parse_questions(text, 3) is None


def test_each_file_can_be_replaced_alone(tmp_path):
    (tmp_path / "lead_ins.txt").write_text("So, {question}\n\nNow: {question}\n")
    prompts, defaults = Prompts.load(tmp_path), Prompts.load()
    assert prompts.lead_ins == ("So, {question}", "Now: {question}")
    assert prompts.instruct(1, "why {so}?") == "Now: why {so}?"
    assert (prompts.questions, prompts.refusals) == (defaults.questions, defaults.refusals)
    assert prompts.digest() != defaults.digest() == Prompts.load().digest()
    assert "4 questions" in defaults.ask(4) and "{count}" not in defaults.ask(4)
    assert all(lead_in.count("{question}") == 1 for lead_in in defaults.lead_ins) and len(defaults.lead_ins) > 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no prompt files in"),
        ({"questions.txt": "Ask something."}, r"questions.txt: expected \{count\}"),
        ({"lead_ins.txt": "{question}\nAnswer!"}, r"lead_ins.txt: 'Answer!'; expected \{question\} once"),
        ({"refusals.txt": " \n"}, "refusals.txt is empty"),
    ],
)
def test_bad_prompt_files_are_refused(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        Prompts.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "finish", "reason"),
    [
        (GOOD, "stop", None),
        ("", "stop", "empty"),
        (" ...\n", "stop", "empty"),
        (GOOD, "length", "cut off"),
        ("Ann.", "stop", "near-empty"),
        ("I’m sorry, but I can’t say.", "stop", "refusal"),
        ("AS AN AI, this is beyond me.", "stop", "refusal"),
        ("The bell rings again and again. " * 6, "stop", "repetitive"),
        ("灯塔的守卫在夜里写下日志。", "stop", None),
        ("灯塔的守卫在夜里。" * 6, "stop", "repetitive"),
    ],
)
def test_answers_are_judged(text, finish, reason):
    filters = Filters(Prompts.load().refusals)
    assert filters.answer(text, finish) == reason
    if reason is not None:
        other = answer("Nobody has ever seen the lamps of this pier.")
        assert filters.reject(answer(text, finish), other) == f"chosen: {reason}"
        assert filters.reject(other, answer(text, finish)) == f"rejected: {reason}"


def test_answers_that_say_the_same_carry_no_preference():
    reason, filters = "chosen equal or nearly equal to rejected", Filters()
    longer = GOOD * 1 + " He counts the boats, mends the nets, and rings the bell when a storm comes in from the sea."
    assert filters.reject(answer(GOOD), answer(GOOD)) == reason
    assert filters.reject(answer(GOOD), answer(GOOD.upper().replace(".", "!"))) == reason
    assert filters.reject(answer(longer), answer(longer.replace("counts", "tallies"))) == reason
    assert filters.reject(answer(GOOD), answer(GOOD.replace("harbour", "tower").replace("dusk", "dawn"))) is None


def test_shares_are_what_they_say():
    assert repeated_share(list("abcdefgh")) == 0 and repeated_share(list("abcd")) == 0
    assert repeated_share(["a"] * 10) == 1 - 1 / 7
    assert overlap("a b c", "a b c") == 1 and overlap("a b", "c d") == 0 and overlap("", "") == 1
    assert overlap("a b c", "a b d") == 2 * 2 / 8  # start-a, a-b of four pairs each
    assert split_words("It's 4 日本!") == ["it", "s", "4", "日", "本"]
