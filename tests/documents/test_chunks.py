"""Where documents are parted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longpo_ops.documents import Chunker
from longpo_ops.documents.structure import find_breaks


def part(tokenizer, text: str, minimum: int, maximum: int) -> list[str]:
    chunker = Chunker(tokenizer, minimum, maximum)
    return [text[begin:end] for begin, end, _ in chunker.chunks(text, chunker.starts(text))]


WORDS = st.text("abc", min_size=1, max_size=8)
SEPARATORS = st.sampled_from([" ", " ", ". ", "\n", "\n\n", "\n\n# ", "\n\\section{", "\n```\n", "\t", "! "])


@given(st.lists(st.tuples(WORDS, SEPARATORS), min_size=1, max_size=120), st.integers(1, 30), st.integers(0, 30))
def test_chunks_are_disjoint_in_bounds_and_never_end_inside_a_word(tokenizer, pieces, minimum, more):
    text = "".join(word + separator for word, separator in pieces)
    chunker = Chunker(tokenizer, minimum, minimum + more)
    starts, before = chunker.starts(text), 0
    for begin, end, tokens in chunker.chunks(text, starts):
        assert before <= begin < end <= len(text)
        assert minimum <= tokens <= minimum + more
        assert begin == 0 or text[begin - 1].isspace()
        assert end == len(text) or text[end].isspace()
        assert text[begin:end] == text[begin:end].strip()
        before = end


def test_the_highest_structure_in_reach_ends_a_chunk(tokenizer):
    paragraph = "The wind turns and the boats return. The bell rings at noon.\n\n"
    text = ("# One\n\n" + 3 * paragraph + "## Two\n\n" + 3 * paragraph) * 3
    for chunk in part(tokenizer, text, 40, 100):
        assert chunk.startswith(("# One", "## Two")) and chunk.endswith("noon.")
    setext = ("Title\n=====\n\n" + 4 * paragraph) * 3
    assert all(chunk.startswith("Title\n=====") for chunk in part(tokenizer, setext, 40, 110))
    latex = ("\\section{One}\n" + 3 * paragraph) * 4
    assert all(chunk.startswith("\\section{One}") for chunk in part(tokenizer, latex, 40, 90))
    plain = 12 * paragraph
    assert all(chunk.endswith("noon.") for chunk in part(tokenizer, plain, 30, 60))
    sentences = "The wind turns and the boats return. " * 30
    assert all(chunk.endswith("return.") for chunk in part(tokenizer, sentences, 30, 60))


def test_code_is_one_block_as_long_as_it_fits(tokenizer):
    code = "```python\n# no heading\n\ndef f():\n\n    return 1\n\n# none either\n\nx = f()\n```"
    prose = "The boats return at noon with the wind.\n\n"
    text = (4 * prose + code + "\n\n") * 3
    chunks = part(tokenizer, text, 20, 140)
    assert "".join(chunks).count(code) == 3
    assert not any(chunk.startswith("# no") for chunk in chunks)
    assert len(part(tokenizer, "~~~\n" + "x = f(1)\n\n" * 60 + "~~~", 20, 60)) > 3  # too long: lines part it


def test_a_stretch_without_breaks_is_left_out_and_scripts_without_spaces_are_parted(tokenizer):
    blob = "data:" + "QUJD" * 400
    text = "The wind turns. " * 12 + blob + " " + "The bell rings. " * 12
    chunks = part(tokenizer, text, 20, 60)
    assert chunks and not any("QUJD" in chunk for chunk in chunks)
    assert any("bell" in chunk for chunk in chunks)
    chinese = "风转了方向。船只归来。" * 40
    assert all(chunk.endswith("。") for chunk in part(tokenizer, chinese, 100, 300))
    assert len(part(tokenizer, "风" * 400, 100, 300)) > 2


def test_one_line_of_millions_of_characters_is_parted():
    """A rule that looked through the whole line again at each of its places would not come to an end."""
    places, _ = find_breaks("word " * 600_000 + "\n")
    assert len(places) >= 600_000
