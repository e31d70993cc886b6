"""benchmarks/training/trl_dpo.py at a tiny size: all trainers agree with each other and with float64, a difference shows."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.stamp import ROOT
from benchmarks.training import trl_dpo
from benchmarks.training.trl_dpo import FLASH, FUSED, LONGPO, SIDES, TRL, Case, compare, measure, missed, perform

pytest.importorskip("trl")


@pytest.fixture(scope="module")
def row() -> dict:
    def here(module: str, flag: str, name: str, side: str, python: str) -> dict:
        if side == FLASH:
            raise RuntimeError("ImportError: no flash_pref here")
        told = perform(name, side)
        return told | {
            "peak_bytes": max(1, told.get("peak_bytes", 0))
        }  # 0 where an earlier test left memory to take it from

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trl_dpo.CASES, "tiny", Case(24, 6, 16, 1, 2, 50, steps=1))
        patch.setattr(trl_dpo, "fresh", here)
        return measure("tiny", 1, Path(__file__))


def test_all_trainers_have_the_same_losses_and_are_right(row):
    for side in (TRL, FUSED, LONGPO):
        told = row["sides"][side]
        assert told["seconds"] > 0 and len(told["rounds"][0]["losses"]) == 2
        assert told["errors"]["logps"] < 1e-4 and told["errors"]["norm"] < 1e-4, (side, told)
    assert row["sides"][FLASH] == {"status": "failed: ImportError: no flash_pref here"}


def test_a_wrong_log_prob_shows_in_the_errors(row):
    told = row["sides"][LONGPO]["rounds"][0]
    wrong = told | {"first": {"logps": [told["first"]["logps"][0], told["first"]["logps"][1] - 0.5], "norm": 0.0}}
    errors = trl_dpo.summary([wrong], [told], row["truth"])["errors"]
    assert errors["logps"] == pytest.approx(0.5, abs=1e-3) and errors["norm"] == 1


def test_results_are_written_and_missed_targets_told(row, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl_dpo, "measure", lambda *given: row)
    code = trl_dpo.main(["--cases", "tiny", "--out", str(tmp_path)])
    (file,) = tmp_path.glob("trl-dpo-*.json")
    result, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert code == bool(missed(row)) and result["rows"][0]["shape"]["prompt"] == 24
    for side in SIDES:
        assert f"| 24 + 2 x 6 | 1 x 16, V 50 | {side} |" in printed
    slow = {key: {**told, "of_trl": {"seconds": 0.13, "peak_bytes": 0.1}} for key, told in row["sides"].items()}
    assert missed({**row, "sides": slow}) == ["tiny: LongPOTrainer: seconds is 0.130 of TRL's, at most 0.125 wanted"]
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/measured.md", tmp_path / "docs")
    trl_dpo.into_docs(result, file.stem, tmp_path)
    page = (tmp_path / "docs/measured.md").read_text()
    assert (
        f"{file.name}](../benchmarks/results/{file.name})" in page
        and f"| 24 + 2 x 6 | 1 x 16, V 50 | {FLASH} |" in page
    )


def test_without_an_environment_of_its_own_flash_pref_is_said_to_be_missing(monkeypatch, row):
    rounds = {side: row["sides"].get(side, {}).get("rounds", [{}])[0] for side in SIDES} | {"float64": row["truth"]}
    monkeypatch.setattr(trl_dpo, "fresh", lambda module, flag, name, side, python: rounds[side])
    told = measure("tiny", 1, Path("no/such/python"))["sides"][FLASH]["status"]
    assert told.startswith("not installed") and (ROOT / "requirements/flash.txt").exists()


def test_other_losses_are_told():
    compare(FUSED, [0.6931, 0.5], [0.6932, 0.5])
    for wrong in ([0.6931, 0.51], [0.6931]):
        with pytest.raises(RuntimeError, match="the trainings differ"):
            compare(FUSED, [0.6931, 0.5], wrong)
