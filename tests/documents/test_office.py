"""DOCX and EPUB: read where markitdown is, named where it is not, and never unpacked without bound."""

from __future__ import annotations

import importlib.util
import io
import struct
import zipfile

import pytest

from longpo_ops.documents import office
from longpo_ops.documents.office import BOMB, is_bomb
from tests.documents.test_readers import TEXT, read

INSTALLED = importlib.util.find_spec("markitdown") is not None
NAMESPACE = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
RELATIONS = "http://schemas.openxmlformats.org"


def packed(**members: str | bytes) -> bytes:
    """A zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def docx() -> bytes:
    style = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>'
    rows = "".join(
        f"<w:tr>{''.join(f'<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>' for cell in row)}</w:tr>"
        for row in (("sea", "wind"), ("calm", "2"))
    )
    body = f"<w:p>{style}<w:r><w:t>Wind</w:t></w:r></w:p><w:p><w:r><w:t>The wind turns.</w:t></w:r></w:p><w:tbl>{rows}</w:tbl>"
    kinds = f'<Types xmlns="{RELATIONS}/package/2006/content-types"><Default Extension="xml" ContentType="application/xml"/><Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/><Override PartName="/word/document.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"/><Override PartName="/word/styles.xml" ContentType="application/vnd.openxmlformats-officedocument.wordprocessingml.styles+xml"/></Types>'  # noqa: E501
    heading = '<w:style w:type="paragraph" w:styleId="Heading1"><w:name w:val="heading 1"/></w:style>'
    styles = f"<w:styles {NAMESPACE}>{heading}</w:styles>"

    def relation(kind: str, target: str) -> str:
        entry = f'<Relationship Id="r1" Type="{RELATIONS}/officeDocument/2006/relationships/{kind}" Target="{target}"/>'
        return f'<Relationships xmlns="{RELATIONS}/package/2006/relationships">{entry}</Relationships>'

    return packed(
        **{
            "[Content_Types].xml": kinds,
            "_rels/.rels": relation("officeDocument", "word/document.xml"),
            "word/_rels/document.xml.rels": relation("styles", "styles.xml"),
            "word/styles.xml": styles,
            "word/document.xml": f"<w:document {NAMESPACE}><w:body>{body}</w:body></w:document>",
        }
    )


def epub() -> bytes:
    container = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="a.opf"/></rootfiles></container>'  # noqa: E501
    content = '<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest><item id="one" href="one.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="one"/></spine></package>'  # noqa: E501
    page = "<html><body><h1>Wind</h1><p>The wind turns.</p></body></html>"
    return packed(**{"META-INF/container.xml": container, "a.opf": content, "one.xhtml": page})


@pytest.mark.skipif(not INSTALLED, reason="the extra `office` is not installed")
@pytest.mark.parametrize(("name", "data"), [("a.docx", docx()), ("a.epub", epub())], ids=["docx", "epub"])
def test_a_file_is_one_document(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    (document,), listing = read(tmp_path)
    assert "# Wind\n\nThe wind turns." in document.text and not listing.skipped
    assert name != "a.docx" or "| calm | 2 |" in document.text


@pytest.mark.skipif(INSTALLED, reason="the extra `office` is installed")
@pytest.mark.parametrize("name", ["a.docx", "a.epub"])
def test_without_the_extra_a_file_is_left_out_and_the_reason_names_it(name, tmp_path):
    (tmp_path / name).write_bytes(docx())
    (tmp_path / "b.md").write_text(TEXT)
    (document,), listing = read(tmp_path)
    assert document.text == TEXT and "pip install 'longpo_ops[office]'" in next(iter(listing.skipped))


def lying(data: bytes, size: int) -> bytes:
    """An archive of one member whose directory says that it has `size` bytes."""
    place = data.index(b"PK\1\2")
    return data[: place + 24] + struct.pack("<I", size) + data[place + 28 :]


def test_a_bomb_is_told_by_its_own_word_and_by_what_comes_out(monkeypatch):
    monkeypatch.setattr(office, "UNPACKED", 1 << 20)
    monkeypatch.setattr(office, "PIECE", 1 << 16)
    large = packed(a=b"\0" * (1 << 21))
    assert len(large) < 4096 and is_bomb(io.BytesIO(large))
    assert not is_bomb(io.BytesIO(packed(a=b"\0" * (1 << 20))))
    monkeypatch.setattr(office, "MEMBERS", 2)
    assert is_bomb(io.BytesIO(packed(a=b"", b=b"", c=b"")))
    with pytest.raises(zipfile.BadZipFile):  # no more comes out than the directory says, and the sum is wrong then
        is_bomb(io.BytesIO(lying(large, 1 << 10)))


def test_a_bomb_is_left_out_before_a_parser_sees_it(tmp_path):
    (tmp_path / "a.docx").write_bytes(lying(packed(a=b"x"), 600 << 20))
    assert read(tmp_path)[1].skipped == {str(BOMB): 1}
