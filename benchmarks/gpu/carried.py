"""What `make gpu-pack` sent along, put to use on the GPU machine: kernels, the CUDA library, wheels, the commit's name.

    unpack(.carry, folder) -> environment of the processes that compute, facts for the report

    .carry/pack.json         commit, versions, Triton's key, kernels
    .carry/triton.tar.xz     Triton's cache; the paths in its __grp__ files are made those of the folder
    .carry/native/*.so       the compiled csrc/cuda
    .carry/wheels/*.whl      packages that such machines lack

Triton looks kernels up by a key of its own (triton_key). Where that differs here, or kernels/ is not what was
packed, the kernels that are missing are compiled at once, in as many processes as there are cores. Whatever cannot be
unpacked becomes a fact, and the check runs without it. Not covered: another processor than x86-64, another Python than 3.12.

Tests: tests/benchmarks/gpu/test_pack.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from ..stamp import ROOT

CARRY = ROOT / ".carry"
LIMIT = 90.0  # seconds that compiling what is missing may take
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def unpack(carry: Path, into: Path) -> tuple[dict[str, str], dict]:
    """The folder `carry` into the folder `into`. Raises nothing: what fails is told in facts["failures"]."""
    start, facts, environment = time.monotonic(), {}, allocator()
    for step in (_pack, _kernels, _native, _wheels):
        try:
            environment |= step(carry, into, facts)
        except Exception as error:  # the check runs without it
            facts.setdefault("failures", {})[step.__name__.strip("_")] = f"{type(error).__name__}: {error}"[:300]
    return environment, facts | {"seconds": time.monotonic() - start}


def allocator() -> dict[str, str]:
    """Segments that grow, unless the user has chosen: without them the gaps between blocks are memory lost."""
    chosen = any(os.environ.get(name) for name in ALLOCATOR)
    return {} if chosen else {ALLOCATOR[0]: "expandable_segments:True"}


def _pack(carry: Path, into: Path, facts: dict) -> dict[str, str]:
    pack = json.loads((carry / "pack.json").read_text())
    facts |= {name: pack[name] for name in ("commit", "changed_files", "kernels")}
    facts["kernels_folder"] = "as packed" if pack["sources"] == kernel_sources() else "changed since it was packed"
    facts["triton_key"] = "not known"
    facts["triton_key"] = "the same" if pack["triton_key"] == triton_key() else "differs"
    return {"LONGPO_COMMIT": pack["commit"], "LONGPO_CHANGED_FILES": str(pack["changed_files"])}


def _kernels(carry: Path, into: Path, facts: dict) -> dict[str, str]:
    folder = (into / "triton").resolve()
    with tarfile.open(carry / "triton.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    for file in folder.glob("*/__grp__*.json"):
        paths = json.loads(file.read_text())["child_paths"]
        file.write_text(json.dumps({"child_paths": {name: str(file.parent / name) for name in paths}}))
    return {"TRITON_CACHE_DIR": str(folder)}


def _native(carry: Path, into: Path, facts: dict) -> dict[str, str]:
    shutil.copytree(carry / "native", into / "native", dirs_exist_ok=True)
    return {"LONGPO_OPS_CACHE": str((into / "native").resolve())}


def _wheels(carry: Path, into: Path, facts: dict) -> dict[str, str]:
    site = (into / "site").resolve()
    facts["wheels"] = unpack_wheels(carry, site)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))}


def unpack_wheels(carry: Path, site: Path) -> list[str]:
    """A wheel without scripts is an archive of what is imported -> names and versions."""
    wheels = sorted((carry / "wheels").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return ["-".join(wheel.name.split("-")[:2]) for wheel in wheels]


def kernel_sources() -> str:
    """A digest of what kernels are made from."""
    digest = hashlib.sha256()
    for file in sorted((ROOT / "kernels").glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def triton_key() -> str:
    """What Triton's cache goes by beside a kernel: its sources, its binary, ptxas, the environment. Needs no torch."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime import cache

    backend = make_backend(GPUTarget("cuda", 90, 32))
    parts = cache.triton_key(), backend.hash(), sorted(get_cache_invalidating_env_vars().items())
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def need_compiling(facts: dict) -> bool:
    """Whether launches would miss the carried cache."""
    failed = {"pack", "kernels"} & set(facts.get("failures", ()))
    return bool(failed) or facts["triton_key"] != "the same" or facts["kernels_folder"] != "as packed"


def compile_missing(environment: dict[str, str], processes: int | None = None, limit: float = LIMIT) -> dict:
    """What launches would miss, into the cache of that environment -> facts. It needs no GPU; raises nothing."""
    words = [sys.executable, "-m", "benchmarks.gpu.pack", "--compile", "--processes", str(processes or os.cpu_count())]
    options = {"cwd": ROOT, "env": os.environ | environment, "text": True, "start_new_session": True}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        out, err = process.communicate(timeout=limit)
        told = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"failed": err.strip()[-300:]}
    except subprocess.TimeoutExpired:
        told = {"failed": f"not done after {limit:.0f} s"}
    except (ValueError, IndexError) as error:
        told = {"failed": f"{type(error).__name__}: {error}"}
    finally:
        _end_group(process)
    return {"compiled_here": told}


def _end_group(process: subprocess.Popen) -> None:
    """The process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def prepare(carry: Path, into: Path, compile: Callable = compile_missing) -> tuple[dict[str, str], dict]:
    """unpack, and compile_missing where launches would miss the cache -> environment, facts."""
    environment, facts = unpack(carry, into)
    if need_compiling(facts):
        facts |= compile(environment)
    return environment, facts
