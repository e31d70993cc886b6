"""benchmarks/training/trl_dpo.py at a tiny size: both trainers run and agree, and a difference between them is seen."""

import json

import pytest

from benchmarks.training import trl_dpo
from benchmarks.training.trl_dpo import Case, compare, measure, perform

pytest.importorskip("trl")


def test_both_trainers_are_measured_and_have_the_same_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trl_dpo.CASES, "tiny", Case(24, 6, 16, 1, 2, 50, steps=1))

    def here(module: str, flag: str, name: str, side: str) -> dict:
        told = perform(name, side)
        return told | {"peak_bytes": max(1, told["peak_bytes"])}  # 0 where an earlier test left memory to take it from

    monkeypatch.setattr(trl_dpo, "fresh", here)
    row = measure("tiny", 1)
    assert row["seconds"]["ratio"] > 0 and len(row["rounds"]["ours"][0]["losses"]) == 2
    monkeypatch.setattr(trl_dpo, "measure", lambda name, rounds: row)
    code = trl_dpo.main(["--cases", "tiny", "--rounds", "1", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("trl-dpo-*.json")
    assert json.loads(file.read_text())["rows"][0]["shape"]["prompt"] == 24
    missed = any(row[key]["ratio"] > target for key, target in trl_dpo.TARGETS.items())
    assert code == int(missed) and "| tiny | 24 + 2 x 6 | 1 x 16, V 50 |" in capsys.readouterr().out


def test_other_losses_are_told():
    compare([0.6931, 0.5], [0.6932, 0.5])
    for wrong in ([0.6931, 0.51], [0.6931]):
        with pytest.raises(RuntimeError, match="the trainings differ"):
            compare([0.6931, 0.5], wrong)
