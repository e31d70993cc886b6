"""`longpo evolve`: wrong usage. What it prints of a finished run is in test_run.py, beside the run."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from longpo_ops import cli


def longpo(*arguments):
    return CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).invoke(cli.app, ["evolve", *map(str, arguments)])


def test_wrong_usage_exits_with_2(tmp_path):
    for text, message in (("colour: red", "colour unknown"), (None, "cannot be read")):
        if text:
            (tmp_path / "run.yaml").write_text(text)
        done = longpo("--config", tmp_path / ("run.yaml" if text else "nowhere.yaml"))
        assert done.exit_code == 2 and message in " ".join(re.sub("[│\n]", " ", done.output).split())


def test_a_launcher_may_be_named_beside_the_file(tmp_path):
    rounds = "[{name: one, length: 1024, documents: docs}]"
    (tmp_path / "run.yaml").write_text(
        f"{{model: m, out: o, evaluate: {{lengths: [8]}}, launch: torchrun, rounds: {rounds}}}"
    )
    done = longpo("--config", tmp_path / "run.yaml", "--launch", "no-such-launcher --nproc 2", "--dry-run")
    assert done.exit_code == 1 and str(done.exception).startswith(
        "launch: no program 'no-such-launcher' is to be found"
    )
    done = longpo("--config", tmp_path / "run.yaml", "--launch", "torchrun '--nproc")
    assert done.exit_code == 2 and "No closing quotation" in done.output
