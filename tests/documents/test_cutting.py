"""Long texts to documents in bounds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpo_ops.documents.cutting import Cutter, Part, Rest
from longpo_ops.documents.tokens import token_starts
from tests.engines import tiny

WORDS = st.text("abc風ส", min_size=1, max_size=12)
SEPARATORS = st.sampled_from([" ", " ", ". ", "\n", "\n\n", "\n\n# ", "\n\n\n", "\n```\n", "", "\f"])


def cut(tokenizer, text: str, first: int, last: int, seams=()) -> tuple[list[str], list[str]]:
    """-> the texts of parts and of rests, each part held to its own tokens."""
    cutter = Cutter(tokenizer, first, last)
    parts, rests = [], []
    for part in cutter.cut(text, token_starts(cutter.backend, text), seams):
        stretch = text[part.begin : part.end]
        if isinstance(part, Rest):
            rests.append(stretch)
            continue
        assert part.tokens == count(tokenizer, stretch) and first < part.tokens <= last
        assert part.breaks[0][-1] == len(stretch) and (part.starts < len(stretch)).all()
        parts.append(stretch)
    return parts, rests


def count(tokenizer, text: str) -> int:
    return len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def plain(text: str) -> str:
    return "".join(text.split())


@settings(deadline=None)
@given(st.lists(st.tuples(WORDS, SEPARATORS), min_size=1, max_size=300), st.integers(1, 60), st.integers(0, 200))
def test_parts_are_in_bounds_and_together_with_rests_the_text(tokenizer, pieces, first, more):
    text = "".join(word + separator for word, separator in pieces)
    cutter = Cutter(tokenizer, first, first + 1 + more)
    found = [*cutter.cut(text, token_starts(cutter.backend, text))]
    assert plain("".join(text[part.begin : part.end] for part in found)) == plain(text)
    for part in found:
        if isinstance(part, Part):
            assert first < part.tokens <= first + 1 + more
            assert part.tokens == count(tokenizer, text[part.begin : part.end])


def test_nothing_is_lost_where_the_longest_is_twice_the_shortest(tokenizer):
    draw = random.Random(0)
    for number in range(40):
        sentences = [
            f"Ann walked {draw.choice('abcdefg') * draw.randrange(1, 9)} home." for _ in range(draw.randrange(20, 300))
        ]
        text = "".join(sentence + draw.choice([" ", " ", "\n", "\n\n", "\n\n# "]) for sentence in sentences)
        parts, rests = cut(tokenizer, text, 100, 200)
        assert rests == [] or count(tokenizer, text) <= 100, number
        assert len(parts) >= count(tokenizer, text) // 200


def test_parts_are_even_and_begin_at_the_best_headings(tokenizer):
    section = "## Part {}\n\n" + "Ann walked along the pier at noon.\n\n" * 6
    text = "\n\n".join(
        f"# Chapter {i}\n\n" + "".join(section.format(j) for j in range(draw)) for i, draw in enumerate((3, 4, 3, 4))
    )
    total = count(tokenizer, text)
    parts, rests = cut(tokenizer, text, total // 6, total // 3)
    assert rests == [] and len(parts) == 4 and all(part.startswith("# Chapter") for part in parts)
    even = "Ann walked along the pier at noon. " * 100
    total = count(tokenizer, even)
    sizes = [count(tokenizer, part) for part in cut(tokenizer, even, total // 8, int(total / 2.2))[0]]
    assert len(sizes) == 3 and max(sizes) - min(sizes) < 30


def test_a_part_knows_the_heading_it_lies_under(tokenizer):
    text = "# Boats\n\n" + "Ann walked along the pier at noon. " * 60
    cutter = Cutter(tokenizer, 100, 220)
    found = [*cutter.cut(text, token_starts(cutter.backend, text))]
    assert len(found) > 2 and {part.heading for part in found} == {"Boats"}
    assert all(part.heading is None for part in cutter.cut(text[9:], token_starts(cutter.backend, text[9:])))


def test_bounds_are_exact(tokenizer):
    text = "Ann walked along the pier at noon. " * 20
    total = count(tokenizer, text)
    assert cut(tokenizer, text, total // 3, total) == ([text], [])
    assert cut(tokenizer, text, total, 2 * total) == ([], [text])
    assert cut(tokenizer, text, total - 1, 2 * total) == ([text], [])
    parts, rests = cut(tokenizer, text, total // 3, total - 1)
    assert len(parts) == 2 and rests == []


def test_what_cannot_be_in_bounds_is_told(tokenizer):
    text = "Ann walked along the pier at noon. " * 40
    total = count(tokenizer, text)
    parts, rests = cut(tokenizer, text, int(0.7 * total), int(0.8 * total))
    assert len(parts) == len(rests) == 1 and count(tokenizer, rests[0]) < 0.26 * total
    with pytest.raises(ValueError, match="documents of 9 to 9 tokens; expected 0 <= first < last"):
        Cutter(tokenizer, 9, 9)


@pytest.mark.parametrize(
    "text, ends",
    [
        ("Ann walked along the pier at noon. " * 200, "noon."),  # a book in one line
        ("word " * 1500, "word"),
        ("风转了方向。船只归来。" * 150, "。"),
        ("風が変わった" * 150, None),
        ("ฉันรักเรือที่ท่าน้ำ" * 60, None),
        ("ខ្ញុំស្រឡាញ់ស្រុកខ្មែរ" * 60, None),
        ("QUJD" * 1500, None),  # a picture in base64
        ("e\u0301" * 1500, "e\u0301"),
        ("👩\u200d🚀" * 600, None),
    ],
)
def test_one_line_of_any_script_is_cut(tokenizer, text, ends):
    parts, rests = cut(tokenizer, text, 500, 1200)
    assert len(parts) > 1 and rests == []
    assert plain("".join(parts)) == plain(text)
    for part in parts:
        assert ends is None or part.endswith(ends)
        assert part[0] not in "\u0301\u200d\u0e31\u0e35\u0e48\u0e49\u17d2\u17bb" and part[-1] not in "\u200d\u17d2เ"


def test_code_is_not_cut_where_a_paragraph_is_in_reach(tokenizer):
    code = "```\n" + "x = f(1)\n\n" * 8 + "```"
    text = ("The boats return at noon with the wind.\n\n" * 4 + code + "\n\n") * 12
    parts, _ = cut(tokenizer, text, 200, 700)
    assert len(parts) > 2 and all(part.count("```") % 2 == 0 for part in parts)


def test_seams_are_better_than_headings(tokenizer):
    one = tiny.document(0)
    text = one + "\n\n" + one
    total = count(tokenizer, text)
    assert cut(tokenizer, text, total // 4, int(total / 1.5), [len(one) + 2])[0] == [one.strip(), one.strip()]
