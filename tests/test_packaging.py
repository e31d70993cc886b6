"""The package as people get it: from a checkout, an editable install, a wheel and a source archive, without a network.

`longpo_ops.kernels` must come from all of them, and Hugging Face's top-level `kernels`, which transformers imports
where it finds one, must answer exactly as it would without us.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from transformers.utils.import_utils import KERNELS_MIN_VERSION

import longpo_ops
from tests.compiler import cached_compiler

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".gitignore", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "examples", "kernels", "longpo_ops", "tests")
PIP_FLAGS = ("--no-deps", "--no-build-isolation", "--no-index")

pytestmark = pytest.mark.xdist_group("packaging")  # the environments below are built once, in one process

# What an environment answers: is ours there, whose is `kernels`, and does transformers use it.
PROBE = """
import importlib, json, sys
def version(name):
    try:
        return getattr(importlib.import_module(name), "__version__", "namespace")
    except ModuleNotFoundError:
        return None
ours = "longpo_ops" in sys.argv and importlib.import_module("longpo_ops.kernels.probe").__name__
untouched = "kernels" not in sys.modules
from transformers.utils.import_utils import is_kernels_available
available = is_kernels_available()
if available:
    from transformers.integrations import hub_kernels
    assert hub_kernels.LayerRepository.__module__ == "kernels", hub_kernels.LayerRepository
print(json.dumps({"ours": ours, "untouched": untouched, "theirs": version("kernels"), "used": available}))
"""


def run(*command, cwd, python_path="", stderr=subprocess.PIPE) -> str:
    """Run a command to its end and return what it printed; our own checkout is not on its path."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH", "TRITON_INTERPRET")}
    if python_path:
        clean["PYTHONPATH"] = str(python_path)
    command = [str(c) for c in command]
    done = subprocess.run(command, cwd=cwd, env=clean, text=True, stdout=subprocess.PIPE, stderr=stderr)
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}{done.stderr or ''}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the source tree with links kept and one module more, kernels/probe.py."""
    tree = tmp_path_factory.mktemp("source") / "checkout"
    tree.mkdir()
    for name in SOURCES:
        shutil.copy2(ROOT / name, tree)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "_native")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    (tree / "kernels/probe.py").write_text("")
    return tree


@pytest.fixture(scope="module", autouse=True)
def compiler(tmp_path_factory):
    """The wheel and the editable install compile the same sources."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(cached_compiler(tmp_path_factory)))
        yield


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", *PIP_FLAGS, "-w", out, ".", cwd=checkout)
    return next(out.glob("longpo_ops-*.whl"))


def environment(folder: Path) -> Path:
    """A virtual environment that also sees the packages, but not the editable installs, of the running one."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next(folder.glob("lib/python*/site-packages"))
    outer = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    (site / "outer.pth").write_text("\n".join(outer) + "\n")
    return folder / "bin/python"


def install(python: Path, *what) -> str:
    """What pip says, the build's own words included."""
    command = (sys.executable, "-m", "pip", "--python", python, "install", "--ignore-installed", "-v")
    return run(*command, *PIP_FLAGS, *what, cwd=python.parent, stderr=subprocess.STDOUT)


@pytest.fixture(scope="module")
def pythons(checkout, wheel, tmp_path_factory) -> dict[str, Path]:
    """One interpreter per way of installing; "checkout" has nothing installed."""
    folder = tmp_path_factory.mktemp("environments")
    found = {name: environment(folder / name) for name in ("checkout", "editable", "wheel")}
    install(found["editable"], "--editable", checkout)
    install(found["wheel"], wheel)
    return found


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A stand-in for Hugging Face's package, of a version transformers accepts, with every name it asks for."""
    folder, version = tmp_path_factory.mktemp("theirs"), KERNELS_MIN_VERSION
    (folder / "kernels").mkdir()
    (folder / "kernels/__init__.py").write_text(
        f"__version__ = {version!r}\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'):\n"
        "        raise AttributeError(name)\n"
        "    return type(name, (), {'__init__': lambda self, *a, **k: None})\n"
    )
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["theirs-absent", "theirs-present"])
def world(request, pythons, theirs, tmp_path_factory) -> tuple[Path | str, dict]:
    """The folder that holds their package, or nothing, and what an environment without us answers then."""
    path = theirs if request.param else ""
    without_us = json.loads(
        run(pythons["checkout"], "-c", PROBE, cwd=tmp_path_factory.mktemp("empty"), python_path=path)
    )
    assert without_us["used"] == request.param, "the stand-in does not do its work"
    return path, without_us


@pytest.mark.parametrize("way", ["checkout", "editable", "wheel"])
def test_kernels_are_ours_and_theirs_stay_theirs(way, world, pythons, checkout, tmp_path):
    path, without_us = world
    cwd = checkout if way == "checkout" else tmp_path
    answer = json.loads(run(pythons[way], "-c", PROBE, "longpo_ops", cwd=cwd, python_path=path))
    expected = without_us | {"ours": "longpo_ops.kernels.probe"}
    if way == "checkout" and not path:
        expected["theirs"] = "namespace"  # what any folder of that name in the current one gives: empty, and not used
    assert answer == expected


@pytest.mark.quick
def test_the_folders_are_links_and_kernels_is_no_regular_package():
    for name, folder in (("csrc", "csrc"), ("kernels", "kernels"), ("tiny", "examples/tiny")):
        assert os.readlink(ROOT / "longpo_ops" / name) == f"../{folder}"
    assert not (ROOT / "kernels/__init__.py").exists(), "an __init__.py here shadows Hugging Face's package"


@pytest.mark.quick
def test_import_is_light():
    code = (
        "import sys, longpo_ops\n"
        "assert 'torch' not in sys.modules, 'import longpo_ops'\n"
        "values = [getattr(longpo_ops, name) for name in longpo_ops.__all__]\n"
        "print(len(values), sorted({'triton', 'transformers'} & set(sys.modules)))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == f"{len(longpo_ops.__all__)} []"
    assert set(longpo_ops.__all__) <= set(dir(longpo_ops))


@pytest.mark.quick
def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_loss"):
        _ = longpo_ops.no_such_loss


NOT_INSTALLED = {f"longpo_ops/tiny/{name}" for name in ("pretrain.py", "model/pretraining.json", "model/README.md")}


def test_wheel_holds_the_library_and_its_sources_only(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    code = {n for n in names if ".dist-info/" not in n}
    assert {n.split("/")[0] for n in code} == {"longpo_ops"}
    assert not [n for n in code if "/test" in n or "__pycache__" in n]
    assert not code & NOT_INSTALLED  # how the demo's model was made is no part of what the demo needs
    folders = (("csrc", "csrc"), ("kernels", "kernels"), ("examples/tiny", "tiny"), ("longpo_ops", "."))
    for folder, below in folders:
        for file in (checkout / folder).rglob("*"):
            if file.suffix in (".py", ".cpp", ".cu", ".h", ".yaml", ".txt", ".json", ".jinja", ".safetensors"):
                inside = Path("longpo_ops", below, file.relative_to(checkout / folder)).as_posix()
                assert (inside in names) == (inside not in NOT_INSTALLED), inside


def test_wheel_metadata(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = Distribution.at(next(tmp_path.glob("*.dist-info")))
    assert found.version == longpo_ops.__version__
    assert found.metadata["License"] == "Apache-2.0" and found.metadata["Requires-Python"] == ">=3.11"
    assert set(found.metadata.get_all("Provides-Extra")) == {
        "bench",
        "dev",
        "evaluate",
        "flash",
        "generate",
        "memory",
        "office",
        "train",
        "vllm",
    }
    assert [(e.name, e.value) for e in found.entry_points] == [("longpo", "longpo_ops.cli:main")]
    assert "torch<2.14,>=2.11" in found.requires


@pytest.mark.skipif(not shutil.which("g++") and os.environ.get("CI") != "true", reason="no C++ compiler here")
@pytest.mark.parametrize("way", ["editable", "wheel"])
def test_compiler_at_hand_prebuilds_the_cpu_backend(way, pythons, tmp_path):
    """The library of the install is the one that is loaded: nothing is compiled into the user's cache."""
    cache = tmp_path / "cache"
    code = (
        f"import os; os.environ['LONGPO_OPS_CACHE'] = {str(cache)!r}\n"
        "from longpo_ops.ops.build import NATIVE, load_cpu\n"
        "load_cpu()\n"
        "assert any(line.split()[-1].startswith(str(NATIVE)) for line in open('/proc/self/maps'))"
    )
    run(pythons[way], "-c", code, cwd=tmp_path)
    assert not cache.exists()


def test_source_archive_builds_and_installs_without_a_compiled_backend(checkout, tmp_path):
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    name = run(sys.executable, "-c", code, cwd=checkout).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path, filter="data")
    tree = tmp_path / name.removesuffix(".tar.gz")
    assert (tree / "longpo_ops/kernels/probe.py").is_file() and not list(tree.rglob("test_*.py"))
    shutil.rmtree(tree / "longpo_ops/csrc/cpu")  # now nothing can be compiled, and the install says so and goes on
    python = environment(tmp_path / "environment")
    said = install(python, tree)
    assert said.count("the C++ CPU back-end is not prebuilt (") == 1
    answer = json.loads(run(python, "-c", PROBE, "longpo_ops", cwd=tmp_path))
    assert answer["ours"] == "longpo_ops.kernels.probe"
