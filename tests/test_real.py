"""examples/real: which documents `make demo-real` takes, and that its evolution can be planned; its model is no part of it."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from longpo_ops.evolve import Evolution, plan

REAL = Path(__file__).resolve().parents[1] / "examples/real"
TINY = REAL.with_name("tiny")


@pytest.fixture
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_real", REAL / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentences(number: int) -> str:
    return f"The {number} wheels of this cart turn slowly, and nobody who sees it on its way knows where it has been before. "


def write(folder: Path, count: int) -> Path:
    for i in range(count):
        (folder / f"part-{i % 3}").mkdir(parents=True, exist_ok=True)
        (folder / f"part-{i % 3}/text-{i}.txt").write_text(sentences(i))
    return folder


def test_documents_and_held_out_texts_have_no_paragraph_in_common(prepare, tmp_path):
    folder = write(tmp_path / "mine", 24)
    names = [name for name, _ in prepare.of_folders([folder])]
    copy = folder / "part-0" / f"{names[-1].partition('-text-')[2]}"
    assert copy.suffix == ".txt"
    shared = folder / names[-1].replace("-text-", "/text-")
    shared.write_text(sentences(-1) + "\n\n" + (folder / names[0].replace("-text-", "/text-")).read_text())
    prepare.write_documents(tmp_path / "out", [folder])
    documents = {path.name for path in (tmp_path / "out/documents").iterdir()}
    held_out = {path.name for path in (tmp_path / "out/held-out").iterdir()}
    assert documents == set(names[:20]) and held_out == set(names[20:23])  # the last one repeats the first document


def test_python_and_the_packages_give_enough(prepare, tmp_path, monkeypatch):
    packages = tmp_path / "doc"
    for i in range(3):
        for name in ("README.md", "changelog.txt", "copyright"):
            (packages / f"package-{i}").mkdir(parents=True, exist_ok=True)
            (packages / f"package-{i}" / name).write_text(sentences(i) * 60)
    monkeypatch.setattr(prepare, "PACKAGES", packages)
    prepare.write_documents(tmp_path / "out", [])
    documents = {path.name: path.read_text() for path in (tmp_path / "out/documents").iterdir()}
    held_out = {path.name: path.read_text() for path in (tmp_path / "out/held-out").iterdir()}
    assert len(documents) == 20 and len(held_out) == 4
    assert {name for name in documents if name.startswith("package")} == {f"package-{i}-README.md" for i in range(3)}
    seen = set().union(*map(prepare.paragraphs, documents.values()))
    assert seen and all(prepare.paragraphs(text) and not seen & prepare.paragraphs(text) for text in held_out.values())


def test_too_few_texts_are_refused(prepare, tmp_path):
    with pytest.raises(ValueError, match="5 documents and 4 texts to hold out were found; expected 20"):
        prepare.write_documents(tmp_path / "out", [write(tmp_path / "mine", 9)])
    assert not (tmp_path / "out").exists()


def test_the_evolution_can_be_planned():
    settings = yaml.safe_load((REAL / "evolve.yaml").read_text())
    stages = plan(Evolution.from_settings(settings | {"model": str(TINY / "model")}))
    assert [stage.name for stage in stages] == ["base/evaluate", "2k/pairs", "2k/train", "2k/evaluate"]
    assert stages[2].run.settings()["max_steps"] == 20
