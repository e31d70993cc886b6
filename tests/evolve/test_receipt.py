"""A stage's receipt: peaks that begin anew with each stage, attempts that add up, nothing done after a failure."""

from __future__ import annotations

import sys

import pytest

from longpo_ops.engines.address import shown
from longpo_ops.evolve.receipt import Cost, Receipt

MIB = 2**20


@pytest.fixture
def make(tmp_path):
    def receipt(name: str) -> Receipt:
        (tmp_path / name).mkdir(exist_ok=True)
        return Receipt.open(tmp_path / name, {"seed": 0})

    return receipt


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process")
def test_each_stage_has_its_own_peak(make):
    def peak(name: str, size: int) -> int:
        receipt = make(name)
        with receipt.measured():
            bytearray(size * MIB)
        assert receipt.cost.exact
        return receipt.cost.host_bytes

    small = peak("before", 1)
    assert small + 250 * MIB < peak("large", 300) < small + 350 * MIB
    assert peak("after", 1) < small + 50 * MIB


def test_attempts_add_up_and_only_a_whole_one_is_done(make):
    receipt = make("stage")
    with pytest.raises(OSError), receipt.measured():
        raise OSError("full")
    first = make("stage")
    assert not first.done and first.cost.seconds > 0
    first.cost = Cost(100.0, 2**50)
    with first.measured():
        pass
    assert make("stage") == first
    assert first.done and first.cost.seconds > 100.0 and first.cost.host_bytes == 2**50


def test_a_stage_whose_output_is_gone_begins_again(make):
    with make("stage").measured():
        pass
    make("stage").out.rmdir()
    new = Receipt.open(make("stage").out.with_name("nowhere"), {"seed": 1})
    assert not new.done and new.cost == Cost()


def test_a_running_stage_writes_down_its_cost(make, monkeypatch):
    monkeypatch.setattr("longpo_ops.evolve.receipt.BEAT", 0.01)
    with make("stage").measured():
        seen = {make("stage").cost.seconds}
        while len(seen) < 3:
            seen.add(make("stage").cost.seconds)
            assert not make("stage").done


@pytest.mark.parametrize("judge", ["http://gw/judge-a/v1", "http://gw/sk-of-somebody/v1"])
def test_a_judge_whose_address_was_written_as_it_came_is_the_same(tmp_path, judge):
    with Receipt(tmp_path, {"judge": judge}).measured():  # as earlier versions did
        pass
    assert Receipt.open(tmp_path, {"judge": shown(judge)}).done
    for other in ("http://gw/judge-b/v1", "http://gw/sk-of-another/v1"):
        with pytest.raises(ValueError, match=r"begun with other settings .*judge") as refused:
            Receipt.open(tmp_path, {"judge": shown(other)})
        assert "sk-of" not in str(refused.value)
