"""Compiles the C++ of csrc/ once, and finds the result again: prebuilt in the package, else in a per-user cache.

    <name>-<16 hex digits of the sources and flags>.so     in longpo_ops/_native (made at install) or in cache_folder()

The name holds all that a stale library could get wrong: for csrc/cpu the torch version and the CPU capability, and a
hash of every source and flag. The last 32 bytes of a file are the SHA-256 of those before it, so a damaged file is
found before it is mapped into the process, and compiled again. A file lock and an atomic rename keep two processes
apart. The module imports nothing of the package and does nothing on import: setup.py loads it by its path.

Tests: tests/ops/test_cpu_tiles.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
NATIVE = PACKAGE / "_native"
DIGEST_BYTES = 32
CAPABILITY_FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """A library that cannot be compiled or loaded here; its text says why."""


def cache_folder() -> Path:
    """LONGPO_OPS_CACHE, else longpo_ops in the user's cache folder."""
    if chosen := os.environ.get("LONGPO_OPS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "longpo_ops"


def source_folder(name: str) -> Path:
    """csrc/`name`: in the package (a wheel), else beside it (a checkout)."""
    inside = PACKAGE / "csrc" / name
    return inside if inside.is_dir() else PACKAGE.parent / "csrc" / name


def cached_library(name: str, sources: list[Path], command: list[str]) -> Path:
    """The shared library that `command` (compiler and flags) makes of `sources`, compiled where no earlier run did so.

    Headers among the sources count for the name but are not given to the compiler. Raises BuildError when there is no
    compiler, it fails, or the cache cannot be written.
    """
    file = _file_name(name, sources, command)
    prebuilt, path = NATIVE / file, cache_folder() / file
    if _intact(prebuilt):
        return prebuilt
    if _intact(path):
        return path
    try:
        with _locked(path.with_suffix(".lock")):
            if not _intact(path):  # another process may have compiled it meanwhile
                _compile(path, sources, command)
    except OSError as error:
        raise BuildError(
            f"cannot write {path}: {error}; set LONGPO_OPS_CACHE to a folder that can be written"
        ) from error
    return path


def kept_once(path: Path, make: Callable[[], str]) -> str:
    """The text of a file of the cache, which the first process makes. Raises BuildError or OSError where it cannot be kept."""
    if not path.exists():
        with _locked(path.with_suffix(".lock")):
            if not path.exists():  # another process may have made it meanwhile
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made = Path(folder) / path.name
                    made.write_text(make(), encoding="utf-8")
                    os.replace(made, path)
    return path.read_text(encoding="utf-8")


def compile_cpu(destination: Path) -> Path:
    """Compiles csrc/cpu into the folder `destination`, for the torch and the CPU at hand. Raises BuildError."""
    path = Path(destination) / cpu_library_name()
    _compile(path, *_cpu_arguments()[1:])
    return path


def cpu_library_name() -> str:
    """The file name of csrc/cpu compiled for the torch and the CPU at hand: another one for other sources or flags."""
    return _file_name(*_cpu_arguments())


@functools.cache
def load_cpu() -> None:
    """Makes torch.ops.longpo_cpu available, compiling it first where need be. Raises BuildError."""
    import torch

    path = cached_library(*_cpu_arguments())
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} was compiled but does not load: {error.__cause__ or error}") from error


def _cpu_arguments() -> tuple[str, list[Path], list[str]]:
    """name, sources and command of csrc/cpu. -fopenmp names the OpenMP library that torch has already loaded."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITY_FLAGS:  # other processors: ATen's vectors of the compiler's default target
        capability = "DEFAULT"
    torch_folder = Path(torch.__file__).parent
    command = [
        *shlex.split(os.environ.get("CXX") or "g++"),
        *("-shared", "-fPIC", "-O3", "-std=c++20", "-fopenmp", "-Wno-psabi"),
        *(f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *CAPABILITY_FLAGS.get(capability, [])),
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
        *("-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"),
    ]
    sources = sorted(path for path in source_folder("cpu").glob("*") if path.suffix in (".cpp", ".h"))
    if not sources:
        raise BuildError(f"no C++ sources in {source_folder('cpu')}")
    return f"cpu-torch{torch.__version__}-{capability.lower()}", sources, command


def _file_name(name: str, sources: list[Path], command: list[str]) -> str:
    """The paths in the command stay out of the hash: they differ between an isolated install and a later run."""
    flags = [word for word in command[1:] if not word.startswith(("-I", "-L"))]
    key = hashlib.sha256(repr(flags).encode())
    for source in sources:
        key.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{name}-{key.hexdigest()[:16]}.so"


def _compile(path: Path, sources: list[Path], command: list[str]) -> None:
    """Compiles into `path` by way of a temporary file beside it; several files as one, whose headers are read once: 21 s
    instead of 36."""
    if shutil.which(command[0]) is None:
        raise BuildError(f"no compiler: {command[0]!r} is not on PATH. Install it, or name another in CXX")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        *before, last = [str(source) for source in sources if source.suffix not in (".h", ".cuh")]
        included = [word for source in before for word in ("-include", source)]
        run = subprocess.run([*command, "-o", str(made), *included, last], capture_output=True, text=True)
        if run.returncode != 0:
            lines = run.stderr.strip().splitlines() or ["no message"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise BuildError(f"{command[0]} failed with status {run.returncode}: {error}")
        library = made.read_bytes()
        made.write_bytes(library + hashlib.sha256(library).digest())
        os.replace(made, path)


def _intact(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


@contextmanager
def _locked(path: Path):
    """One process at a time; the lock goes with the process that holds it."""
    try:
        import fcntl
    except ImportError as error:
        raise BuildError("compiling at first use needs file locks of Linux or macOS") from error
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
