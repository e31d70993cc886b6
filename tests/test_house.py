"""The directions between the rooms of the tree, and where each room's tests are: read from the sources, nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "longpo_ops"

# Each room, and what it may import of the others: only what stands above it here.
ROOMS = {
    "kinds": (),
    "lazy": (),
    "text": (),
    "recipes": (),
    "launch": (),
    "pretrained": ("kinds",),
    "kernels": (),
    "parallel": (),
    "ops": ("kernels", "kinds", "parallel"),
    "data": ("kinds", "pretrained", "text"),
    "attention": ("data", "kinds", "parallel", "pretrained"),
    "runs": ("data", "text"),
    "documents": ("lazy", "text"),
    "engines": ("ops", "pretrained", "runs"),
    "memory": ("attention", "kinds", "lazy", "ops", "parallel", "pretrained", "runs"),
    "generate": ("data", "documents", "engines", "lazy", "pretrained", "recipes", "runs", "text"),
    "evaluate": ("data", "documents", "engines", "lazy", "pretrained", "runs", "text"),
    "train": (
        "attention",
        "data",
        "launch",
        "memory",
        "ops",
        "parallel",
        "pretrained",
        "recipes",
        "runs",
        "text",
    ),
    "doctor": ("attention", "data", "memory", "ops", "pretrained", "runs", "train"),
    "evolve": (
        "data",
        "documents",
        "engines",
        "evaluate",
        "generate",
        "lazy",
        "pretrained",
        "recipes",
        "runs",
        "train",
    ),
    "integrations": ("data", "kinds", "launch", "ops", "train"),
    "tiny": (),
    "demo": ("data", "evaluate", "evolve", "recipes", "runs", "tiny", "train"),
    "cli": (
        "demo",
        "doctor",
        "engines",
        "evaluate",
        "evolve",
        "generate",
        "launch",
        "memory",
        "pretrained",
        "runs",
        "train",
    ),
}
TRAINER = re.compile(r"transformers\.(Trainer|Training|trainer|integrations|Seq2SeqTrain)\w*")
MAY_TRAIN = ("train", "evolve", "integrations", "demo", "cli")


def imports(path: Path, root: Path = ROOT) -> Iterator[str]:
    """The full names of all that a file imports, inside functions too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules() -> Iterator[tuple[str, Path]]:
    """-> room and file of every module of the package, through the links to kernels and tiny; no scripts."""
    for folder in (
        PACKAGE,
        *(path for path in PACKAGE.rglob("*") if path.is_dir() and "__pycache__" not in path.parts),
    ):
        for path in sorted(folder.glob("*.py")):
            room = path.relative_to(PACKAGE).parts[0]
            if room != "__init__.py" and path.name != "pretrain.py":
                yield room.removesuffix(".py"), path


@pytest.fixture(scope="module")
def found() -> dict[str, set[tuple[str, str]]]:
    """room -> (file, name imported)."""
    names: dict[str, set] = {}
    for room, path in [*modules(), *(("kernels", path) for path in (ROOT / "kernels").glob("*.py"))]:
        names.setdefault(room, set()).update((path.name, name) for name in imports(path))
    return names


def test_the_reader_sees_every_import(tmp_path):
    file = tmp_path / "longpo_ops/evaluate/run.py"
    file.parent.mkdir(parents=True)
    file.write_text("import a.b\nfrom ..x import y\ndef f():\n    from . import z\n    from .. import terminal\n")
    assert set(imports(file, tmp_path)) == {
        "a.b", "longpo_ops.x.y", "longpo_ops.evaluate.z", "longpo_ops.terminal"
    }  # fmt: skip


def test_no_room_imports_one_below_it(found):
    order = list(ROOMS)
    assert set(found) == set(order)
    for room, allowed in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in allowed), f"{room}: the table runs in a circle"
        used = {name.split(".")[1]: (file, name) for file, name in found[room] if name.startswith("longpo_ops.")}
        wrong = {other: told for other, told in used.items() if other not in (*allowed, room)}
        assert wrong == {}, f"{room} imports what it may not: {wrong}"
        assert set(allowed) <= set(used), f"{room} need not be allowed {set(allowed) - set(used)}"


def test_tensors_are_all_that_ops_and_kernels_know(found):
    for room in ("ops", "kernels"):
        assert not [told for told in found[room] if told[1].startswith("transformers")]


def test_nothing_below_train_knows_the_trainer(found):
    for room, told in found.items():
        users = [(file, name) for file, name in told if TRAINER.match(name)]
        assert (room in MAY_TRAIN) or users == []
    assert [name for _, name in found["train"] if TRAINER.match(name)]  # it would be seen


def test_the_loop_takes_the_run_of_the_generator_and_no_more(found):
    used = {name for _, name in found["evolve"] if name.startswith("longpo_ops.generate")}
    assert used == {f"longpo_ops.generate.{name}" for name in ("GenerateRun", "check", "generate_and_summarise")}


def sources() -> list[Path]:
    """The modules that are tested: the library's, the kernels and the benchmarks."""
    folders = [(PACKAGE, "**/*.py"), (ROOT / "kernels", "*.py"), (ROOT / "benchmarks", "**/*.py")]
    return [path for folder, pattern in folders for path in sorted(folder.glob(pattern)) if path.name != "__init__.py"]


def test_every_module_has_its_tests_where_its_path_or_its_docstring_says():
    for path in sources():
        name = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
        mirrored = ROOT / "tests" / name.with_name(f"test_{name.name}")
        told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        named = re.findall(r"tests/[\w/]+\.py", told.partition("Tests: ")[2])
        assert mirrored.exists() or named, (
            f"{name}: no {mirrored.relative_to(ROOT)}, and no 'Tests: ...' that names others"
        )
        assert all((ROOT / file).exists() for file in named), f"{name} names tests that are not there: {named}"


def test_no_file_has_more_than_500_lines():
    folders = [PACKAGE, *(ROOT / name for name in ("kernels", "csrc", "benchmarks", "tests", "examples"))]
    files = [path for folder in folders for kind in ("py", "cpp", "cu", "h") for path in folder.rglob(f"*.{kind}")]
    assert len(files) > 200
    assert {path.relative_to(ROOT).as_posix() for path in files if len(path.read_text().splitlines()) > 500} == set()


def test_the_readmes_tree_is_the_tree():
    """Every path it names exists, and every room of the package and of the benchmarks is in it."""
    text = (ROOT / "README.md").read_text().partition("## Where things are")[2].split("```")[1]
    named, parent = set(), ""
    for line in text.splitlines()[1:]:
        names = re.split(r" {2,}", line.strip())[0] if not line.startswith(" " * 10) else ""
        for name in filter(None, names.split(", ")):
            parent = parent if line.startswith("  ") else name
            named.add((parent if line.startswith("  ") else "") + name)
    missing = [name for name in named if not (ROOT / name).exists()]
    assert missing == []
    rooms = {room for room in ROOMS if room not in ("kernels", "ops", "tiny")}
    for room in rooms:
        assert {f"longpo_ops/{room}/", f"longpo_ops/{room}.py"} & named, f"README.md's tree has no {room}"
    for folder in (path for path in (ROOT / "benchmarks").iterdir() if path.is_dir() and path.name != "__pycache__"):
        assert f"benchmarks/{folder.name}/" in named
