"""benchmarks/loop/demo.py: what it makes of its runs' numbers, on those of the committed result. No demo is run."""

import json

from benchmarks.loop.demo import draw_rows, methods, summary, table
from benchmarks.stamp import RESULTS


def test_means_and_spreads_are_those_of_the_committed_runs(tmp_path):
    content = json.loads(sorted(RESULTS.glob("*-demo-*.json"))[-1].read_text())
    rows = summary([row for run in content["runs"] for row in run["rows"]], "label")
    assert json.loads(json.dumps(rows)) == content["rows"]
    assert methods([row for run in content["runs"] for row in run["methods"]]) == content["methods"]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and all(line.count("|") == lines[0].count("|") for line in lines)
    draw_rows(rows, len(content["runs"]), tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
