"""Python snippets run as printed, each in a process of its own: all of the README, and those of docs/ that are fenced
as ```python runnable. The others (a signature, something that needs a GPU or a model) must at least compile.
"""

import re
import warnings
from pathlib import Path

import pytest

from .processes import run

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```python[ \t]*(.*?)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def snippets():
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            name = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}"
            yield pytest.param(page.name == "README.md" or "runnable" in found[1], found[2], id=name)


SNIPPETS = list(snippets())


def test_the_readme_shows_how_to_use_it():
    assert any(snippet.id.startswith("README.md") for snippet in SNIPPETS)


@pytest.mark.parametrize("runnable, code", SNIPPETS)
def test_snippet_runs_as_printed(runnable, code, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SyntaxWarning)
        compile(code, "snippet", "exec")
    if not runnable:
        return
    done = run(f"import os\nos.chdir({str(tmp_path)!r})\n{code}")
    assert done.returncode == 0, done.stderr
