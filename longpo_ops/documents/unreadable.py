"""Why a file or a record has no text: what every reader returns in a text's place, and listing.py counts.

Tests: tests/documents/test_readers.py.
"""

from __future__ import annotations

NO_LIMIT = 1 << 62  # bytes


class Unreadable(str):
    """Why there is no text: the short form that is counted."""


TOO_LONG, BINARY, EMPTY = Unreadable("longer than the target"), Unreadable("binary file"), Unreadable("empty")
