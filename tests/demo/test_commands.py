"""The demo, with fewer documents, samples and methods: what it shows and what it leaves behind."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from longpo_ops.cli import app
from longpo_ops.data import read_pairs
from longpo_ops.demo import compare, run
from longpo_ops.evolve import Evolution
from longpo_ops.tiny import text


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two settings files with small numbers instead of the shipped ones; all else is the demo's own."""
    here = tmp_path / "tiny"
    here.mkdir()
    for file in run.TINY.iterdir():
        if file.name not in ("evolve.yaml", "compare.yaml"):
            (here / file.name).symlink_to(file)
    settings = yaml.safe_load((run.TINY / "evolve.yaml").read_text())
    settings["evaluate"] |= {"samples": 2, "lengths": [256, 1024], "perplexity_lengths": [256]}
    settings["retention"] = [{"measure": "perplexity", "length": 256, "within": 5.0}]
    for each in settings["rounds"]:
        each["train"] |= {"gradient_accumulation_steps": 2, "save_steps": 2}
    (here / "evolve.yaml").write_text(yaml.safe_dump(settings))
    (here / "compare.yaml").write_text(
        yaml.safe_dump({"steps": 2, "every": 2, "methods": {"dpo": 1e-4, "sft_chosen": 1e-3}})
    )
    for module in (run, compare):
        monkeypatch.setattr(module, "TINY", here)
    monkeypatch.setattr(text, "DOCUMENTS", {"documents-1k": (4, (1750, 2150)), "documents-2k": (2, (3600, 4400))})
    return tmp_path / "out"


def demo(*arguments):
    return CliRunner(env={"COLUMNS": "160", "TERMINAL_WIDTH": "160"}).invoke(app, ["demo", *map(str, arguments)])


def test_the_demo_shows_documents_a_pair_and_the_table_and_compares_methods(small):
    done = demo("--out", small, "--compare")
    assert done.exit_code == 0, done.output
    shown = ("4 documents for 1,024 tokens", "chosen: The code", "rejected:", "theta 4000, untrained", "1k: after")
    for wanted in (*shown, "perplexity by tokens", "1k/train", "sft_chosen", "in all"):
        assert wanted in done.output, wanted
    results = json.loads((small / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == ["base", "untrained", "after"]
    assert all(set(row["accuracy"]["local"]) == {"256", "1024"} for row in results["rows"])
    rows = json.loads((small / "compare" / "results.json").read_text())
    assert {row["method"] for row in rows} == {"dpo", "sft_chosen"}
    last = {row["method"]: row for row in rows}
    assert last["dpo"]["step"] == last["sft_chosen"]["step"] == 2
    assert last["dpo"]["perplexity"] != last["sft_chosen"]["perplexity"]
    for figure in ("accuracy.png", "compare.png"):
        assert (small / figure).read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in (small / "report.html").read_text()
    again = demo("--out", small)  # nothing is done twice
    assert again.exit_code == 0 and json.loads((small / "results.json").read_text())["rows"] == results["rows"]


def test_the_demo_follows_the_published_recipe_with_the_sizes_that_it_needs(small):
    done = demo("--out", small, "--recipe", "official")
    assert done.exit_code == 0, done.output
    results = json.loads((small / "results.json").read_text())
    pairs = (
        "pairs official with changes (answer_tokens, max_chunk, max_document, min_chunk, min_document, question_tokens, "
        "questions)"
    )
    training = "training official with changes (gradient_accumulation_steps, learning_rate, rope_theta, seed)"
    assert results["recipes"] == {"1k": f"{pairs}, {training}"}
    for page in ("report.html", "report.md"):
        assert "Recipe: pairs official with changes (answer" in (small / page).read_text().replace("\\", "")
    assert "Recipe of round 1k: pairs official with changes" in " ".join(done.output.split())
    made = list(read_pairs(small / "1k/pairs", allow_equal=True))
    assert made and all(len(pair.turns) <= 2 for pair in made)
    for pair in made:
        chunks = [turn.chunk for turn in pair.turns]
        assert "\n" not in "".join(chunks) and all(chunk in pair.document.split("\n\n\n") for chunk in chunks)
    assert [row["label"] for row in results["rows"]] == ["base", "1k: theta 4000, untrained", "1k: after"]


def test_what_cannot_be_run_is_said(tmp_path, monkeypatch):
    done = demo("--out", tmp_path, "--rounds", 3)
    assert done.exit_code == 2 and "expected 1 to 2" in done.output
    assert demo("--out", tmp_path, "--device", "tpu").exit_code == 2
    done = demo("--out", tmp_path, "--recipe", "offical")
    assert done.exit_code == 2 and "expected one of default, official" in " ".join(done.output.replace("│", "").split())
    done = demo("--out", tmp_path, "--recipe", "official", "--compare")
    assert done.exit_code == 2 and "--compare with --recipe official" in " ".join(done.output.replace("│", "").split())
    import torch

    if not torch.cuda.is_available():
        failed = demo("--out", tmp_path, "--device", "cuda")
        assert isinstance(failed.exception, ValueError) and "no CUDA device" in str(failed.exception)
    (tmp_path / "file").write_text("")
    assert isinstance(demo("--out", tmp_path / "file").exception, OSError | ValueError)


def test_the_shipped_settings_are_an_evolution_of_two_rounds_that_starts_at_any_folder(tmp_path):
    wanted = run.evolution(tmp_path, rounds=2, seed=5)
    assert isinstance(wanted, Evolution) and [each.length for each in wanted.rounds] == [1024, 2048]
    assert all(path.startswith(str(tmp_path)) for each in wanted.rounds for path in each.documents)
    assert wanted.model == str(run.TINY / "model") and wanted.rounds[1].train["seed"] == 5
    plain = Evolution.from_file(run.TINY / "evolve.yaml")
    assert [each.name for each in plain.rounds] == ["1k", "2k"]
