"""docs/generate.md tells of every reason that is counted, and of every option's default that it names."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from longpo_ops.generate import commands

PACKAGE = Path(commands.__file__).parents[1]
DOC = (PACKAGE.parent / "docs/generate.md").read_text()

REASONS = {
    **{
        f"documents/{name}.py": r'(?:Unreadable\(f?"|TOO_LONG, BINARY, EMPTY = Unreadable\(")([a-zA-Z0-9\- ]+)'
        for name in ("apart", "layout", "markup", "office", "pdf", "readers", "refused", "unreadable")
    },
    "documents/listing.py": r'skip\("([a-z ]+)"',
    "generate/selection.py": r'(?:TOO_SHORT = "|REST = "|skip\(")([a-z ]{8,})"',
    "generate/steps.py": r'(?:counts\["|self\.fail\(failure, "|CUT = "|(?:else|score,) ")([a-z\- ]+)"',
    "generate/makers.py": r'"((?:questions: |unparsable )[a-z ]+)"',
    "generate/filters.py": r'return "([a-z\- ]+)"',
    "engines/server.py": r'RequestFailed\("([a-z ]+)"',
    "engines/replies.py": r'RequestFailed\(\s*"([a-z ]+)"',
    "engines/__init__.py": r'RequestFailed\(f"([a-z ]+)',
}


def reasons(*files: str) -> set[str]:
    """What the code of these files counts; of all files without any."""
    return {
        reason.strip()
        for file in files or REASONS
        for reason in re.findall(REASONS[file], (PACKAGE / file).read_text())
    }


def test_every_counted_reason_is_documented():
    found = reasons()
    assert {"unreadable", "duplicate", "shorter than one chunk", "unparsable question list", "refusal", "the engine failed",
            "no reference log-probs", "shorter than wanted", "PDF without text", "near-empty",
            "the answer is no text", "the answer ended with"} <= found  # fmt: skip
    assert [reason for reason in found if f"`{reason}" not in DOC] == []


def test_every_option_in_the_documentation_exists():
    known = {f"--{name.replace('_', '-')}" for name in inspect.signature(commands.generate).parameters}
    for function in (commands.show, commands.stats, commands.validate, commands.merge):
        known |= {f"--{name}".replace("_", "-") for name in inspect.signature(function).parameters}
    commands_text = re.findall(r"longpo (?:generate|pairs)(?:.|\\\n)*?(?=\n[^ ]|\n\n|`)", DOC)
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(commands_text)))
    assert len(used) > 8 and used - known == set()
