"""benchmarks/training/shared_prefix.py and tree.py at a tiny size: both sides run, agree, and a difference is seen."""

import pytest
import torch

from benchmarks.training import shared_prefix, tree
from benchmarks.training.shared_prefix import Case, compare, perform


def test_both_steps_are_measured_and_have_the_same_gradients(tmp_path, monkeypatch):
    case = Case(prefix=24, tail=6, width=16, layers=1, heads=2, vocab=50, steps=1)
    monkeypatch.setitem(shared_prefix.CASES, "tiny", case)
    files = {side: tmp_path / f"{side}.pt" for side in ("two", "shared")}
    for side, file in files.items():
        result = perform("tiny", side, str(file))
        assert result["seconds"] > 0 and result["weight_bytes"] > 0
    assert compare(files["two"], files["shared"]) < 1e-4
    loss, gradients = torch.load(files["two"])
    name = next(iter(gradients))
    gradients[name] *= 1.01
    torch.save((loss, gradients), tmp_path / "wrong.pt")
    with pytest.raises(RuntimeError, match="the two steps differ"):
        compare(files["two"], tmp_path / "wrong.pt")


def test_a_tree_and_separate_sequences_are_measured_and_have_the_same_gradients(tmp_path, monkeypatch):
    case = tree.Tree(
        prefix=24, tail=6, width=16, layers=1, heads=2, vocab=50, steps=1, question=3, questions=2, answers=3
    )
    monkeypatch.setitem(tree.CASES, "tiny", case)
    results = {side: tree.perform("tiny", side, str(tmp_path / f"{side}.pt")) for side in ("separate", "tree")}
    assert (results["separate"]["rows"], results["tree"]["rows"]) == case.rows == (6 * 33, 24 + 2 * 3 + 6 * 6 + 5)
    assert compare(tmp_path / "separate.pt", tmp_path / "tree.pt") < 1e-4


def test_a_target_that_is_missed_is_told():
    row = {"case": "tiny", "faster": 1.69, "memory": 0.61}
    assert shared_prefix.missed([row | {"faster": 1.7, "memory": 0.6}], shared_prefix.TARGETS) == []
    assert shared_prefix.missed([row], shared_prefix.TARGETS) == [
        "tiny: faster 1.69, at least 1.7 required", "tiny: memory 0.61, at most 0.6 required"
    ]  # fmt: skip
    assert len(shared_prefix.missed([{"case": "4x4", "faster": 7.9}], tree.TARGETS)) == 1
