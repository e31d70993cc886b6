"""PDF: what stands where on a page, what is refused, and that nothing a file says ends the run."""

from __future__ import annotations

import hashlib
import random

import pytest

from longpo_ops.documents.apart import Apart
from longpo_ops.documents.layout import NO_TEXT, read_pdf
from longpo_ops.documents.pdf import ENCRYPTED, pages
from longpo_ops.documents.unreadable import NO_LIMIT, TOO_LONG, Unreadable
from tests.documents.test_readers import TEXT, read
from tests.documents.writing import assembled, column, pdf


def lines(data: bytes) -> list:
    (page,) = pages(data)
    return page.lines


def test_a_line_has_its_place_and_size():
    (first, second) = lines(pdf([(50, 700, "The wind"), (80, 650, "turns.", 14)]))
    assert (first.text, first.x0, first.y, first.size, first.upright) == ("The wind", 50, 700, 10, True)
    assert (second.text, second.x0, second.y, second.size) == ("turns.", 80, 650, 14)
    assert 85 < first.x1 < 95 and 110 < second.x1 < 130


def test_places_are_those_of_the_page_as_it_is_shown():
    for turn, place in ((0, (50, 700)), (90, (700, 562)), (180, (562, 92)), (270, (92, 50))):
        (line,) = lines(pdf([(50, 700, "The wind")], rotate=turn))
        assert (line.x0, line.y) == pytest.approx(place) and line.upright == (turn % 180 == 0)


def test_a_raised_mark_stands_apart_from_its_note():
    data = pdf([(50, 703, "2", 6), (53.5, 700, "Private words", 10)])
    assert lines(data)[0].text == "2 Private words" and lines(data)[0].size == 10


def test_places_hold_behind_characters_beyond_the_first_65536():
    stream = b"BT /F1 10 Tf 50 700 Td <0000000000000001> Tj ET BT /F1 10 Tf 50 680 Td <0001> Tj ET"
    unicode = (
        b"/CIDInit /ProcSet findresource begin begincmap 1 begincodespacerange <0000> <FFFF> endcodespacerange "
        b"2 beginbfchar <0000> <D835DC65> <0001> <0041> endbfchar endcmap end"
    )
    font = (
        b"<</Type/Font/Subtype/CIDFontType2/BaseFont/F/CIDSystemInfo<</Registry(A)/Ordering(I)/Supplement 0>>/DW 600>>"
    )
    data = assembled(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[4 0 R]/Count 1>>",
            b"<</Type/Font/Subtype/Type0/BaseFont/F/Encoding/Identity-H/DescendantFonts[6 0 R]/ToUnicode 7 0 R>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 5 0 R/Resources<</Font<</F1 3 0 R>>>>>>",
            b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
            font,
            b"<</Length %d>>stream\n%s\nendstream" % (len(unicode), unicode),
        ]
    )
    assert [(line.text, line.x0, line.y) for line in lines(data)] == [("𝑥𝑥𝑥A", 50, 700), ("A", 50, 680)]


def test_scans_are_named_and_what_is_too_long_is_given_up():
    assert read_pdf(pdf([], [])) is NO_TEXT
    assert read_pdf(pdf(*["The wind turns. " * 5] * 9), limit=100) is TOO_LONG


def encrypted(password: bytes = b"") -> bytes:
    """A PDF in RC4 of 40 bits that opens with a password (PDF 1.7, algorithms 1 to 4)."""

    def rc4(key: bytes, data: bytes) -> bytes:
        state, j, i, out = list(range(256)), 0, 0, bytearray()
        for place in range(256):
            j = (j + state[place] + key[place % len(key)]) % 256
            state[place], state[j] = state[j], state[place]
        j = 0
        for byte in data:
            i = (i + 1) % 256
            j = (j + state[i]) % 256
            state[i], state[j] = state[j], state[i]
            out.append(byte ^ state[(state[i] + state[j]) % 256])
        return bytes(out)

    filling = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    owner = b"\1" * 32
    key = hashlib.md5((password + filling)[:32] + owner + (-4).to_bytes(4, "little", signed=True) + b"\0").digest()[:5]
    entry = b"/Encrypt<</Filter/Standard/V 1/R 2/P -4/O<%s>/U<%s>>>/ID[<00><00>]"
    stream = b"BT /F1 12 Tf 50 700 Td (The wind turns.) Tj ET"
    hidden = rc4(hashlib.md5(key + (5).to_bytes(3, "little") + b"\0\0").digest()[:10], stream)
    return assembled(
        [
            b"<</Type/Catalog/Pages 2 0 R>>",
            b"<</Type/Pages/Kids[4 0 R]/Count 1>>",
            b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 5 0 R/Resources<</Font<</F1 3 0 R>>>>>>",
            b"<</Length %d>>stream\n%s\nendstream" % (len(hidden), hidden),
        ],
        entry % (owner.hex().encode(), rc4(key, filling).hex().encode()),
    )


def test_an_empty_password_opens_a_file_and_another_one_is_missing():
    assert read_pdf(encrypted()) == "The wind turns."
    assert read_pdf(encrypted(b"secret")) is ENCRYPTED


def test_a_folder_of_scans_is_counted_with_what_to_do(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.pdf").write_bytes(pdf([]))
    (tmp_path / "z.md").write_text(TEXT)
    found, listing = read(tmp_path)
    assert [document.text for document in found] == [TEXT] and listing.skipped == {str(NO_TEXT): 3}
    assert "OCR" in str(listing)


def test_what_a_file_claims_costs_nothing():
    many = pdf("The wind turns.").replace(b"/Count 1", b"/Count 2000000000")
    around = pdf("The wind turns.").replace(b"/Kids[4 0 R]", b"/Kids[2 0 R]")  # a tree of pages that holds itself
    reader = Apart()
    assert reader.read(".pdf", many, NO_LIMIT) == "The wind turns."
    assert isinstance(reader.read(".pdf", around, NO_LIMIT), Unreadable)


def test_a_gap_of_a_gigabyte_in_a_file_is_not_read(tmp_path):
    path = tmp_path / "a.pdf"
    data = pdf("The wind turns.")
    with open(path, "wb") as file:  # a sparse file: the objects at its beginning, the table at its end
        table = data.index(b"xref\n0")
        file.write(data[:table])
        file.seek((1 << 30) - len(data) + table)
        place = file.tell()
        file.write(data[table:].replace(b"startxref\n%d" % table, b"startxref\n%d" % place))
    assert Apart().read(".pdf", path, 1000) == "The wind turns."


def test_broken_files_give_a_text_or_a_reason():
    whole, draw, reader = pdf(column(50, 700, *["The wind turns."] * 9), "It is cold."), random.Random(5), Apart()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 5, 40))):
            data[draw.randrange(len(data))] = draw.randrange(256)
        assert isinstance(reader.read(".pdf", bytes(data[: draw.randrange(len(data))]), 1000), str)
        assert isinstance(reader.read(".pdf", bytes(data), 1000), str)
    assert reader.read(".pdf", whole, 1000).endswith("It is cold.")
