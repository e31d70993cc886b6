"""benchmarks/compare.py: the filed results, shifts that are known, noise without any, and what cannot be compared."""

import copy
import json
import random

import pytest

from benchmarks.compare import LEVEL, Number, beyond, compare, main, missed_targets, numbers, report_of
from benchmarks.losses.run import together
from benchmarks.stamp import RESULTS

FILES = sorted(path.name for path in RESULTS.glob("*.json") if '"hardware"' in path.read_text())
LOSSES = "2026-11-21-cpu-x86_64-avx512_bf16-2core.json"
PREFIX = "shared-prefix-2026-11-21-x86_64-avx512_bf16-2core.json"
TRL = "trl-dpo-2026-11-28-x86_64-avx2-2core.json"
GPU = "2026-11-27-172248-gpu-check-H200.json"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def number(*values: float) -> Number:
    return Number(("rows", "seconds"), "time", list(values))


def found(old: list[float], new: list[float], of: int = 1) -> bool:
    """Whether the change is beyond noise, as one of so many numbers that are judged."""
    same = [compare(number(1.0, 1.1), number(1.0, 1.1))] * (of - 1)
    return bool(beyond([compare(number(*old), number(*new)), *same]))


@pytest.mark.parametrize("name", FILES)
def test_a_filed_result_is_within_the_noise_of_itself_and_reaches_its_targets(name):
    """So what docs claim of a result is what CI reads in it."""
    report = load(name)
    lines, worse = report_of(report, report)
    assert not worse and "0 beyond it" in lines[0] and lines[-2:] == ["0 in OLD alone", "0 in NEW alone"]
    assert numbers(report) and missed_targets(report) == []


def test_the_repeats_of_every_kind_of_file_are_found():
    """Seconds of runs, rounds of two sides, sides in rounds, and of a GPU median and fastest."""
    repeats = {name: sorted({len(each.values) for each in numbers(load(name)).values()}) for name in FILES}
    assert repeats[LOSSES] == [1, 2] and repeats[PREFIX] == [1, 3] and repeats[TRL] == [2] and repeats[GPU] == [1, 3]
    trl = numbers(load(TRL))
    (ours,) = (each for place, each in trl.items() if place[-2:] == ("ours", "seconds"))
    assert ours.kind == "time" and ours.values == [1.7316141900009825, 1.566540449999593]
    kinds = {each.kind for name in FILES for each in numbers(load(name)).values()}
    assert kinds == {"time", "memory", "error"}
    assert not [place for name in FILES for place in numbers(load(name)) if {"hardware", "targets", "ratio"} & {*place}]


def test_ten_per_cent_show_with_tight_repeats_and_not_with_loose_ones():
    assert found([1.0, 1.004, 1.002], [1.1, 1.104, 1.102], of=20)
    assert not found([1.0, 1.05, 0.96], [1.1, 1.155, 1.056], of=20)
    assert not found([1.0, 1.004], [1.1, 1.104], of=1000)  # two against two: one in a thousand lies so far apart
    assert found([5.0, 5.0, 5.0], [5.01, 5.01, 5.01]) and not found([5.0, 5.0], [5.0, 5.0])
    assert (
        compare(number(1.0), number(2.0, 2.0)).chance is None
        and compare(number(0.0, 1.0), number(1.0, 1.0)).ratio is None
    )


def test_real_repeats_show_a_shift_beyond_their_own_spread():
    """Of three rounds whose times lie 1 to 3 % apart; a result file with half of its seconds 10 % up is worse."""
    old = load(PREFIX)
    new = copy.deepcopy(old)
    for run in new["rows"][0]["two_rounds"]:
        run["seconds"] *= 1.1
    lines, worse = report_of(old, new)
    assert worse and "3 within noise, 1 beyond it" in lines[0] and "1.100" in lines[1] and "two seconds" in lines[1]
    assert report_of(new, old)[1] is False  # faster is told and is no failure
    lines, worse = report_of(load(TRL), scaled(load(TRL), "seconds", 1.1))  # whose rounds lie 5 and 10 % apart
    assert not worse and "0 beyond it" in lines[0]


def scaled(report: dict, name: str, factor: float) -> dict:
    for runs in report["rows"][0]["rounds"].values():
        for run in runs:
            run[name] *= factor
    return report


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_noise_alone_raises_an_alarm_once_in_twenty_comparisons(repeats):
    draw, alarms = random.Random(repeats), 0
    side = lambda size: number(*(size * draw.lognormvariate(0, 0.03) for _ in range(repeats)))  # noqa: E731
    for _ in range(400):
        sizes = [10.0**k for k in range(-3, 4)] * 3
        alarms += bool(beyond([compare(side(size), side(size)) for size in sizes]))
    assert 0 < alarms <= 2 * LEVEL * 400  # 20 are expected, with a deviation of 4.4


def test_a_median_and_a_fastest_run_stand_for_no_more_runs_than_three():
    row = {"what": "loss", "milliseconds": 10.0, "fastest_milliseconds": 9.8, "repeats": 13}
    (told,) = numbers({"rows": [row]}).values()
    assert told.values == [9.8, 10.0, pytest.approx(10.204, abs=1e-3)]
    (few,) = numbers({"rows": [row | {"repeats": 2}]}).values()
    (runs,) = numbers({"rows": [row | {"milliseconds_runs": [9.8, 9.9, 10.0, 10.4]}]}).values()
    assert few.values == [10.0] and runs.values == [9.8, 9.9, 10.0, 10.4]


def test_runs_of_one_process_count_once():
    """Of two rounds whose own runs are tight: what differs between processes is noise, too."""
    before, now = ({"seconds": each, "extra_bytes_runs": [8, 8]} for each in ([1.0, 1.01], [1.3, 1.31]))
    row = {"case": "ce"} | together(together(None, before), now)
    report = lambda row: {"rows": [row]}  # noqa: E731
    assert numbers(report(row))["rows", "ce", "seconds"].values == pytest.approx([1.005, 1.305])
    assert row["seconds"] == [1.0, 1.01, 1.3, 1.31] and row["extra_bytes_runs"] == [8] * 4 and row["extra_bytes"] == 8
    assert together(row, now)["seconds_rounds"] == [[1.0, 1.01], [1.3, 1.31], [1.3, 1.31]]


def test_what_is_no_longer_right_or_misses_its_target_is_worse():
    report = load(LOSSES)
    broken = copy.deepcopy(report)
    broken["rows"][4] |= {"status": "wrong: loss is off"}
    lines, worse = report_of(report, broken)
    assert worse and any("measured -> wrong: loss is off" in line for line in lines)
    trl = load(TRL)
    trl["rows"][0]["seconds"]["ratio"] = 0.21
    tree = load("tree-2026-11-28-x86_64-avx2-2core.json")
    tree["rows"][0]["faster"] = 7.9
    offload = load("2026-11-27-175207-gpu-check-H200.json")
    row = next(row for row in offload["rows"] if "times_kept" in row)
    row["times_kept"] = 1.04
    for each in (trl, tree, offload, load(LOSSES) | {"missed": ["ce-2k: 0.9 times as fast"]}):
        (missed,) = missed_targets(each)
        assert report_of(each, each)[1], missed


def run(tmp_path, old: dict, new: dict, *options: str) -> int:
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, report in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(report))
    return main([*map(str, paths), *options])


def test_from_the_command_line(tmp_path, capsys):
    old = load(PREFIX)
    new = copy.deepcopy(old)
    new["versions"]["torch"] = "2.14.0"
    assert run(tmp_path, old, new) == 0
    assert "versions differ: torch 2.13.0+cpu -> 2.14.0" in capsys.readouterr().out
    for each in new["rows"][0]["shared_rounds"]:
        each["peak_bytes"] *= 2
    assert run(tmp_path, old, new) == 1
    assert "memory: tiny shared peak_bytes" in capsys.readouterr().out


def test_two_processors_are_refused_unless_asked_for(tmp_path, capsys):
    old, new = load(LOSSES), load("2026-11-21-cpu-1-thread-x86_64-avx512_bf16-2core.json")
    assert run(tmp_path, old, new) == 0  # of one host; what is of one thread is in one file alone
    assert "0 numbers compared by their repeats" in capsys.readouterr().out
    other = load(TRL)
    with pytest.raises(SystemExit) as refused:
        run(tmp_path, old, other)
    assert (
        refused.value.code == 2 and "features ['avx2', 'avx512f', 'avx512_bf16'] -> ['avx2']" in capsys.readouterr().err
    )
    assert run(tmp_path, old, other, "--across") == 0 and "hosts differ" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tmp_path, old, {"rows": []})
    assert "says no hardware and versions" in capsys.readouterr().err


def test_a_target_of_one_side_is_read():
    side = {"of_trl": {"seconds": 0.13, "peak_bytes": 0.1}}
    report = {"targets": {"LongPOTrainer": {"seconds": 0.125, "peak_bytes": 0.15}}, "rows": [{"case": "dpo-2k"}]}
    report["rows"][0]["sides"] = {"LongPOTrainer": side}
    (missed,) = missed_targets(report)
    assert "LongPOTrainer seconds 0.130 of TRL's, at most 0.125" in missed
    side["of_trl"]["seconds"] = 0.12
    assert missed_targets(report) == []
