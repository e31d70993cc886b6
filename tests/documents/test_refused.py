"""What is refused by name, and what only speaks of it."""

from __future__ import annotations

import pytest

from longpo_ops.documents.refused import OFFICE, PACKED, POSTSCRIPT, ROFF, RTF, refused

MAN = b'.TH LS 1 "May 2024" GNU\n.SH NAME\nls \\- list directory contents\n.SH SYNOPSIS\n.B ls\n[\\fIOPTION\\fR]...\n'


@pytest.mark.parametrize(
    ("suffix", "head", "reason"),
    [
        (".1", MAN, ROFF),
        (".3pm", b'\'\\" t\n.\\"  Title: x\n.TH X 3\n', ROFF),
        (".txt", b'.\\" a comment of roff\n.Dd May 1\n.Dt LS 1\n', ROFF),
        ("", b"The title\n.LP\nOne.\n.PP\nTwo.\n.IP a\nThree.\n.br\n", ROFF),
        (".1", b".so man1/ls.1\n", ROFF),
        (".ms", b"A title", ROFF),
        (".rtf", b"anything", RTF),
        (".doc", b"{\\rtf1\\ansi Wind}", OFFICE),
        ("", b"{\\rtf1\\ansi Wind}", RTF),
        (".eps", b"", POSTSCRIPT),
        (".txt", b"%!PS-Adobe-3.0\n", POSTSCRIPT),
        (".odt", b"PK\3\4", OFFICE),
        ("", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", OFFICE),
        (".zip", b"PK\3\4", PACKED),
        (".txt", b"\x1f\x8b\x08\0", PACKED),
    ],
)
def test_control_words_are_never_read_as_text(suffix, head, reason):
    assert refused(suffix, head) is reason


@pytest.mark.parametrize(
    ("suffix", "head"),
    [
        (".1", b"12:00 started\n12:01 stopped\n"),  # a log that was rotated
        (".md", b"# roff\n\n```\n" + MAN + b"```\n"),
        (".tex", MAN),
        (".txt", b"A macro such as\n.SH\nbegins a section.\n"),
        ("", b".gitignore and .profile begin with a dot\n.TH"),
        (".txt", b"...\n.5 of it\n.and so on\n"),
        (".rst", b".. note::\n\n   wind\n"),
        (".txt", b"The %!PS mark and {\\rtf stand inside.\n"),
    ],
)
def test_what_speaks_of_them_is_text(suffix, head):
    assert refused(suffix, head) is None
