"""The comparison of the PDF reader with pdftotext: what counts as the same."""

from __future__ import annotations

import shutil
import sys
from collections import Counter

import pytest

from benchmarks.loop import reading
from tests.documents.test_layout import book
from tests.documents.writing import pdf


def test_words_and_runs_are_counted_as_often_as_they_are_there():
    assert reading.words("A well-known \ufb01eld,\x07 风浪 2.") == ["A", "wellknown", "field", "风", "浪", "2"]
    assert reading.runs(list("abcdef")) == {tuple("abcde"): 1, tuple("bcdef"): 1}
    assert reading.share(Counter("aab"), Counter("abb")) == pytest.approx(2 / 3)
    assert reading.share(Counter("ab"), Counter("abcd")) == reading.share(Counter("abcd"), Counter("ab")) == 0.5


@pytest.mark.skipif(shutil.which("pdftotext") is None, reason="pdftotext is not installed")
def test_a_book_is_read_as_pdftotext_reads_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.pdf").write_bytes(pdf(*book()))
    monkeypatch.setattr(sys, "argv", ["reading", str(tmp_path / "a.pdf")])
    reading.main()
    assert capsys.readouterr().out.splitlines()[1].startswith("1.0000 1.0000      4      8")
