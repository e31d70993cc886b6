"""PDF text as a person reads it: margins gone, lines and pages joined, columns in order."""

from __future__ import annotations

import pytest

from longpo_ops.documents.columns import glued
from longpo_ops.documents.layout import cleaned, read_pdf
from longpo_ops.documents.pdf import Line, Page
from tests.documents.writing import column, pdf

WIND = (  # lines that fill a column of 240 points, but the last
    "The wind turns at noon and blows from the sea, cold",
    "and steady, until the lamps along the pier are lit by our",
    "keeper, who looks at the glass and shakes his old grey",
    "head. Then it falls, and the boats come home.",
)
RAIN = (
    "Rain is another matter, for it comes from the hills in",
    "grey curtains which nobody on the water likes to see,",
    "and it stays for days. The captain sits at the window",
    "and reads the log of the year before this one.",
)
ONE, TWO = " ".join(WIND), " ".join(RAIN)
LONG = tuple(line for _ in range(3) for line in (*WIND, *RAIN))


def text(*pages) -> str:
    return read_pdf(pdf(*pages))


def test_the_lines_of_a_paragraph_are_one_and_paragraphs_stay_apart():
    assert text([*column(50, 700, *WIND), *column(50, 640, *RAIN)]) == f"{ONE}\n\n{TWO}"
    indented = column(50, 700, *WIND)
    indented += [(62, 652, RAIN[0][:50]), *column(50, 640, *RAIN[1:])]
    assert text(indented) == f"{ONE}\n\n{RAIN[0][:50]} {' '.join(RAIN[1:])}"


def test_code_tables_and_addresses_keep_their_lines():
    code = ["def wind():", "return 1", "", "print(wind())"]
    assert text([*column(50, 700, *WIND), *column(70, 640, *filter(None, code))]).endswith(
        "def wind():\nreturn 1\nprint(wind())"
    )
    rows = [(x, 700 - 12 * i, cell) for i in range(4) for x, cell in ((50, f"place {i}"), (250, f"{i} knots"))]
    assert text([*column(50, 760, *WIND), *rows]).count("\n") >= 4


@pytest.mark.parametrize(
    ("before", "after", "elsewhere", "expected"),
    [
        ("The wind turns at noon and blows from the quar-", "terdeck", "", "quarterdeck"),
        ("The wind turns at noon and blows from the well-", "known pier", "the well-known pier", "well-known pier"),
        ("The wind turns at noon and blows from the light-", "house there", "the lighthouse there", "lighthouse there"),
        ("The wind turns at noon and blows for the north-", "South Sea", "", "north-South Sea"),
        ("The wind turns at noon as in the state-of-the-", "art boats", "", "state-of-the-art boats"),
        ("The wind turns at noon, and that is of a co\xad", "lour seldom seen", "", "colour seldom seen"),
    ],
)
def test_a_hyphen_at_the_end_of_a_line_goes_unless_it_belongs_to_the_word(before, after, elsewhere, expected):
    lines = [
        f"It was {elsewhere} in summer, and nobody spoke of it then.",
        *WIND[:3],
        before,
        f"{after} and so it stays.",
    ]
    found = text(column(50, 700, *lines))
    assert f"{expected} and so" in found and "\xad" not in found


def test_ligatures_are_written_out_and_control_characters_go():
    line = Line("The o\ufb03ce \ufb01nds\xa0a \x1c\ue000 \ufb02ag\x07 \U0001d465\n", 0, 100, 700, 10)
    (found,) = cleaned(Page([line, line._replace(text="\x02\ue001")], 612, 792)).lines
    assert found.text == "The office finds a flag \U0001d465"


def book(heads=True) -> list:
    """Pages with a chapter's name above, a number below, and a paragraph that goes on over every seam."""
    pages = []
    for number in range(4):
        lines = column(50, 700, *(LONG[:-1] if number < 3 else LONG))
        if heads:
            head = ("The log of the year", f"{number // 2 + 1}. Some chapter {'of wind' if number < 2 else 'of rain'}")
            lines = [(50, 760, head[number % 2]), *lines, (300, 30, str(number + 7))]
        pages.append(lines)
    return pages


def test_heads_feet_and_page_numbers_go_and_paragraphs_go_on_over_the_pages():
    found = text(*book())
    assert found == text(*book(heads=False))
    assert "The log of the year" not in found and "chapter" not in found
    assert f"{LONG[-2]} {LONG[0]}" in found  # over a seam: "... at the window" "The wind ..."


def test_a_line_at_the_top_of_a_page_that_is_text_stays():
    pages = [
        [*column(50, 760, f"{name} comes first on this page."), *column(50, 700, *WIND)]
        for name in ("Sand", "Ice", "Mud")
    ]
    assert all(f"{name} comes first" in text(*pages) for name in ("Sand", "Ice", "Mud"))
    assert "7" in text([*column(50, 760, "The wind blew"), *column(50, 748, *WIND, "7 knots")])


@pytest.mark.parametrize("apart", [True, False])
def test_line_numbers_go(apart):
    pages = []
    for page in range(2):
        lines = []
        for i, line in enumerate(LONG):
            place, number = 700 - 12 * i, str(page * len(LONG) + i + 1)
            lines += [(30, place, number), (60, place, line)] if apart else [(30, place, f"{number}   {line}")]
        pages.append(lines)
    found = text(*pages)
    assert not any(character.isdigit() for character in found) and found.count("The wind turns at noon") == 6


def test_a_numbered_list_keeps_its_numbers():
    items = column(50, 700, *(f"{i}. Look at the glass" for i in range(1, 9)))
    found = text([*column(50, 760, *WIND), *items], column(50, 700, *LONG), *([column(50, 700, *LONG)] * 3))
    assert all(f"{i}. Look at the glass" in found for i in range(1, 9))


def two_columns(order: str) -> list:
    left, right = column(50, 700, *LONG), column(330, 700, *RAIN, *LONG, "It is the last line.")
    if order == "row by row":
        drawn = [line for pair in zip(left, right) for line in pair] + right[len(left) :]
    else:
        drawn = {"left first": left + right, "right first": right + left}[order]
    return [
        (50, 740, "A title that stands over both of the columns and is as wide as they are, or nearly so it is"),
        *drawn,
    ]


@pytest.mark.parametrize("order", ["left first", "right first", "row by row"])
def test_two_columns_are_read_one_after_the_other(order):
    found = text(two_columns(order))
    assert found.startswith("A title") and found.endswith("It is the last line.")
    assert found.index(ONE) < found.index(LONG[-1]) < found.rindex(TWO)
    assert [found.count(each) for each in (ONE, TWO)] == [6, 7]


def test_a_note_follows_the_paragraph_that_it_interrupts():
    note = [(50, 100, "1 The keeper said so himself.", 7)]
    found = text([*column(50, 700, *LONG[:-1]), *note], column(50, 700, LONG[-1], *WIND, *RAIN))
    assert f"{LONG[-2]} {LONG[-1]}" in found and found.count("\n\n1 The keeper said so himself.") == 1


def test_a_raised_piece_stays_at_its_word():
    lines = [Line("It is 10", 50, 84, 700, 10), Line("7", 84, 88, 704, 7), Line("m from here", 90, 140, 700, 10)]
    assert [line.text for line in glued(lines)] == ["It is 107 m from here"]
    assert glued([lines[0], lines[2]._replace(x0=120)]) == [lines[0], lines[2]._replace(x0=120)]  # a cell of a table
