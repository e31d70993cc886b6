"""benchmarks/loop/evaluate.py from the command line, at a length of no account."""

import json
import subprocess
import sys

from benchmarks.stamp import ROOT
from longpo_ops.evaluate.tasks import TASKS
from tests.evaluate.readers import tokenizer


def test_it_writes_a_dated_result(tmp_path):
    tokenizer().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-m", "benchmarks.loop.evaluate", "--length", "6000", "--model", str(tmp_path / "tiny")]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("*-evaluate-*.json")
    content = json.loads(path.read_text())
    assert path.name.startswith(content["date"][:10]) and content["cores"] == 1
    assert [row["task"] for row in content["rows"]] == list(TASKS)
    assert all(row["tokens"] <= 6000 and row["seconds"] > 0 for row in content["rows"])
    assert all(f"| {name} |" in done.stdout for name in TASKS)
