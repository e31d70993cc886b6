"""A thinking model's answer without what it wrote before: every way in which the two come."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken

from longpo_ops.engines.reasoning import CHANNELS, MARKS, PLAIN, opens_reasoning, part, with_marks
from tests.engines import tiny

HARMONY = "<|channel|>analysis<|message|>The user asks.<|end|><|start|>assistant"


@pytest.mark.parametrize("mark", MARKS)
def test_what_stands_between_marks_at_the_beginning_is_no_answer(mark):
    end = MARKS[mark]
    assert part(f"{mark}\nIs it 7? No.\n{end}\n\nParis.") == ("Paris.", "\nIs it 7? No.\n")
    assert part(f" \n{mark}{mark} of {end}Paris {end}.") == (f"Paris {end}.", f"{mark} of ")
    assert part(f"{mark}\n\n{end}\n\n") == ("", "\n\n")
    assert part(f"{mark}Is it 7? Per") == (None, "Is it 7? Per")  # cut off, or ended inside
    assert part(f"Is it 7?\n{end}\nParis.", opened=mark) == ("Paris.", "Is it 7?\n")
    assert part(f"Is it 7? {end} Paris.", opened=mark) == ("Paris.", "Is it 7? ")
    assert part(f"{end}</b>", opened=mark) == ("</b>", "")
    assert part("Is it 7?", opened=mark) == (None, "Is it 7?")
    other = next(each for each in MARKS.values() if each != end)
    assert part(f"It ends with {other}.\n{other}\n{end}\n7", opened=mark) == ("7", f"It ends with {other}.\n{other}\n")
    assert part(f"It ends with {other}.", opened=mark).answer is None


@pytest.mark.parametrize("mark", MARKS)
def test_a_lone_closing_mark_counts_unless_it_is_a_plain_tag(mark):
    text = f"Is it 7?\n{MARKS[mark]}\n\nParis."  # opened, though nobody has told so
    assert part(text) == ((text, "") if mark in PLAIN else ("Paris.", "Is it 7?\n"))


@pytest.mark.parametrize("mark", MARKS)
def test_a_server_may_have_kept_the_reasoning_that_the_template_opens(mark):
    said = dict(opened=mark, whole=False)
    assert part("Paris.", **said) == ("Paris.", "") and part("", **said) == ("", "")
    assert part("Is it 7? Per", **said, finish="length") == (None, "Is it 7? Per")
    assert part(f"Is it 7?{MARKS[mark]}Paris.", **said) == ("Paris.", "Is it 7?")
    assert part(f"{mark}Is it 7?", **said) == (None, "Is it 7?")
    assert part("Is it 7?\n[/THINK]\nParis.", **said) == ("Paris.", "Is it 7?" + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "Write <think> before and </think> behind your thoughts.",
        "`</think>` ends it, on the same line.",
        "Such as\n<think>\nIs it 7?\n</think>\nParis.",
        'The record:\n```xml\n<reasoning type="a">\nfoo\n</reasoning>\n```\nDone: 42.',
        "analysis of the log",
        "Use <|channel|>analysis<|message|> for it.",
        "  Paris.\n",
        "",
    ],
)
def test_a_text_that_speaks_of_marks_stays_as_it_is(text):
    assert part(text) == (text, "")


def test_two_thoughts_before_one_answer():
    assert part("<think>a</think>\n<think>b</think>\n\nParis <think>") == ("Paris <think>", "ab")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HARMONY}<|channel|>final<|message|>Paris.<|return|>", ("Paris.", "The user asks.")),
        (f"<|start|>assistant{HARMONY}<|channel|>final<|message|>Par", ("Par", "The user asks.")),
        ("<|channel|>final<|message|>Paris.", ("Paris.", "")),
        (HARMONY, (None, "The user asks.")),
        ("<|channel|>analysis<|message|>The us", (None, "The us")),
        ("<|channel|>anal", (None, "")),
        ("analysisThe user asks.assistantfinalParis.", ("Paris.", "The user asks.")),
    ],
)
def test_the_final_channel_is_the_answer(text, expected):
    assert part(text) == expected


def test_reasoning_that_came_apart():
    assert part("Paris.", reasoning="Is it 7?") == part("Paris.", "<think>", "Is it 7?") == ("Paris.", "Is it 7?")
    assert part("", reasoning="Is it", finish="length") == (None, "Is it")
    assert part("", reasoning="Is it", finish="stop") == ("", "Is it")  # an answer, and an empty one
    assert part("<think>7</think>Paris.", reasoning="Is it ") == ("Paris.", "Is it 7")


def test_a_template_may_open_the_reasoning_itself():
    tokenizer = tiny.make_tokenizer()
    begun = "{% if add_generation_prompt %}<|assistant|>{% if think is not defined or think %}<think>\n{% endif %}{% endif %}"
    assert not opens_reasoning(tokenizer, {})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + begun
    assert opens_reasoning(tokenizer, {}) == "<think>" and not opens_reasoning(tokenizer, {"think": False})
    tokenizer.chat_template += "{% if add_generation_prompt %}</think>{% endif %}"  # Qwen3 without thinking
    assert not opens_reasoning(tokenizer, {})


def test_marks_that_are_special_tokens_are_read_and_other_special_tokens_are_not():
    tokenizer = tiny.make_tokenizer()
    end = tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("[THINK]", "[/THINK]", "<|other|>")], True)
    ids = tokenizer(f"[THINK]the wind[/THINK]<|other|>the boats{end}", add_special_tokens=False)["input_ids"]
    dropped = tokenizer.decode(ids, skip_special_tokens=True)
    assert "THINK" not in dropped and part(dropped).reasoning == ""
    assert part(with_marks(tokenizer, ids, dropped)) == ("the boats", "the wind")
    talk = HARMONY + "<|channel|>final<|message|>the boats"
    tokenizer.add_tokens([AddedToken(name, special=True) for name in CHANNELS], True)
    ids = tokenizer(f"{talk}<|other|><|return|>", add_special_tokens=False)["input_ids"]
    assert part(with_marks(tokenizer, ids, "")).answer == "the boats"
    plain = tokenizer(f"<|other|>the boats{end}", add_special_tokens=False)["input_ids"]
    assert with_marks(tokenizer, plain, "as it was") == "as it was"
