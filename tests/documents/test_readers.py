"""Reading every format: what a text is, and what is left out and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from longpo_ops.documents import Listing, find_files, read_documents
from longpo_ops.documents.layout import NO_TEXT
from longpo_ops.documents.refused import PACKED
from tests.documents.writing import pdf

TEXT = "# Wind\n\nThe wind turns.\n\nIt is cold.\n"


def read(*sources, column="text", max_tokens=None) -> tuple[list, Listing]:
    listing = Listing()
    return list(read_documents(find_files(sources), listing, column, max_tokens)), listing


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def in_short(value) -> str | None:
    """How a parameter is named: a compressed file holds the time."""
    return f"{len(value)} bytes" if isinstance(value, bytes) else None


def parquet(path: Path, **columns) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


HTML = """<html><head><title>t</title><style>x</style></head><body><nav>menu</nav><h2>Wind &amp; rain</h2>
<p>The <b>wind</b>&nbsp;turns <a href="x">here</a>.</p><script>alert(1)</script><pre>a = 1\n\nb = 2</pre></body></html>"""


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", TEXT.encode(), TEXT),
        ("a.md", TEXT.replace("\n", "\r\n").encode("utf-8-sig"), TEXT),
        ("a.tex", TEXT.encode("utf-16"), TEXT),
        ("b.tex", TEXT.encode("utf-32"), TEXT),
        ("c.tex", ("\ufeff" + TEXT).encode("utf-32-be"), TEXT),
        ("a.htm", HTML.encode("utf-32"), "## Wind & rain\n\nThe **wind** turns here.\n\n```\na = 1\n\nb = 2\n```"),
        ("notes", TEXT.encode(), TEXT),
        ("a.txt.gz", gzip.compress(TEXT.encode()), TEXT),
        ("a.md.zst", zstd(TEXT.encode()), TEXT),
        ("a.HTML", HTML.encode(), "## Wind & rain\n\nThe **wind** turns here.\n\n```\na = 1\n\nb = 2\n```"),
        ("a.pdf", pdf("The wind turns."), "The wind turns."),
        ("no suffix", pdf("The wind turns."), "The wind turns."),
        ("a.pdf.gz", gzip.compress(pdf("The wind turns.")), "The wind turns."),
    ],
    ids=in_short,
)
def test_a_file_is_one_document(name, data, expected, tmp_path):
    (tmp_path / name).write_bytes(data)
    (document,), listing = read(tmp_path)
    assert (document.text, document.source, listing.skipped) == (expected, name, {})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_records_are_documents(suffix, tmp_path):
    texts = [f"text {i}\u2028\nwith lines" for i in range(40)]
    path = tmp_path / f"records{suffix}"
    lines = "".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)).encode()
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}
    if suffix == ".parquet":
        parquet(path, id=range(40), body=texts)
    else:
        path.write_bytes(pack[suffix](lines))
    found, listing = read(path, column="body")
    assert [document.text for document in found] == texts and listing.found == 40
    assert found[6].source == f"records{suffix}:7"
    assert 0 <= found[0].position <= found[-1].position <= 1


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"", "empty"),
        ("a.md", b" \n\t\n", "empty"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "binary file"),
        ("a.html", b"\0\1\2<p>", "binary file"),
        ("a.txt", "Dünen".encode("latin-1"), "not UTF-8"),
        ("a.gz", b"no gzip at all", "unreadable (BadGzipFile)"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-12], "unreadable (EOFError)"),
        ("a.txt.zst", b"no zstd at all", "unreadable (OSError)"),
        ("a.txt.zst", zstd(TEXT.encode() * 9)[:-9], "unreadable (OSError)"),
        ("a.pdf", b"%PDF-1.4 broken", "unreadable (PdfiumError)"),
        ("a.pdf", pdf(""), str(NO_TEXT)),
        ("a.txt.gz.gz", gzip.compress(gzip.compress(TEXT.encode())), str(PACKED)),
        ("a.parquet", b"PAR1 broken", "unreadable (ArrowInvalid)"),
        ("a.jsonl", b"{broken\n", "no valid JSON"),
        ("a.jsonl", b"[1]\n", "no JSON object"),
        ("a.jsonl", b'{"txt": "x"}\n', "no text in column 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "no text in column 'text'"),
        ("a.jsonl", b'{"text": " "}\n', "empty"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "broken text encoding"),
        ("a.txt.gz", gzip.compress(b"a b " * 1_000_000), "longer than the target"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "' + b"a b " * 1_000_000 + b'"}\n'), "longer than the target"),
    ],
    ids=in_short,
)
def test_what_cannot_be_read_is_counted_and_the_rest_goes_on(name, data, reason, tmp_path):
    (tmp_path / name).write_bytes(data)
    (tmp_path / "z.txt").write_text(TEXT)
    found, listing = read(tmp_path, max_tokens=1000)
    assert [document.text for document in found] == [TEXT]
    assert listing.skipped == {reason: 1}


def test_good_records_beside_bad_ones_are_kept(tmp_path):
    records = [b'{"text": "one"}', b"{", b"", b'{"text": "' + b"x" * 9000 + b'"}', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(records))
    parquet(tmp_path / "b.parquet", text=["three", None, "one"])
    found, listing = read(tmp_path, max_tokens=10)
    assert [(d.text, d.source) for d in found] == [("one", "a.jsonl:1"), ("two", "a.jsonl:5"), ("three", "b.parquet:1")]
    assert listing.skipped == {
        "no valid JSON": 1, "longer than the target": 1, "no text in column 'text'": 1, "duplicate": 1
    }  # fmt: skip


def test_a_row_that_no_parser_takes_is_left_out_alone_and_named(tmp_path):
    deep, long = b'{"text": ' + b"[" * 200_000, b'{"n": ' + b"9" * 5000 + b', "text": "x"}'
    rows = [b'{"text": "one"}', deep, long, b'{"text": "\\ud800"}', b'{"text": "two", "n": NaN}', b'{"text": {"a": 1}}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*rows, b'{"text": "three"}']))
    found, listing = read(tmp_path)
    assert [(d.text, d.source) for d in found] == [("one", "a.jsonl:1"), ("two", "a.jsonl:5"), ("three", "a.jsonl:7")]
    assert listing.skipped == {"no valid JSON": 2, "broken text encoding": 1, "no text in column 'text'": 1}
    assert listing.first == {
        "no valid JSON": "a.jsonl:2", "broken text encoding": "a.jsonl:4", "no text in column 'text'": "a.jsonl:6"
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd])
def test_rows_are_in_the_encoding_of_their_mark(encoding, pack, tmp_path):
    texts = ["\u010a\u0a0d one", "two", "x" * 9000, "three"]  # the first has bytes of line breaks in its characters
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts)
    name = {bytes: "a.jsonl", gzip.compress: "a.jsonl.gz", zstd: "a.jsonl.zst"}[pack]
    (tmp_path / name).write_bytes(pack(rows.encode(encoding)))
    found, listing = read(tmp_path, max_tokens=10)
    assert [d.text for d in found] == [texts[0], "two", "three"] and listing.skipped == {"longer than the target": 1}
    assert found[-1].position > 0.999 or name != "a.jsonl"  # all but the mark
