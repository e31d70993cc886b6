"""The example of docs/data.md runs as it stands, beside a model folder of that name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_documented_example_runs(make_tokenizer, tmp_path, monkeypatch, capsys):
    make_tokenizer("qwen2_5").save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    example, *_ = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    exec(compile(example, str(DOC), "exec"), {})
    out = capsys.readouterr().out
    rows, apart = map(int, re.search(r"\('harbour-1',\) rows: (\d+) tokens if packed apart: (\d+)", out).groups())
    assert rows < 0.52 * apart and "1 of 1 records kept" in out


def test_every_reason_is_documented():
    """The reasons of BadRecord(id, field, reason, advice) and of bad(field, reason, advice)."""
    reasons = set()
    for path in (DOC.parents[1] / "longpo_ops" / "data").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "BadRecord":
                reasons.add(getattr(node.args[2], "value", None))
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "bad":
                reasons.add(node.args[1].value)
    reasons.discard(None)  # bad() itself hands its reason on
    assert len(reasons) > 20
    assert [reason for reason in reasons if f"`{reason}`" not in DOC.read_text()] == []
