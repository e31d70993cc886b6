"""Text on its way in and out: encodings by their marks, and what may be shown."""

from __future__ import annotations

import os

import pytest

from longpo_ops.text import marked_encoding, one_line, printable

TURNING = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_mark_names_its_encoding(encoding):
    data = "Wind \U0001f32c".encode(encoding)
    assert marked_encoding(data[:4]) == encoding and data.decode(marked_encoding(data)) == "Wind \U0001f32c"


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_the_other_order_of_bytes_is_known(codec):
    data = "\ufeffWind".encode(codec)
    assert data.decode(marked_encoding(data)) == "Wind"


def test_no_mark_names_nothing():
    assert [marked_encoding(data) for data in (b"", b"\xff", b"Wind", b"\xfe\xfe\x00\x00")] == [None] * 4


def test_what_turns_or_hides_is_seen_and_the_rest_is_as_it_was():
    for code in TURNING:
        assert printable(f"a{chr(code)}b") == f"a[U+{code:04X}]b"
    assert printable("a\x1b[2Jb\x9bc\rd\x00") == "a\ufffd[2Jb\ufffdc\ufffdd\ufffd"
    assert printable("\udcff") == "[U+DCFF]" and printable(3) == "3"
    kept = "na\u00efve\n\t\u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f468\u200d\U0001f469 \u00a0"
    assert printable(kept) == kept


def test_a_name_is_one_line_that_utf_8_holds():
    assert one_line(os.fsdecode(b"a\xff\xfe.txt")) == r"a\xff\xfe.txt"
    assert one_line("a\nb\tc\x1b\x85\u2028\u202e\ud800") == r"a\nb\tc\x1b\x85\u2028\u202e\ud800"
    assert one_line("na\u00efve \u05e9.txt") == "na\u00efve \u05e9.txt"
