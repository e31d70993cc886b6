"""The published recipe's chunks: paragraphs and sections, what is gathered, what is dropped, the long document."""

from __future__ import annotations

import copy
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from longpo_ops.documents import Chunker, Gatherer, is_latex
from longpo_ops.documents.paragraphs import split_sections

LINE = "The wind turns and the boats return. The bell rings at noon."


def count(tokenizer, text: str) -> int:
    return len(tokenizer(text)["input_ids"])


def gather_plainly(tokenizer, paragraphs: list[str], minimum: int, maximum: int) -> list[tuple[str, int]]:
    """The rule, one paragraph after the other."""
    chunks, gathered, total = [], [], 0
    for paragraph in [*paragraphs, None]:
        tokens = maximum + 1 if paragraph is None else count(tokenizer, paragraph)
        if total + tokens <= maximum:
            gathered, total = [*gathered, paragraph], total + tokens
            continue
        if minimum <= total <= maximum:
            chunks.append((" ".join(gathered), total))
        gathered, total = [paragraph], tokens
    return chunks


@given(st.lists(st.integers(1, 12), max_size=40), st.integers(1, 40), st.integers(0, 40), st.randoms())
def test_paragraphs_are_gathered_in_order(tokenizer, sizes, minimum, more, draw):
    paragraphs = [" ".join(["wind"] * size) + "." for size in sizes]
    text = "".join(paragraph + "\n" * draw.randint(2, 4) for paragraph in paragraphs)
    gatherer = Gatherer(tokenizer, minimum, minimum + more)
    assert gatherer.paragraphs(text) == paragraphs
    assert gatherer.gather(text) == gather_plainly(tokenizer, paragraphs, minimum, minimum + more)


def test_bounds_are_part_of_the_range(tokenizer):
    one = count(tokenizer, LINE)
    text = "\n\n".join([LINE] * 7)
    assert [tokens for _, tokens in Gatherer(tokenizer, 3 * one, 3 * one).gather(text)] == [3 * one, 3 * one]
    assert [tokens for _, tokens in Gatherer(tokenizer, one, 3 * one).gather(text)] == [3 * one, 3 * one, one]
    assert [tokens for _, tokens in Gatherer(tokenizer, one, 3 * one - 1).gather(text)] == [2 * one] * 3 + [one]
    assert Gatherer(tokenizer, 7 * one + 1, 8 * one).gather(text) == []


def test_a_paragraph_that_is_too_long_is_dropped_and_what_was_gathered_before_it_judged(tokenizer):
    one = count(tokenizer, LINE)
    long = " ".join([LINE] * 5)
    gatherer = Gatherer(tokenizer, 2 * one, 3 * one)
    assert count(tokenizer, long) > 3 * one
    text = "\n\n".join([LINE, long, LINE, LINE, long, long, LINE])
    assert gatherer.gather(text) == [(f"{LINE} {LINE}", 2 * one)]


def test_a_token_that_begins_every_text_counts_once_per_paragraph(tokenizer):
    text, plain = "\n\n".join([LINE] * 4), Gatherer(tokenizer, 1, 1000)
    begins = copy.deepcopy(tokenizer)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A", special_tokens=[("<|user|>", begins.convert_tokens_to_ids("<|user|>"))]
    )
    ((chunk, tokens),) = plain.gather(text)
    assert Gatherer(begins, 1, 1000).gather(text) == [(chunk, tokens + 4)]


def test_one_newline_and_a_line_of_spaces_part_nothing(tokenizer):
    gatherer = Gatherer(tokenizer, 1, 1000)
    assert gatherer.paragraphs("\n\n a\nb \n \n c\n\n\n\n \t\n\nd\n") == ["a\nb \n \n c", "d"]
    assert gatherer.part("") == ("", []) == gatherer.part(" \n\n ")


def test_latex_is_parted_where_sections_begin(tokenizer):
    gatherer = Gatherer(tokenizer, 1, 12, sections=True)
    text = (
        "\\title{A}\n\nLost.\n\n\\section{One} a\n\nb\n\\SubSection{Two}c \\subsubsection{Three}\n\\section*{No}\n"
        "\\section [x]{No}\\sectional{No}\\paragraph{No}\n\n\\SECTION{Four\n\\section{not one}"
        "\\subsubsubsection{Five}\n\\section{never closed"
    )
    assert gatherer.paragraphs(text) == [
        "\\section{One} a\n\nb", "\\SubSection{Two}c",
        "\\subsubsection{Three}\n\\section*{No}\n\\section [x]{No}\\sectional{No}\\paragraph{No}",
        "\\SECTION{Four\n\\section{not one}", "\\subsubsubsection{Five}\n\\section{never closed",
    ]  # fmt: skip
    assert gatherer.paragraphs("No section.\n\nNone at all.") == [] == gatherer.gather("None.")


def test_titles_that_never_close_do_not_take_forever():
    """A rule that looked for the end of each in the whole text would not come to an end."""
    assert len(split_sections("\\section{a}" + "\\section{" * 400_000)) == 1


@pytest.mark.parametrize(
    ("name", "latex"),
    [("a/b.tex", True), ("B.TEX.GZ", True), ("b.tex.zst", True), ("b.tex.md", False), ("tex", False), ("b.gz", False)],
)
def test_latex_is_told_by_the_file(name, latex):
    assert is_latex(name) is latex


def test_the_long_document_is_its_chunks_and_says_where_they_are(tokenizer):
    draw, one = random.Random(3), count(tokenizer, LINE)
    text = "\n\n".join(LINE if draw.random() < 0.8 else " ".join([LINE] * 5) for _ in range(60))
    gatherer = Gatherer(tokenizer, 2 * one, 3 * one)
    chunks, (document, spans) = gatherer.gather(text), gatherer.part(text)
    assert len(chunks) > 5 and document == "\n\n\n".join(chunk for chunk, _ in chunks)
    assert [(document[begin:end], tokens) for begin, end, tokens in spans] == chunks


@pytest.mark.parametrize("parts", [Chunker, Gatherer])
def test_bounds_that_make_no_sense_are_refused(parts, tokenizer):
    with pytest.raises(ValueError, match="chunks of 9 to 3 tokens; expected 0 < minimum <= maximum"):
        parts(tokenizer, 9, 3)
    with pytest.raises(ValueError, match="object gives no character offsets"):
        parts(object(), 1, 2)


def test_what_a_tokenizer_s_file_says_about_cutting_and_padding_changes_no_count(tokenizer):
    text = "\n\n".join([LINE, "Noon.", LINE])
    cut = copy.deepcopy(tokenizer)
    for parts, counted in (
        (Gatherer, lambda made: made.gather(text)),
        (Chunker, lambda made: made.starts(text).tolist()),
    ):
        cut.backend_tokenizer.enable_truncation(4)
        cut.backend_tokenizer.enable_padding()
        assert counted(parts(cut, 1, 1000)) == counted(parts(tokenizer, 1, 1000))
