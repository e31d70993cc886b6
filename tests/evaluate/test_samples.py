"""Scoring by hand-made cases, counting, and the search for the number of units."""

import pytest

from longpo_ops.evaluate.samples import NEAR, Counter, Sample, fit, score
from tests.evaluate.readers import tokenizer


def sample(*references: str, metric: str = "all") -> Sample:
    return Sample("t/100/0", "t", 100, "?", references=references, metric=metric)


@pytest.mark.parametrize(
    ("text", "all_of", "any_of"),
    [
        ("They are 1234567 and 7654321.", 1.0, 1.0),
        ("7654321", 0.5, 1.0),
        ("123456", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_references_contained(text, all_of, any_of):
    references = ("1234567", "7654321")
    assert score(sample(*references), text) == all_of
    assert score(sample(*references, metric="any"), text) == any_of


def test_case_does_not_count_and_words_need_not_end():
    assert score(sample("Norman", "ABCDE"), "the normans; abcde") == 1.0


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="no references"):
        score(sample(), "text")
    with pytest.raises(ValueError, match=r"metric 'best'; expected one of all, any"):
        score(sample("a", metric="best"), "a")


def test_counts_are_those_of_the_rendered_conversation():
    tokens = tokenizer()
    expected = tokens("<|user|>\nHello there<|end|>\n<|assistant|>\n Answer:", add_special_tokens=False)["input_ids"]
    assert Counter(tokens).count("Hello there", " Answer:") == len(expected)


def test_a_tokenizer_without_a_template_is_refused():
    class Bare:
        chat_template = None
        name_or_path = "some-model"

    with pytest.raises(ValueError, match="'some-model' has no chat template"):
        Counter(Bare())


def test_a_template_that_refuses_the_message():
    import copy

    tokens = copy.deepcopy(tokenizer())
    tokens.chat_template = "{{ raise_exception('a system message comes first') }}"
    with pytest.raises(ValueError, match="refuses a conversation: a system message comes first; use another"):
        Counter(tokens).count("Hello")


@pytest.mark.parametrize("guess", [None, 1, 700, 9000])
@pytest.mark.parametrize("rate", [1, 7.3, 150])
@pytest.mark.parametrize("room", [900, 10_000, 500_000])
def test_the_number_of_units_is_close_and_fits(rate, room, guess):
    looks = []

    def count(units: int) -> int:  # a fixed part, and units that grow dearer, as numbered lists do
        looks.append(units)
        return int(200 + rate * units * (1 + 0.02 * len(str(units))))

    units = fit(count, 1, room, guess)
    assert count(units) <= room
    assert count(units) >= (1 - NEAR) * room or count(units + 1) > room
    assert len(looks) < 20


def test_uneven_units_still_fit():
    from random import Random

    sizes = [Random(i).choice([1, 1, 1, 300]) for i in range(3000)]
    units = fit(lambda n: sum(sizes[:n]), 1, 20_000)
    assert sum(sizes[:units]) <= 20_000 < sum(sizes[: units + 1]) + 300


def test_what_does_not_fit_at_all():
    assert fit(lambda units: 100 + units, 10, 109) is None
    assert fit(lambda units: 100 + units, 10, 110) == 10
