"""`longpo evolve`: exit codes, the dry run, what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from longpo_ops import cli


def longpo(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(cli.app, ["evolve", *map(str, arguments)])


@pytest.fixture
def config(finished, tmp_path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(finished[0]))
    return tmp_path / "run.yaml"


def test_a_finished_run_prints_its_tables(config, finished):
    done = longpo("--config", config)
    assert done.exit_code == 0, done.output
    for row in finished[1].rows:
        values = [f"{value:.3f}" for value in row["accuracy"].values()]
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


def test_wrong_usage_exits_with_2(tmp_path):
    for text, message in (("colour: red", "colour unknown"), (None, "cannot be read")):
        if text:
            (tmp_path / "run.yaml").write_text(text)
        done = longpo("--config", tmp_path / ("run.yaml" if text else "nowhere.yaml"))
        assert done.exit_code == 2 and message in " ".join(re.sub("[│\n]", " ", done.output).split())
