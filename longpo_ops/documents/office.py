"""DOCX and EPUB to Markdown, by markitdown: headings, lists, tables and links' words; pictures go.

Both are zip archives, which can hold a thousand times their size. So they are measured before a parser sees them: first what
the archive says of itself, then what comes out of it, read piece by piece and thrown away.
"""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

from .unreadable import Unreadable

UNPACKED = 512 << 20  # bytes that an archive may unpack to
MEMBERS = 20_000
PIECE = 1 << 20
BOMB = Unreadable("zip archive that unpacks to more than 512 MiB or 20,000 files")
PICTURE = re.compile(r"!\[([^\]]*)\]\([^)]*\)")


def read_office(source: Path | bytes, suffix: str) -> str:
    """The text of a .docx or .epub, or BOMB. Raises ImportError without markitdown, and what it and zipfile raise."""
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as stream:
        if is_bomb(stream):
            return BOMB
        from markitdown import MarkItDown

        stream.seek(0)
        text = MarkItDown(enable_plugins=False).convert_stream(stream, file_extension=suffix).markdown
    return PICTURE.sub(r"\1", text.replace("\0", "")).strip()


def is_bomb(stream) -> bool:
    """Whether an archive unpacks to more than UNPACKED bytes, by its own word or by what comes out. Memory: PIECE."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if len(members) > MEMBERS or sum(member.file_size for member in members) > UNPACKED:
            return True
        total = 0
        for member in members:
            with archive.open(member) as unpacked:
                while piece := unpacked.read(PIECE):
                    total += len(piece)
                    if total > UNPACKED:
                        return True
    return False
