"""Whole evolutions of a tiny model: what they make, also by processes of their own, that they go on after SIGKILL, and when
they stop."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from longpo_ops.cli import app
from longpo_ops.evaluate import Scores
from longpo_ops.evolve import Evolution, evolve
from longpo_ops.evolve.child import LOG
from longpo_ops.evolve.receipt import Receipt
from tests.engines import tiny
from tests.processes import run as run_process

ROOT = Path(__file__).parents[2]
# A launcher that keeps what it was called with, and whose exit code says nothing of the process it started.
LAUNCHER = """#!{python}
import json, os, subprocess, sys
json.dump([sys.argv[1:], dict(os.environ)], open({kept!r}, "w"))
subprocess.call([{python!r}, *sys.argv[3:]])
"""
LAUNCHED = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}
LAUNCHED |= {"ACCELERATE_MIXED_PRECISION": "bf16", "FSDP_VERSION": "2", "PARALLELISM_CONFIG_CP_SIZE": "2"}
LAUNCHED |= {"TORCHELASTIC_RUN_ID": "other", "GROUP_RANK": "0", "ROLE_NAME": "default", "LOCAL_WORLD_SIZE": "1"}

STAGES = ["pairs", "untrained", "train", "evaluate"]
KILLED = """
import json, os, signal, sys
from longpo_ops.evolve import Evolution, evolve

settings, stage, fraction = json.loads(sys.argv[1])

def progress(name, done, note):
    if name == stage and fraction <= done < 1:
        os.kill(os.getpid(), signal.SIGKILL)

evolve(Evolution.from_settings(settings), progress)
"""


def run(settings: dict, progress=None):
    return evolve(Evolution.from_settings(settings), progress)


def kill_at(settings: dict, stage: str, fraction: float) -> None:
    """Run in a process of its own, which is killed once a stage has come so far."""
    done = run_process(KILLED, json.dumps([settings, stage, fraction]))
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]


def begun(finished, out: Path, *stages: str) -> dict:
    """Settings of a one-round run in `out` in which some stages of the finished one are done already."""
    settings = copy.deepcopy(finished[0])
    whole, settings["out"], settings["rounds"] = Path(settings["out"]), str(out), settings["rounds"][:1]
    for stage in stages:
        (out / stage).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(whole / stage, out / stage)
        shutil.copy(whole / f"{stage}.json", out / f"{stage}.json")
    return settings


# -- what comes out ----------------------------------------------------------------------------------------------------


def shown(row: dict) -> list[str]:
    """The means over the tasks as tables have them: all tasks here are local."""
    numbers = row["accuracy"]["local"].values()
    return ["{value:.3f} ({0:.3f} to {1:.3f}), n={samples}".format(*each["interval"], **each) for each in numbers]


def test_the_table_has_the_base_and_every_model_before_and_after(finished):
    settings, result = finished
    assert [(row["round"], row["row"]) for row in result.rows] == [
        (None, "base"),
        *[(name, row) for name in ("one", "two") for row in ("untrained", "after")],
    ]
    assert [row["theta"] for row in result.rows] == [1e4, 2e4, 2e4, 4e4, 4e4]
    assert all(list(row["accuracy"]["local"]) == list(row["perplexity"]) == [128, 256] for row in result.rows)
    measured = [tuple(number["value"] for number in row["perplexity"].values()) for row in result.rows]
    assert len(set(measured)) == len(measured)  # every row is of another model
    assert result.stopped is None and result.promoted == f"{settings['out']}/two/train"
    assert [each["holds"] for each in result.retention] == [True] * 4
    assert json.loads(Path(settings["out"], "results.json").read_text())["rows"] == json.loads(json.dumps(result.rows))


def test_every_stage_tells_its_cost(finished):
    _, result = finished
    expected = ["base/evaluate", *(f"{name}/{stage}" for name in ("one", "two") for stage in STAGES)]
    assert [cost["stage"] for cost in result.stages] == expected
    assert all(cost["done"] and cost["seconds"] > 0 and cost["host_bytes"] > 2**20 for cost in result.stages)


def test_policies_start_from_the_last_model_and_keep_their_theta(finished):
    settings, _ = finished
    out, base = Path(settings["out"]), settings["model"]
    trained = {name: json.loads((out / name / "train/run.json").read_text()) for name in ("one", "two")}
    assert (trained["one"]["model"], trained["one"]["reference_model"]) == (base, None)  # the model itself, own RoPE
    assert trained["two"]["model"] == f"{out}/one/train"
    assert trained["two"]["reference_model"] is None  # round one's, which is the one it starts from
    for name, theta in (("one", 2e4), ("two", 4e4)):
        config = AutoConfig.from_pretrained(out / name / "train")
        assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (theta, 1024)
    evaluated = {name: json.loads((out / name / "run.json").read_text()) for name in ("one/untrained", "one/evaluate")}
    assert evaluated["one/untrained"]["rope"] == {"rope_theta": 2e4} and evaluated["one/evaluate"]["rope"] is None
    asked = json.loads((out / "two/pairs/run.json").read_text())
    assert asked["model"] == Path(base).name and asked["rope"] is None  # reads 1024 tokens as it is


def test_a_round_starts_from_the_model_that_it_names(finished, tmp_path):
    out, base = tmp_path / "out", finished[0]["model"]
    settings = begun(finished, out, "base/evaluate", "two/pairs", *(f"one/{stage}" for stage in STAGES))
    second = finished[0]["rounds"][1]
    settings["rounds"].append(second | {"start": "base", "train": second["train"] | {"max_steps": 1}})
    result, before = run(settings), finished[1]
    trained = json.loads((out / "two/train/run.json").read_text())
    assert (trained["model"], trained["reference_model"]) == (base, str(out / "one/train"))
    labels = [row["label"] for row in result.rows[3:]]
    assert labels == ["two: base, theta 40000, untrained", "two: after"]
    assert result.rows[:3] == before.rows[:3]
    assert result.rows[3]["perplexity"] != before.rows[3]["perplexity"]  # that one is of round one's model
    assert json.loads((out / "two/untrained/run.json").read_text())["model"] == Path(base).name
    assert result.promoted == f"{out}/two/train"  # the last round whose bounds hold, whatever it started from
    assert f"| starts from | {Path(base).name} |" in (out / "report.md").read_text().replace("\\", "")


def test_a_finished_run_does_nothing_and_says_the_same(finished):
    settings, result = finished
    told = []
    again = run(settings, lambda *progress: told.append(progress))
    assert told == [(cost["stage"], 1.0, "done before") for cost in result.stages]
    assert again == result


def test_the_report_is_one_file_that_loads_nothing(finished):
    settings, result = finished
    page = Path(settings["out"], "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert len(sources) == 3 and set(sources) == {"data:image/png;base64,"}
    for row in result.rows:
        cells = "".join(f'<td class="number">{value}</td>' for value in shown(row))
        assert f"<td>{row['label']}</td>{cells}" in page
    for said in ("Finished.", "one: perplexity at 128", "documents selected", "rewards/margins", "two/train", "<mark>"):
        assert said in page
    assert re.search(r"<p class=\"\">2 of (\d+) pairs; longpo pairs show one/pairs --number \1 shows all</p>", page)
    assert settings["out"] not in page and settings["model"] not in page  # no paths of this machine


def test_the_markdown_report_says_the_same_and_its_pictures_are_there(finished):
    settings, result = finished
    out = Path(settings["out"])
    text = (out / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures == ["accuracy.png", "one/train/training.png", "two/train/training.png"]
    assert all((out / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    for row in result.rows:
        values = " | ".join(shown(row))
        assert f"| {row['label']} | {values} |" in text


# -- the command ------------------------------------------------------------------------------------------------------


def longpo(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(app, ["evolve", *map(str, arguments)])


@pytest.fixture
def config(finished, tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(finished[0]))
    return tmp_path / "run.yaml"


def test_a_finished_run_prints_its_tables(config, finished):
    done = longpo("--config", config)
    assert done.exit_code == 0, done.output
    for row in finished[1].rows:
        values = shown(row)
        assert re.search(r"\W+".join(map(re.escape, [row["label"], *values])), done.output)
    assert "report.html" in done.output and f"promoted: {finished[1].promoted}" in done.output
    assert "two/evaluate" in done.output and "peak memory, MiB" in done.output


def test_a_dry_run_prints_the_stages_and_makes_nothing(config, finished, tmp_path):
    done = longpo("--config", config, "--dry-run")
    assert done.exit_code == 0, done.output
    stages = [f"{cost['stage']} (done)" for cost in finished[1].stages]
    assert re.findall(r"^\S+ \(.+\)$", done.output, re.MULTILINE) == stages
    done = longpo("--config", config, "--out", tmp_path / "new", "--dry-run")
    assert done.exit_code == 0 and "one/train (to do)" in done.output and not (tmp_path / "new").exists()
    assert re.search(r"rope_theta +20000.0", done.output) and f"{tmp_path}/new/one/train" in done.output


# -- stopped and started -----------------------------------------------------------------------------------------------


def test_a_run_killed_in_every_stage_gives_the_same_table(finished, tmp_path):
    settings, whole = begun(finished, tmp_path / "killed"), finished[1]
    kill_at(settings, "one/pairs", 0.2)
    assert list((tmp_path / "killed/one/pairs/work").glob("*.journal"))  # in the middle of it
    kill_at(settings, "one/train", 0.5)
    assert (tmp_path / "killed/one/train/checkpoint-1").is_dir()
    assert "one: theta 20000, untrained" in (tmp_path / "killed/report.md").read_text()  # what there is can be read
    before = Receipt.open(
        tmp_path / "killed/one/train", json.loads((tmp_path / "killed/one/train.json").read_text())["settings"]
    )
    kill_at(settings, "one/evaluate", 0.4)
    assert not json.loads((tmp_path / "killed/one/evaluate.json").read_text())["done"]
    result = run(settings)
    assert result.rows == whole.rows[:3]
    assert result.retention == whole.retention[:2]
    train = next(cost for cost in result.stages if cost["stage"] == "one/train")
    assert not before.done and train["seconds"] > before.cost.seconds  # attempts add up


def test_a_bound_that_does_not_hold_stops_the_loop_and_says_why(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate", "one/pairs", "one/untrained")
    base = tmp_path / "out/base/evaluate"  # a perplexity that no model has after any training on any machine
    replace(Scores.load(base), perplexity={128: 1.0, 256: 1.0}).save(base)
    settings["rounds"].append(settings["rounds"][0] | {"name": "two"})
    settings["retention"][0]["within"] = 0.0
    result = run(settings)
    assert result.stopped.startswith("round 'one' is not promoted: perplexity at 128 is ")
    assert "at most" in result.stopped and result.promoted == settings["model"]
    assert len(result.rows) == 3 and not (tmp_path / "out/two").exists()
    for report in ("report.html", "report.md"):
        assert "not promoted: perplexity at 128" in (tmp_path / "out" / report).read_text()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    again = longpo("--config", tmp_path / "run.yaml")
    assert again.exit_code == 1 and str(again.exception).startswith(result.stopped)


# -- in processes of their own ------------------------------------------------------------------------------------------


@pytest.fixture
def launcher(tmp_path) -> tuple[list[str], Path]:
    """Words of a launcher, and the file where it puts what it was called with."""
    script, kept = tmp_path / "launcher", tmp_path / "called.json"
    script.write_text(LAUNCHER.format(python=sys.executable, kept=str(kept)))
    script.chmod(0o755)
    return [str(script), "--processes", "1"], kept


def test_a_training_behind_a_launcher_gives_the_same_table(finished, tmp_path, launcher, monkeypatch):
    settings = begun(finished, tmp_path / "out", "base/evaluate", "one/pairs", "one/untrained")
    words, kept = launcher
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    told = []
    result = evolve(Evolution.from_settings(settings | {"launch": words}), lambda *progress: told.append(progress))
    folder = tmp_path / "out/one/train.process"
    arguments, there = json.loads(kept.read_text())
    assert arguments == ["--processes", "1", "-m", "longpo_ops.evolve.child", str(folder)]
    assert not set(LAUNCHED) & set(there) and there["PATH"] == os.environ["PATH"]
    assert result.rows == finished[1].rows[:3]
    cost = next(cost for cost in result.stages if cost["stage"] == "one/train")
    assert cost["seconds"] > 0 and cost["host_bytes"] > 2**20
    assert any("step" in note for stage, _, note in told if stage == "one/train")
    assert (folder / LOG).stat().st_size


def test_what_a_training_refuses_is_said_once_and_before_anything_runs(finished, tmp_path, launcher):
    settings = begun(finished, tmp_path / "out", "base/evaluate")
    settings["rounds"][0]["train"] |= {"reference": "nonsense"}
    settings["launch"] = launcher[0]
    with pytest.raises(ValueError) as refused:
        evolve(Evolution.from_settings(settings))
    assert str(refused.value).startswith("one/train: reference='nonsense': expected one of precompute")
    assert not (tmp_path / "out/one/pairs").exists()


def test_with_a_gpu_evaluation_has_its_own_process(finished, tmp_path, monkeypatch):
    settings = begun(finished, tmp_path / "out", "base/evaluate", "one/pairs", "one/train", "one/evaluate")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    result = evolve(Evolution.from_settings(settings))
    assert (tmp_path / "out/one/untrained.process" / LOG).exists()
    assert result.rows == finished[1].rows[:3]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_a_round_without_pairs_stops_with_the_reasons(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate")
    settings["rounds"][0]["generate"] |= {"min_words": 1000}
    with pytest.raises(ValueError, match=r"^one/pairs: no pair is left of 3 documents.* chosen: near-empty: \d"):
        run(settings)
    text = (tmp_path / "out/report.md").read_text()
    assert "Stopped: one/pairs: no pair is left" in text and "| turns left out: chosen: near-empty |" in text
    assert "| base |" in text


def test_documents_that_are_too_short_stop_the_round(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate")
    settings["rounds"][0]["generate"] |= {"min_document": 590}
    with pytest.raises(ValueError, match=r"^one/pairs: no document was selected.*\n.*4 left out: shorter than wanted"):
        run(settings)
    assert "no document was selected" in (tmp_path / "out/report.html").read_text()


def test_what_an_evaluation_cannot_measure_is_left_out_of_the_evolution(make_settings, tmp_path, monkeypatch):
    """As its message says: the receipt goes, and the answers stay."""
    settings, base = make_settings(tmp_path / "out"), tmp_path / "out/base"

    def stop(name, done, note):
        if name == "one/pairs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, stop)
    (base / "evaluate.json").unlink()
    before = (base / "evaluate/work/00000.journal").read_bytes()
    lost = Scores(about={}, complete=False, notes=["1 of 4 windows failed"])
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="not complete: 1 of 4 windows") as stopped:
        patched.setattr("longpo_ops.evolve.work.evaluate", lambda *_: lost)
        run(settings)
    assert f"evaluate.json and untrained.json in the folders of {tmp_path / 'out'}: their" in str(stopped.value)
    del settings["evaluate"]["perplexity"]
    settings["retention"] = []
    (base / "evaluate.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(settings, stop)
    assert (base / "evaluate/work/00000.journal").read_bytes() == before and Scores.load(base / "evaluate").complete


def test_a_tokenizer_without_a_chat_template_is_refused_before_anything_runs(finished, tmp_path):
    settings = begun(finished, tmp_path / "out")
    settings["model"] = str(shutil.copytree(settings["model"], tmp_path / "bare"))
    (tmp_path / "bare/chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        run(settings)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused(finished, tmp_path):
    settings = begun(finished, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"out .*file/out cannot be written \(Not a directory\)"):
        run(settings | {"out": str(tmp_path / "file/out")})


def test_other_settings_are_refused_in_the_same_folder(finished):
    settings = copy.deepcopy(finished[0])
    settings["rounds"][0]["train"] |= {"save_total_limit": 2, "logging_steps": 2}  # decide nothing
    run(settings)
    settings["rounds"][0]["train"]["learning_rate"] = 2e-4
    with pytest.raises(
        ValueError, match=r"one/train: .* other settings \(learning_rate was 0.0001, is 0.0002\).* remove"
    ):
        run(settings)


def test_what_follows_from_a_stage_that_changed_is_refused(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate", "one/untrained", "one/evaluate")
    settings["rounds"][0]["train"]["learning_rate"] = 2e-4
    with pytest.raises(ValueError, match=r"one/evaluate: .* other settings \(model was 'one [0-9a-f]+', is 'one"):
        run(settings)


def test_a_damaged_receipt_is_named(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate")
    (tmp_path / "out/base/evaluate.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluate.json is damaged; remove it"):
        run(settings)


def test_two_processes_do_not_share_a_folder(finished):
    settings, _ = finished
    with open(Path(settings["out"], "base/lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another run is at work"):
            run(settings)


def test_several_processes_are_refused(finished, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="evolve runs in one process"):
        run(finished[0])


def test_lora_rounds_leave_whole_models(finished, tmp_path):
    settings = begun(finished, tmp_path / "out", "base/evaluate", "one/pairs", "one/untrained")
    settings["rounds"][0]["train"] |= {"lora_rank": 2, "max_steps": 1, "learning_rate": 0.1}
    result = run(settings)
    shutil.rmtree(tmp_path / "out/one/train")
    shutil.rmtree(tmp_path / "out/one/evaluate")
    torch.manual_seed(99)
    assert run(settings).rows == result.rows  # whatever was drawn before
    assert result.promoted == f"{tmp_path}/out/one/train/merged"
    config = AutoConfig.from_pretrained(result.promoted)
    assert (config.rope_parameters["rope_theta"], config.max_position_embeddings) == (2e4, tiny.POSITIONS)
