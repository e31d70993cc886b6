"""The prompt files and the two kinds of filters."""

from __future__ import annotations

from dataclasses import replace

import pytest

from longpo_ops.engines import Completion
from longpo_ops.generate import Filters, Prompts, PublishedFilters
from longpo_ops.generate.filters import overlap, repeated_share, split_words

GOOD = "The keeper of the old harbour writes the log at dusk."


def answer(text: str, finish: str = "stop") -> Completion:
    return Completion(text, finish, 1, 1)


def test_the_official_prompts_have_as_many_lines_as_published(tmp_path):
    prompts = Prompts.load(recipe="official")
    assert len(set(prompts.lead_ins)) == len(prompts.lead_ins) == 20
    assert len({phrase.lower() for phrase in prompts.refusals}) == len(prompts.refusals) == 37
    assert all(lead_in.endswith(", {question}") for lead_in in prompts.lead_ins)
    (tmp_path / "questions.txt").write_text("Ask {count}.")
    mine = Prompts.load(tmp_path, "official")
    assert mine.lead_ins == prompts.lead_ins and mine.questions == "Ask {count}."
    with pytest.raises(ValueError, match="recipe is 'oficial'; expected one of default, official"):
        Prompts.load(recipe="oficial")


def test_each_file_can_be_replaced_alone(tmp_path):
    (tmp_path / "lead_ins.txt").write_text("So, {question}\n\nNow: {question}\n")
    prompts, defaults = Prompts.load(tmp_path), Prompts.load()
    assert prompts.lead_ins == ("So, {question}", "Now: {question}")
    assert prompts.instruct(1, "why {so}?") == "Now: why {so}?"
    assert (prompts.questions, prompts.refusals) == (defaults.questions, defaults.refusals)
    assert prompts.digest() != defaults.digest() == Prompts.load().digest()
    assert "4 questions" in defaults.ask(4) and "{count}" not in defaults.ask(4)
    assert all(lead_in.count("{question}") == 1 for lead_in in defaults.lead_ins) and len(defaults.lead_ins) > 5


def test_a_wording_of_the_users_is_asked_again_as_it_is(tmp_path):
    (tmp_path / "questions.txt").write_text("Ask {count}.")
    assert Prompts.load(tmp_path).ask(4, again=True) == "Ask 4." != Prompts.load().ask(4, again=True)
    (tmp_path / "questions_again.txt").write_text("Now ask {count}.")
    assert Prompts.load(tmp_path).ask(4, again=True) == "Now ask 4."


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


OTHER = answer("Nobody has ever seen the lamps of this pier.")


def reasons(filters: Filters, one: Completion) -> tuple[str | None, str | None]:
    """What becomes of a turn with an answer in the place of the chosen one, and of the rejected one."""
    return filters.reject(one, OTHER), filters.reject(OTHER, one)


def both(reason: str | None) -> tuple[str | None, str | None]:
    return (None, None) if reason is None else (f"chosen: {reason}", f"rejected: {reason}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        (" ...\n", "empty"),
        ("Ann.", "near-empty"),
        ("I’m sorry, but I can’t say.", "refusal"),
        ("AS AN AI, this is beyond me.", "refusal"),
        ("The bell rings again and again. " * 6, "repetitive"),
        ("灯塔的守卫在夜里写下日志。", None),
        ("灯塔的守卫在夜里。" * 6, "repetitive"),
    ],
)
def test_answers_are_judged(text, reason):
    assert reasons(Filters(Prompts.load().refusals), answer(text)) == both(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        (" .?!\n", "empty"),
        ("It is so, as he is in on it.", "near-empty"),
        ("Ann.", "near-empty"),
        ("Ann, Bob.", None),
        ("It's Ann.", None),  # its
        ("Well, as an AI I leave it to others.", "refusal"),
        ("I can’t discuss the matter any further.", "refusal"),
        ("She said that Ann can discuss the matter.", None),
        ("灯塔的守卫在夜里写下日志。", "near-empty"),  # one word
    ],
)
def test_answers_are_judged_as_published(text, reason):
    filters = PublishedFilters(Prompts.load(recipe="official").refusals)
    for finish in ("stop", "length", "content_filter"):
        assert reasons(filters, answer(text, finish)) == both(reason)


def test_the_published_share_counts_words_that_occur_again_and_the_limits_are_kept():
    def words(once: int, twice: int) -> Completion:
        again = [f"word{i}" for i in range(twice)] * 2
        return answer(" ".join(again + [f"only{i}" for i in range(once)]))

    filters = PublishedFilters()
    assert reasons(filters, words(2, 9)) == (None, None)  # 18 of 20
    assert reasons(filters, words(1, 9)) == ("chosen: repetitive", None)  # 18 of 19: not 9 of 19
    assert reasons(filters, words(1, 10)) == both("repetitive")  # 20 of 21
    assert reasons(filters, words(2, 19)) == ("chosen: repetitive", None)  # 38 of 40
    assert reasons(filters, answer("The boats, the nets; THE boats: the nets!")) == both("repetitive")


def test_a_rejected_answer_that_ran_on_is_kept_and_judged_like_any_other():
    filters = Filters(Prompts.load().refusals)
    assert reasons(filters, answer(GOOD, "length")) == ("chosen: cut off", None)
    assert reasons(filters, answer(GOOD, "content_filter")) == both("cut off")
    for text, reason in (("I am sorry, but", "refusal"), ("The wind", "near-empty"), ("and on " * 9, "repetitive"),
                         ("", "empty")):  # fmt: skip
        assert filters.reject(OTHER, answer(text, "length")) == f"rejected: {reason}"
    assert filters.reject(OTHER, replace(OTHER, finish="length")) == "chosen equal or nearly equal to rejected"


def test_each_answer_has_its_own_limit_of_repetition():
    again = answer("The bell rings again and again. " * 2 + GOOD)
    assert reasons(Filters(max_repeated=1.0, max_repeated_rejected=0.1), again) == (None, "rejected: repetitive")
    assert reasons(Filters(max_repeated=0.1, max_repeated_rejected=1.0), again) == ("chosen: repetitive", None)


def test_equal_answers_are_kept_where_overlap_is_not_looked_at():
    assert PublishedFilters().reject(OTHER, OTHER) is None and Filters(max_overlap=None).reject(OTHER, OTHER) is None
    reason = "chosen equal or nearly equal to rejected"
    assert PublishedFilters(max_overlap=0.9).reject(OTHER, OTHER) == reason


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
