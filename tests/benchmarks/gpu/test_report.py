"""benchmarks/gpu/report.py on reports that are made up here: their figures in the pages, failures first, cut off anywhere."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.gpu import report, tables
from benchmarks.gpu.check import Report
from benchmarks.stamp import ROOT

MIB, GIB = 1 << 20, 1 << 30
SMALL, LARGE = "N=4096 H=4096 V=128256", "N=65536 H=4096 V=128256"
HEAD = {
    "date": "2026-12-01T10:20:30+00:00",
    "command": "python -m benchmarks.gpu.check --deadline 470",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "changed_files": 0,
    "hardware": {"gpu": {"name": "NVIDIA H100 80GB HBM3", "bytes": 85_017_624_576, "count": 1}},
    "versions": {"python": "3.12.3", "torch": "2.11.0+cu130", "triton": "3.6.0", "numpy": "2.3.1"},
    "rehearsal": False,
    "card": "H100",
    "deadline": 470.0,
}


def row(question: str, what: str, case: str, status: str, backend: str = "", **numbers) -> dict:
    times = {} if status.startswith("skipped") else {"took": 0.5, "expected": 0.3, "compiled": 0}
    return {"question": question, "what": what, "backend": backend, "case": case, "status": status} | times | numbers


def timed(ms: float, tflops: float, share: float, extra: int, delivered: int) -> dict:
    numbers = {"milliseconds": ms, "fastest_milliseconds": ms, "repeats": 5, "tflops": tflops}
    return numbers | {"fraction_of_matmul": share, "peak_extra_bytes": extra, "delivered_gradient_bytes": delivered}


ROWS = [
    row("tiles", "rows", "V=4099, bfloat16", "passed", "triton", error=1e-3, allowed=4e-3, tightest="gradient_"),
    row("tiles", "rows", "V=128256, bfloat16", "passed", "triton", error=3e-3, allowed=4e-3, tightest="logps"),
    row("tiles", "rows", "bias | scale", "failed: error 2.000e-02,\nallowed 4.000e-03", "cuda", error=0.02, allowed=4e-3),
    row("tiles", "divergence_", "jsd", "passed", "triton", error=0.0, allowed=0.0, compiled=3, took=6.02,
        first="failed: error 1.000e-02, allowed 9.000e-03"),
    row("attention", "shared-prefix attention", "one pair", "skipped: no time: it would take 3 s", "cuDNN"),
    row("attention", "shared-prefix attention", "two pairs", "skipped: no time: it would take 12 s", "cuDNN"),
    row("loss", "ceiling: copy", "(2093, 128256) float32", "measured", milliseconds=0.71239, gigabytes_per_second=3014.9),
    row("loss", "fused_preference_loss", SMALL, "measured", "triton",
        **timed(18.4411, 700.099, 0.94999, 3100 * MIB, 1100 * MIB)),
    row("loss", "Liger", SMALL, "measured", version="0.6.4", **timed(20.01, 645.3, 0.8759, 2 * GIB, 1100 * MIB)),
    row("loss", "CCE", SMALL, "skipped: cut-cross-entropy is not installed"),
    row("loss", "fused_preference_loss", LARGE, "measured", "triton",
        **timed(291.01, 709.8, 0.9631, 3600 * MIB, 1600 * MIB)),
    row("loss", "linear_cross_entropy", LARGE + " workspace=2 GiB", "skipped: no time: it would take 5 s"),
    row("loss", "fused_preference_loss", "N=4096 H=4096 V=32000", "measured", "triton",
        **timed(5.0, 640.0, 0.9, 600 * MIB, 300 * MIB)),
    row("step", "step", "llama-3-8b 65536", "measured", seconds=12.3401, tokens_per_s=5310.8, tflops=405.55, took=40.0,
        peak_device_bytes=int(69.301 * GIB), peak_host_bytes=70 * GIB, predicted_peak_bytes=70 * GIB, predicted_seconds=12.0,
        planner_error_peak=69.301 / 70 - 1, planner_error_seconds=12.3401 / 12 - 1, planned_device_bytes=72 * GIB,
        settings={"tile_rows": 8192, "offload": True, "kept": 0, "states": "8bit", "host": False}),
    row("step", "step", "llama-3-8b 131072", "skipped: memory: it takes 83.1 GiB of the device"),
    row("long", "long", "backward of the last 4 layers", "measured", seconds=30.0, peak_device_bytes=70 * GIB,
        predicted_peak_bytes=70 * GIB, predicted_seconds=90.0, planner_error_peak=0.0),  # no time to compare
    row("pairs", "one sequence against two", "32768", "measured", seconds=4.0, faster=1.9199, memory=0.5411,
        one={"seconds": 4.0, "peak_device_bytes": 3 * GIB}),
    row("offload", "copy rates", "pages", "measured", bytes_per_second={"out": 51.2e9}, share_of_one_copy={"out": 0.9399}),
    row("offload", "offload", "host", "measured", seconds=2.0, times_kept=1.0101, gradients="0f3a"),
]  # fmt: skip
UNTIMED = ROWS[:6]  # of which no picture is drawn, which takes a second


def content(rows: list[dict] = ROWS, **changes) -> dict:
    return copy.deepcopy(HEAD | {"state": "finished", "running": None, "rows": rows, "seconds": 401.25} | changes)


def make_project(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """A checkout of this project's pages, without reports, that report.py takes for its own."""
    for name in (report.README, report.MEASURED):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    results = root / "benchmarks/results"
    results.mkdir(parents=True)
    patch.setattr(report, "ROOT", root)
    patch.setattr(report, "RESULTS", results)
    report.write([], root)
    return root


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    return make_project(tmp_path / "project", monkeypatch)


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> Path:
    """A checkout with the pages of content()."""
    folder = tmp_path_factory.mktemp("shown")
    with pytest.MonkeyPatch.context() as patch:
        root = make_project(folder / "project", patch)
        assert report.main([str(save(folder / "gpu_check.json", content()))]) == 0
    return root


def save(path: Path, given: dict) -> Path:
    path.write_text(json.dumps(given))
    return path


def block(page: Path) -> str:
    return re.search(r"<!-- gpu -->\n(.*)\n<!-- end gpu -->", page.read_text(), re.DOTALL)[1]


def cells(table: str, *start: str) -> list[str]:
    """The line of a Markdown table whose first cells are these."""
    lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
    (found,) = [line for line in lines if line[: len(start)] == list(start)]
    return found


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_no_figure_looks_better_than_what_was_measured():
    assert [tables.up(x) for x in (18.4411, 18.4, 0.1, 1234.1, 0, 0.00012345)] == [
        "18.5", "18.4", "0.100", "1,235", "0", "0.000124"
    ]  # fmt: skip
    assert [tables.down(x) for x in (0.94999, 5310.8, 0.95, 99.99)] == ["0.949", "5,310", "0.950", "99.9"]
    assert [tables.percent(x) for x in (0.0283501, -0.0283501, 0.0)] == ["+2.84 %", "-2.84 %", "+0 %"]
    assert tables.up(3 * GIB + 1, GIB) == "3.01" and tables.up(3 * GIB, GIB) == "3.00"
    assert [tables.up(x) for x in (None, "fast", True, [1])] == [""] * 4
    assert tables.up(float("nan")) == "nan" and tables.up(float("inf")) == "inf"


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_the_figures_of_a_card(shown):
    text = block(shown / report.MEASURED)
    name = "2026-12-01-102030-gpu-check-H100-80GB-HBM3.json"
    assert json.loads((shown / "benchmarks/results" / name).read_text()) == content()
    run = cells(text, "1", "2026-12-01")
    assert run[2:5] == [f"[{name}](../benchmarks/results/{name})", f"`{HEAD['command']}`", "0123456789ab"]
    assert run[5:] == ["torch 2.11.0+cu130, triton 3.6.0, python 3.12.3", "finished after 402 s of 470"]
    assert "### NVIDIA H100 80GB HBM3" in text

    ours = ["18.5", "700", "0.949", "1.08", "2,000", "1,100"]
    assert cells(text, "fused_preference_loss, triton", SMALL)[2:] == ours
    assert cells(text, "Liger 0.6.4", SMALL)[2:] == ["20.1", "645", "0.875", "1.00", "948", "1,100"]
    assert cells(text, "fused_preference_loss, triton", LARGE)[2:6] == ["292", "709", "0.963", ""]
    assert cells(text, "CCE", SMALL)[2] == "skipped: cut-cross-entropy is not installed"
    assert cells(text, "linear_cross_entropy, workspace=2 GiB", LARGE)[2].startswith("skipped: no time")
    step = cells(text, "step, llama-3-8b 65536")
    assert step[1:-2] == ["12.4", "5,310", "405", "69.4", "70.0", "-0.999 %", "12.0", "+2.84 %", "70.0"]
    assert step[-1] == "planned device bytes 72 GiB, tile rows 8192, offload True, states 8bit"
    assert cells(text, "long, backward of the last 4 layers")[-5:-2] == ["90.0", "", ""]
    pair = cells(text, "one sequence against two, 32768")
    assert pair[-2:] == ["1.91x faster, 0.542x memory", "one seconds 4, one peak device bytes 3 GiB"]
    copies = cells(text, "copy rates, pages")
    assert copies[1:2] + copies[-2:] == ["measured", "0.939x copy out", "bytes per second out 51.2 GB/s"]
    assert cells(text, "offload, host")[-2:] == ["1.02x the kept one's time", ""]
    assert cells(text, "ceiling: copy")[2:] == ["0.713", "", "", "3,014", "", ""]
    assert cells(text, "tiles", "rows", "triton") == [
        "tiles", "rows", "triton", "2", "0.750", "V=128256, bfloat16, logps"
    ]  # fmt: skip
    assert cells(text, "tiles", "3") == ["tiles", "3", "", "", "1", "7.52", "3"]
    late = cells(text, "attention", "shared-prefix attention, cuDNN")
    assert late[2:] == ["2", "one pair", "no time: it would take 3 s"]
    assert cells(text, "step", "step", "1")[4] == "memory: it takes 83.1 GiB of the device"

    readme = block(shown / report.README)
    told = "NVIDIA H100 80GB HBM3, 2026-12-01, commit 0123456789ab: **1 of 19 rows failed** ([all numbers](docs/measured.md))."
    assert readme.startswith(told)
    large = ["292", "709", "0.963", "2,000"]
    assert cells(readme, "loss, H=4096 V=128256")[1:] == [
        "N=4096: ms", "TFLOP/s", "of matmul", "extra MiB", "N=65536: ms", "TFLOP/s", "of matmul", "extra MiB"
    ]  # fmt: skip
    assert cells(readme, "fused_preference_loss, triton")[1:] == ["18.5", "700", "0.949", "2,000", *large]
    assert cells(readme, "Liger")[1:] == ["20.1", "645", "0.875", "948", "", "", "", ""]
    assert cells(readme, "CCE")[1:] == ["skipped", "", "", "", "", "", "", ""]
    assert (
        "V=32000" not in readme and "workspace" not in readme and cells(readme, "step, llama-3-8b 65536") == step[:-1]
    )


def test_failures_are_shown_first(shown):
    text = block(shown / report.MEASURED)
    failed = cells(text, "tiles", "rows, cuda")
    assert failed[2:] == [r"bias \| scale", "error 2.000e-02, allowed 4.000e-03"]
    assert cells(text, "tiles", "divergence_, triton")[3:] == ["passed", "error 1.000e-02, allowed 9.000e-03"]
    order = [
        "### NVIDIA",
        "**1 of 19 rows failed**",
        "Failures:",
        "Failed first",
        "Questions:",
        "The loss:",
        "Skipped:",
    ]
    assert sorted(order, key=text.index) == order


def test_runs_of_one_card_are_merged_and_cards_are_not(project, tmp_path):
    for given in (content(UNTIMED[:3], state="running", seconds=None), content(UNTIMED)):  # one run, filed twice
        report.main([str(save(tmp_path / "gpu_check.json", given))])
    mended = [ROWS[2] | {"status": "passed", "error": 1e-3}, ROWS[0] | {"status": "skipped: no time"}]
    later = content(
        mended, date="2026-12-01T11:00:00+00:00", command=HEAD["command"] + " --only failed", commit="f" * 40
    )
    other = content(ROWS[:2], hardware={"gpu": {"name": "NVIDIA H200"}}, card="H200")
    files = [save(tmp_path / f"{name}.json", given) for name, given in {"later": later, "other": other}.items()]
    assert report.main(list(map(str, files))) == 0
    assert [path.name for path in report.reports()] == [
        "2026-12-01-102030-gpu-check-H100-80GB-HBM3.json",
        "2026-12-01-102030-gpu-check-H200.json",
        "2026-12-01-110000-gpu-check-H100-80GB-HBM3.json",
    ]
    text = block(project / report.MEASURED)
    h100, h200 = re.split("### NVIDIA H200", text)
    assert "No row failed, of 6 that" in h100 and "No row failed, of 2 that" in h200
    assert cells(h100, "tiles", "rows, cuda")[3:] == ["passed", "error 2.000e-02, allowed 4.000e-03"]
    assert cells(h100, "2", "2026-12-01")[4] == "f" * 12
    assert cells(h100, "tiles", "rows", "triton")[3] == "2"  # a skipped row says nothing new
    assert cells(h100, "tiles", "4")[-1] == "3"
    before = [path.read_text() for path in (project / report.README, project / report.MEASURED)]
    assert report.main([str(files[0])]) == 0  # once more: nothing new
    assert report.main([]) == 0
    assert before == [path.read_text() for path in (project / report.README, project / report.MEASURED)]
    assert len(report.reports()) == 3


def test_a_picture_of_a_card(shown):
    pytest.importorskip("matplotlib")
    picture = shown / "docs/pictures/gpu-H100-80GB-HBM3.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(pictures/gpu-H100-80GB-HBM3.png)" in block(shown / report.MEASURED)


def test_without_a_report_the_pages_stay_as_they_are(project, capsys):
    pages = [project / report.README, project / report.MEASURED]
    assert [page.read_text() for page in pages] == [
        _unmeasured(ROOT / name) for name in (report.README, report.MEASURED)
    ]
    before = [page.read_text() for page in pages]
    assert report.main([]) == 0
    assert "not measured yet" in capsys.readouterr().out
    assert [page.read_text() for page in pages] == before
    assert all("not measured yet" in block(page).lower() for page in pages)


def _unmeasured(page: Path) -> str:
    name = page.relative_to(ROOT).as_posix()
    return report.between(page.read_text(), report.BLOCK, report.UNMEASURED[name], name)


def test_the_committed_pages_show_the_committed_reports(tmp_path):
    runs = list(map(report.read, report.reports()))
    assert not any(run.content.get("rehearsal") for run in runs)
    shutil.copytree(ROOT / "docs/pictures", tmp_path / "docs/pictures")
    report.write(runs, tmp_path)
    for name in (report.README, report.MEASURED):
        assert block(tmp_path / name) == block(ROOT / name), f"run `python -m benchmarks.gpu.report`: {name} is old"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_rehearsal_is_shown_elsewhere_only(project, tmp_path, capsys):
    file = str(save(tmp_path / "gpu_check.json", content(UNTIMED, rehearsal=True, card="CPU", hardware={"gpu": None})))
    before = (project / report.MEASURED).read_text()
    assert report.main([file]) == 1
    assert "gpu_check.json is a rehearsal on a CPU" in capsys.readouterr().out
    assert (project / report.MEASURED).read_text() == before and report.reports() == []
    assert report.main([file, "--docs", str(tmp_path / "elsewhere")]) == 0
    assert "### CPU" in block(tmp_path / "elsewhere" / report.MEASURED)
    assert (project / report.MEASURED).read_text() == before


@pytest.mark.parametrize("page", [report.README, report.MEASURED])
def test_a_page_without_markers_is_refused_and_nothing_is_written(project, tmp_path, capsys, page):
    file = str(save(tmp_path / "gpu_check.json", content()))
    (project / page).write_text((project / page).read_text().replace("<!-- end gpu -->", ""))
    before = [(project / name).read_text() for name in (report.README, report.MEASURED)]
    assert report.main([file]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{page}: the lines <!-- gpu --> and <!-- end gpu -->")
    assert before == [(project / name).read_text() for name in (report.README, report.MEASURED)]


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"state": "running"'])
def test_what_is_no_report_is_refused_by_name(project, tmp_path, capsys, text):
    (tmp_path / "other.json").write_text(text)
    assert report.main([str(tmp_path / "other.json")]) == 1
    assert "other.json: no report of `make gpu-check`" in capsys.readouterr().out
    assert report.main([str(tmp_path / "nowhere.json")]) == 1
    assert "nowhere.json" in capsys.readouterr().out


# ---- cut off anywhere ------------------------------------------------------------------------------------------------


def test_a_report_is_readable_however_far_it_came(tmp_path):
    """As the parent wrote it after each message, head and all, and read from the file."""
    path, seen, pages = tmp_path / "gpu_check.json", [], []

    def look() -> None:
        run = report.read(path)
        seen.append(report.summary(run.content, path))
        pages.append(report.measured_block(report.by_card([run]), tmp_path))
        assert report.readme_block(report.by_card([run]))

    kept = Report(path, command=HEAD["command"], rehearsal=False, deadline=470.0)
    look()
    assert "no rows" in seen[-1] and "cut off between rows" in seen[-1]
    kept.note(running=["tiles", "rows", "triton", "V=1"])
    look()
    assert "cut off at tiles, rows, triton, V=1; its rows took 0 s" in seen[-1]
    assert "### unknown card" in pages[-1]
    kept.note(**HEAD)
    for number, given in enumerate(ROWS, 1):
        kept.note(running=[given[name] for name in tables.NAMES])
        look()
        kept.add(copy.deepcopy(given))
        look()
        counted = [line.split() for line in seen[-1].splitlines() if line.startswith(given["question"])]
        assert counted, seen[-1]
        assert f"of {number}" in seen[-1].splitlines()[0]
    kept.note(state="finished", seconds=401.25)
    look()
    assert "finished after 402 s of 470" in seen[-1]
    assert all(len(text.splitlines()) <= 40 for text in seen)


def test_rows_without_numbers_and_numbers_nobody_knows():
    bare = [{"question": r["question"], "what": r["what"], "status": r["status"]} for r in ROWS]
    odd = [
        {"question": "new", "what": "Liger", "case": SMALL, "status": "measured", "milliseconds": None},
        {
            "question": "new",
            "what": "fused_preference_loss",
            "case": SMALL,
            "status": "measured",
            "milliseconds": float("nan"),
        },
        {
            "question": "new",
            "what": "x",
            "case": "y",
            "status": "measured",
            "joules": 3.5,
            "seconds": "many",
            "took": None,
        },
        {"question": "new", "what": "x", "case": "z", "status": "undecided", "gigabytes_per_second": {"up": 1}},
        {"status": "failed"},
        {},
    ]
    for rows in (bare, odd, bare + odd):
        given = content(rows, hardware=None, versions=None, seconds=None, deadline=None)
        text = report.summary(given)
        assert len(text.splitlines()) <= 40
        assert report.measured_block({"card": [report.Run(Path("x.json"), given)]}, ROOT)
        assert report.readme_block({"card": [report.Run(Path("x.json"), given)]})
    assert "new (1 of no known status)" in text


# ---- printed last ----------------------------------------------------------------------------------------------------


def test_what_a_person_needs_is_printed_last():
    lines = report.summary(content(), Path("out/gpu_check.json")).splitlines()
    assert lines[0] == "FAILED: 1 of 19 rows"
    assert lines[1] == '1 more failed first and not when asked again: their "first" says why'
    assert lines[2] == "tiles, rows, cuda, bias | scale: error 2.000e-02, allowed 4.000e-03"
    assert lines[3].split() == ["question", "passed", "measured", "skipped", "failed", "seconds", "kernels", "compiled"]
    assert lines[4].split() == ["tiles", "3", "1", "7.52", "3"]
    (ours,) = [line for line in lines if line.startswith("fused_preference_loss, triton")]
    assert ours.split()[-8:] == ["18.5", "700", "0.949", "2,000", "292", "709", "0.963", "2,000"]
    (step,) = [line for line in lines if line.startswith("step, llama-3-8b 65536")]
    assert step.split()[-8:] == ["12.4", "5,310", "69.4", "70.0", "-0.999", "%", "+2.84", "%"]
    assert lines[-5:] == [
        "skipped, no time: 2 of attention, 1 of loss",
        "skipped, memory: 1 of step",
        "skipped, other reasons: 1 of loss",
        "finished after 402 s of 470; kernels compiled on this machine: 3",
        "report: out/gpu_check.json",
    ]


def test_many_failures_leave_room_for_the_rest():
    many = [row("tiles", "rows", f"V={v}", "failed: error " + "x" * 400, "triton") for v in range(300)]
    lines = report.summary(content(many + ROWS)).splitlines()
    assert lines[0] == "FAILED: 301 of 319 rows" and len(lines) <= 40 and max(map(len, lines)) <= 160
    assert any(line.startswith("step, llama-3-8b 65536") for line in lines)
