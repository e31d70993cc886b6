"""One file to texts: plain text, Markdown, LaTeX, HTML, PDF, DOCX, EPUB, JSON Lines, Parquet; .gz or .zst of all but the last.

Any other suffix is read as plain text, unless the first bytes say PDF or what refused.py names; what is not text is told by
its bytes. Whatever fails gives an `Unreadable` in the text's place, never an exception. PDF, DOCX and EPUB are read in a
process of their own (apart.py). Memory: one text, or a group of Parquet records; compressed files are read no further than
the limit, so a small file cannot unpack into a huge one. Not covered: pictures of text, encodings other than UTF-8, and
UTF-16 and UTF-32 with their byte-order marks (an HTML page may declare its own).
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from ..text import decoded, marked_encoding
from .apart import Apart
from .refused import HEAD, OFFICE, refused
from .unreadable import BINARY, EMPTY, NO_LIMIT, TOO_LONG, Unreadable

RECORDS = 16  # of Parquet, read at a time
PACKED = 512 << 20  # bytes of a PDF, DOCX or EPUB that came in .gz or .zst
APART = {
    ".pdf": "generate",
    ".docx": "office",
    ".epub": "office",
}  # read in a process of their own, and the extra that it takes
Found = Iterator[tuple[int | None, "str | Unreadable", float]]  # record, text, how much of the file lies before its end


def read_texts(file: Path, column: str = "text", limit: int | None = None, apart: Apart | None = None) -> Found:
    """Yield (record, text, share) for every text in a file; the record's number is None for a file that is one document.

    column: of JSON Lines and Parquet. limit: bytes of the longest text that is wanted. apart: the process for PDF and office
    files, where many are read. Raises ValueError where a package of the extra `generate` is missing.
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
            text = _checked(_document(stream, None if packed else file, suffix, limit, apart), limit)
    except ImportError as error:
        raise ValueError(f"{file.name} cannot be read: {error}; pip install 'longpo_ops[generate]'") from None
    except MemoryError:
        raise
    except Exception as error:  # parsers of foreign files raise whatever they like
        text = Unreadable(f"unreadable ({type(error).__name__})")
    yield None, text, 1.0


def _document(stream, file: Path | None, suffix: str, limit: int, apart: Apart | None) -> str:
    """The text of a file that is one document. file: its path, unless it is packed."""
    head = stream.peek(HEAD)[:HEAD]
    if suffix in APART or head.startswith(b"%PDF-"):
        return _apart(stream, file, suffix if suffix in APART else ".pdf", limit, apart or Apart())
    return refused(suffix, head) or FORMATS.get(suffix, _text)(stream, limit)


def _apart(stream, file: Path | None, suffix: str, limit: int, apart: Apart) -> str:
    if refused("", stream.peek(HEAD)[:HEAD]) is OFFICE:  # encrypted, or an old one under a new name
        return OFFICE
    bound = min(PACKED, 64 * limit)  # pictures outweigh the text
    source = file if file is not None else _bytes(stream, bound)
    if source is None:
        return TOO_LONG if bound < PACKED else Unreadable("packed file of more than 512 MiB")
    try:
        return apart.read(suffix, source, limit)
    except ImportError as error:
        if APART[suffix] == "generate":
            raise
        return Unreadable(f"DOCX or EPUB without a reader ({error}): pip install 'longpo_ops[{APART[suffix]}]'")


def _checked(text: str, limit: int) -> str:
    if isinstance(text, Unreadable):
        return text
    if len(text) > limit:
        return TOO_LONG
    try:
        _ = text.isascii() or text.encode()
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
    try:
        return data.decode(encoding or "utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return BINARY if b"\0" in data else Unreadable("not UTF-8")


def _text(stream, limit: int) -> str:
    data = _bytes(stream, limit)
    return TOO_LONG if data is None else _decode(data)


def _html(stream, limit: int) -> str:
    """As Markdown: headings, lists, tables and code keep their structure; scripts, styles and pictures go."""
    from .markup import as_markdown, decode_page

    data = _bytes(stream, min(NO_LIMIT, 8 * limit))  # markup may outweigh the text
    page = TOO_LONG if data is None else decode_page(data)
    return page if isinstance(page, Unreadable) else as_markdown(page)


FORMATS = {".html": _html, ".htm": _html, ".xhtml": _html}


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
