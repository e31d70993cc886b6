"""benchmarks/losses/beside.py on rows of no account: every line is timed beside its plain call."""

from benchmarks.losses.beside import LINES, measure


def test_every_line_is_a_multiple_of_its_plain_call():
    found = measure(rows=3, width=4, vocab=40, repeats=1)
    assert found.keys() == LINES.keys()
    assert found["cross-entropy"][1] == found["log-probs"][1] == 1.0
    assert all(milliseconds > 0 and multiple > 0 for milliseconds, multiple in found.values())
