"""benchmarks/losses/threads.py on tiny cases: every line is timed with both numbers of threads, and judged by the product."""

import json

import pytest

from benchmarks.losses import threads
from benchmarks.losses.threads import PRODUCT, main, missed


def row(candidate, share):
    return {"case": "ce-2k", "candidate": candidate, "share": share}


@pytest.mark.parametrize("case", ["tiny", "tiny-preference"])
def test_every_line_is_timed_with_both(case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "LEAST", 0.0)  # tiny products gain nothing
    assert main([case, "--repeats", "2", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("threads-*.json")
    rows = json.loads(file.read_text())["rows"]
    assert [each["candidate"] for each in rows] == [PRODUCT, "longpo_ops (cpu)"] and rows[0]["share"] == 1
    assert all(len(each[name]) == 2 for each in rows for name in ("one_thread_seconds_runs", "seconds_runs"))
    assert f"| {case} | longpo_ops (cpu) |" in capsys.readouterr().out


def test_a_loss_that_gains_less_than_the_product_is_told():
    assert missed([row(PRODUCT, 1.0), row("longpo_ops (cpu)", 0.951)]) == []
    assert missed([row("longpo_ops (cpu)", 0.9)]) == [
        "ce-2k, longpo_ops (cpu): 0.90 of a plain product's gain, at least 0.95 required"
    ]
