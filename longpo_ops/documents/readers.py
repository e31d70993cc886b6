"""One file to texts: plain text, Markdown, LaTeX, HTML, PDF, JSON Lines, Parquet, and .gz or .zst of all but the last.

Any other suffix is read as plain text; what is not text is told by its bytes. Whatever fails gives an `Unreadable` in
the text's place, never an exception. Memory: one text, or a group of Parquet records; compressed files are read no
further than the limit, so a small file cannot unpack into a huge one. Not covered: office files, pictures of text,
encodings other than UTF-8, and UTF-16 and UTF-32 with their byte-order marks.
"""

from __future__ import annotations

import gzip
import io
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ..text import decoded, marked_encoding

RECORDS = 16  # of Parquet, read at a time
NO_LIMIT = 1 << 62
Found = Iterator[tuple[int | None, "str | Unreadable", float]]  # record, text, how much of the file lies before its end


class Unreadable(str):
    """Why there is no text: the short form that is counted."""


TOO_LONG, BINARY, EMPTY = Unreadable("longer than the target"), Unreadable("binary file"), Unreadable("empty")


def read_texts(file: Path, column: str = "text", limit: int | None = None) -> Found:
    """Yield (record, text, share) for every text in a file; the record's number is None for a file that is one document.

    column: of JSON Lines and Parquet. limit: bytes of the longest text that is wanted.
    """
    limit = NO_LIMIT if limit is None else limit
    packed = file.suffix.lower() in OPENERS
    suffix = Path(file.stem).suffix.lower() if packed else file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet(file, column, limit)
            return
        with closing(OPENERS.get(file.suffix.lower(), _plain)(file)) as stream:
            if suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(stream, column, limit, None if packed else max(1, file.stat().st_size))
                return
            text = _checked(FORMATS.get(suffix, _text)(stream, limit), limit)
    except ImportError as error:
        raise ValueError(f"{file.name} cannot be read: {error}; pip install 'longpo_ops[generate]'") from None
    except MemoryError:
        raise
    except Exception as error:  # parsers of foreign files raise whatever they like
        text = Unreadable(f"unreadable ({type(error).__name__})")
    yield None, text, 1.0


def _checked(text: str, limit: int) -> str:
    if isinstance(text, Unreadable):
        return text
    if len(text) > limit:
        return TOO_LONG
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair
        return Unreadable("broken text encoding")
    return text if text.strip() else EMPTY


def _plain(file: Path):
    return open(file, "rb")


def _zstd(file: Path):
    import pyarrow  # the package zstandard takes the end of a cut file for its end

    return io.BufferedReader(pyarrow.input_stream(str(file), compression="zstd"))


OPENERS = {".gz": gzip.open, ".zst": _zstd}


def _bytes(stream, limit: int) -> bytes | None:
    """The whole stream, or None where it holds more than `limit` bytes."""
    if limit == NO_LIMIT:
        return stream.read()
    data = stream.read(limit + 1)
    return None if len(data) > limit else data


def _decode(data: bytes) -> str:
    """UTF-8, or what a byte-order mark says, with plain newlines."""
    encoding = marked_encoding(data)
    if encoding is None and b"\0" in data[:8192]:
        return BINARY
    return _newlines(data, encoding or "utf-8")


def _newlines(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return BINARY if b"\0" in data else Unreadable("not UTF-8")


def _text(stream, limit: int) -> str:
    data = _bytes(stream, limit)
    return TOO_LONG if data is None else _decode(data)


def _html(stream, limit: int) -> str:
    """As Markdown: headings, lists, tables and code keep their structure; scripts, styles and pictures go."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    data = _bytes(stream, min(NO_LIMIT, 8 * limit))  # markup may outweigh the text
    if data is None:
        return TOO_LONG
    encoding = marked_encoding(data)
    if encoding is None and b"\0" in data[:8192]:
        return BINARY
    page = data if encoding is None else _newlines(data, encoding)  # the parser takes UTF-32 for UTF-16
    if isinstance(page, Unreadable):
        return page
    soup = BeautifulSoup(page, "html.parser")
    for tag in soup(["script", "style", "noscript", "template", "head", "nav", "svg"]):
        tag.decompose()
    options = dict(heading_style="ATX", escape_asterisks=False, escape_underscores=False, escape_misc=False)
    text = MarkdownConverter(strip=["a", "img"], **options).convert_soup(soup)
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()


def _pdf(stream, limit: int) -> str:
    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it reports every repaired table
    data = _bytes(stream, min(NO_LIMIT, 64 * limit))  # pictures outweigh the text
    if data is None:
        return TOO_LONG
    reader = PdfReader(io.BytesIO(data))
    pages, length = [], 0
    for page in reader.pages:
        pages.append(page.extract_text().strip())
        length += len(pages[-1])
        if length > limit:
            return TOO_LONG
    text = "\n\n".join(page for page in pages if page)
    return text if text else Unreadable("PDF without text")


FORMATS = {".html": _html, ".htm": _html, ".xhtml": _html, ".pdf": _pdf}


def _json_lines(stream, column: str, limit: int, size: int | None) -> Found:
    bound, number, read = min(NO_LIMIT, 8 * limit), 0, 0  # a line has escapes and further columns besides the text
    width = {"utf-16": 2, "utf-32": 4}.get(marked_encoding(stream.peek(4)[:4]), 1)
    end, nothing = b"\n", b""
    if width > 1:  # among their bytes a line break is no place to cut
        stream, end, nothing = decoded(stream, "\n"), "\n", ""
    while line := stream.readline(bound):
        number, read, whole = number + 1, read + len(line), line.endswith(end) or len(line) < bound
        rest = nothing if whole else line
        while rest and not rest.endswith(end):
            rest = stream.readline(bound)
            read += len(rest)
        share = 0.0 if size is None else min(1.0, width * read / size)
        if not whole:
            yield number, TOO_LONG, share
        elif line.strip():
            yield number, _cell(line, column, limit), share


def _cell(line: bytes | str, column: str, limit: int) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # a row that is nested too deep is one bad row, too
        return Unreadable("no valid JSON")
    return _value(value.get(column), column, limit) if isinstance(value, dict) else Unreadable("no JSON object")


def _value(text, column: str, limit: int) -> str:
    return _checked(text, limit) if isinstance(text, str) else Unreadable(f"no text in column {column!r}")


def _parquet(file: Path, column: str, limit: int) -> Found:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        if column not in table.schema_arrow.names:
            yield None, Unreadable(f"no text in column {column!r}"), 1.0
            return
        number, records = 0, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=RECORDS, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, _value(text, column, limit), number / records
