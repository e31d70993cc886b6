"""Where texts may be parted, and how good each place is."""

from __future__ import annotations

import pytest

from longpo_ops.documents.structure import (
    BLOCK,
    HEADING,
    LETTER,
    LINE,
    PARAGRAPH,
    SENTENCE,
    WORD,
    find_breaks,
    heading_at,
    headings,
)

TITLES = {
    "# One\n": (1, "One"),
    "#### Four deep ####\n": (4, "Four deep"),
    "\\chapter{The sea} begins\n": (2, "The sea} begins"),
    "\\subsection*{Nets}\n": (4, "Nets"),
    "Title\n=====\n": (1, "Title"),
    "Deeper\n------\n": (2, "Deeper"),
    "Deepest\n^^^^^^^\n": (4, "Deepest"),
    "Part IV\n": (1, "Part IV"),
    "Chapter 12: Of nets\n": (2, "Chapter 12: Of nets"),
    "Appendix B\n": (2, "Appendix B"),
    "3.2 Titles of sections\n": (3, "3.2 Titles of sections"),
    "3.2.1. Titles below\n": (4, "3.2.1. Titles below"),
    "第三章 风\n": (2, "第三章 风"),
    "第十二节 船\n": (3, "第十二节 船"),
    "Глава 3\n": (2, "Глава 3"),
    "SEE ALSO\n       boat(1)\n": (3, "SEE ALSO"),
}
NO_TITLES = (
    "Chapter 3 describes how the nets are mended\n",
    "Chapter 3 Nets ........ 17\n",
    "3.2 Titles of sections 45\n",
    "3.2 Metres are two fathoms.\n",
    "#hashtag\n",
    "a | b\n--|--\n",
    "A wind turned.\nSEE ALSO\nboats\n",
    "第三章里说，风\n",
)


@pytest.mark.parametrize("text", TITLES)
def test_what_looks_like_a_heading_is_one_with_its_level(text):
    body = "The wind turned.\n\n"
    assert [(heading_at(body + text, at), level) for at, level in headings(body + text)] == [TITLES[text][::-1]]
    assert headings(body + text)[0][0] == len(body)


@pytest.mark.parametrize("text", NO_TITLES)
def test_a_sentence_or_a_line_of_contents_is_no_heading(text):
    assert headings("The wind turned.\n\n" + text) == []


def test_every_kind_of_break_has_its_rank():
    text = "# A\n\nOne two. Three!\nFour\n\nFive\fSix “Seven.” Eight\n\n```\nx. y\n\n# no\n```\n"
    places, ranks = find_breaks(text)
    found = {text[place:].split()[0]: rank for place, rank in zip(places.tolist()[:-1], ranks.tolist())}
    assert found.pop("#") == LINE
    assert found == {
        "A": WORD,
        "One": PARAGRAPH,
        "two.": WORD,
        "Three!": SENTENCE,
        "Four": LINE,
        "Five": PARAGRAPH,
        "Six": PARAGRAPH,
        "“Seven.”": WORD,
        "Eight": SENTENCE,
        "```": LINE,
        "x.": LINE,
        "y": WORD,
        "no": WORD,
    }
    assert ranks[places.tolist().index(text.index("```"))] >= BLOCK
    assert places[-1] == len(text) and find_breaks("")[0].tolist() == [0]


def test_the_level_of_a_heading_is_its_rank():
    ranks = [sorted(find_breaks(f"x\n\n{'#' * level} A\n")[1].tolist())[-2] for level in range(1, 7)]
    assert ranks == [HEADING + 6 - level for level in range(1, 7)]


def test_scripts_without_spaces_are_parted_between_letters_and_never_before_a_sign():
    thai, khmer = "ที่นี่น้ำเรือ", "ស្រុកខ្មែរ"
    for text in (thai, khmer):
        places, ranks = find_breaks(text)
        inside = places[:-1].tolist()
        assert inside and set(ranks[:-1].tolist()) == {LETTER}
        assert not any(0x0E31 <= ord(text[at]) <= 0x0E3A or 0x0E47 <= ord(text[at]) <= 0x0E4E for at in inside)
        assert not any(0x17B6 <= ord(text[at]) <= 0x17D3 or text[at - 1] == "\u17d2" for at in inside)
        assert not any(0x0E40 <= ord(text[at - 1]) <= 0x0E44 for at in inside)
    places, ranks = find_breaks("ខ្ញុំ\u200bស្រឡាញ់។ ស្រុក")
    assert WORD in ranks and SENTENCE in ranks
    places, ranks = find_breaks("风转了。船归来")
    assert ranks.tolist().count(SENTENCE) == 1 and places[ranks == SENTENCE].tolist() == [4]


def test_no_text_takes_more_than_linear_time():
    """Each is looked through in a second; a rule that looked on from each of its places would not come to an end."""
    for text in (
        "\n" * 400_000,
        "word " * 200_000,
        "#" * 400_000,
        "A" * 400_000,
        "=\n" * 200_000,
        "```\n" * 20_000,
        "=" * 400_000,
    ):
        assert find_breaks(text)[0][-1] == len(text)
