"""make gpu-pack: what a GPU machine that is offline would spend its minutes on, made here, without a GPU, into .carry/.

    python -m benchmarks.gpu.pack              all of it, then the proof that every launch finds its kernel
    python -m benchmarks.gpu.pack --compile    only what Triton's cache lacks, into it (carried.compile_missing)
    python -m benchmarks.gpu.pack --prove      run the rows on Triton's cache: how many kernels are found, how many compiled

The kernels are those that the rows of `make gpu-check` launch through Triton, ours and those of the peers carried as wheels:
the rows are run on a GPU that is not there (pretended.py). A row that raises stops the packing by its name. Run it with the
Python, torch and triton of the GPU machine: Triton's cache goes by its own binary.

Tests: tests/benchmarks/gpu/test_pack.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from triton import knobs

from ..stamp import ROOT, git, revision
from . import carried
from .pretended import DEVICE, Kernel, collected_kernels, load_launchers, pretended_gpu
from .questions import LONG, QUESTIONS
from .rows import Row
from .setting import H100, Setting

WHEELS = ROOT / "requirements" / "carried.txt"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PRETENDED = replace(H100, device=DEVICE, draws=1)
MOST_CARRIED = 40_000_000
MOST_WITH_TREE = 64 << 20
LAUNCHING = ("tiles", "public", "loss", "kernels")  # attention has no Triton kernel, whole steps have those of the loss
SLOW = ("partial_kernel",)  # compiled first, as they take longest


def launching_rows(setting: Setting = PRETENDED) -> Iterator[tuple[str, Row]]:
    """-> question and row, of those that may launch Triton's kernels."""
    for question in (*QUESTIONS, *LONG):
        if question.name in LAUNCHING:
            yield from ((question.name, row) for row in question.rows(setting) if row.backend not in ("cuda", "torch"))


def run(rows: Iterable[tuple[str, Row]]) -> int:
    """All rows, whatever comes out of them. Raises RuntimeError with the name of one that raises."""
    count = 0
    for question, row in rows:
        try:
            row.compute(0)
        except Exception as error:
            name = " | ".join([question, *row.key])
            raise RuntimeError(f"gpu-pack: {name}: {type(error).__name__}: {error}") from error
        count += 1
    return count


def collect(rows: Iterable[tuple[str, Row]] | None = None) -> list[Kernel]:
    """The kernels that the rows launch. Raises RuntimeError."""
    with pretended_gpu(), collected_kernels() as kernels:
        run(launching_rows() if rows is None else rows)
    return kernels


_work: list[Kernel] = []  # what forked processes take from: a kernel's source does not travel


def _compile(number: int) -> bool:
    """-> whether it was not in the cache yet."""
    compiled = []
    knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    _work[number].compile()
    return compiled[0]


def compile_all(kernels: list[Kernel], processes: int) -> int:
    """Into Triton's cache, in so many processes -> how many it lacked."""
    load_launchers()
    _work[:] = sorted(kernels, key=lambda kernel: kernel.name not in SLOW)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        return sum(done.result() for done in as_completed(pool.submit(_compile, n) for n in range(len(kernels))))


def prove(rows: Iterable[tuple[str, Row]] | None = None) -> dict:
    """Run the rows as on the device, but for the launch itself -> kernels found in the cache, and what had to be compiled."""
    counts = {"kernels": 0, "hits": 0, "compiled": [], "modules_compiled": 0}

    def listener(*, src, cache_hit, **_) -> None:
        counts["kernels"] += 1
        counts["hits"] += cache_hit
        counts["compiled"] += [] if cache_hit else [src.name]

    def build(name: str, src: str, srcdir: str, *_) -> str:
        counts["modules_compiled"] += 1
        knobs.build.impl = None
        try:
            return triton_build._build(name, src, srcdir, *_, [])
        finally:
            knobs.build.impl = build

    from triton.runtime import build as triton_build

    knobs.compilation.listener, knobs.build.impl = listener, build
    try:
        load_launchers()
        with pretended_gpu():
            counts["rows"] = run(launching_rows() if rows is None else rows)
    finally:
        knobs.compilation.listener = knobs.build.impl = None
    return counts


# ---- the folder ------------------------------------------------------------------------------------------------------


def pack_kernels(carry: Path, processes: int, rows: Iterable[tuple[str, Row]] | None = None) -> dict:
    """The kernels of the rows into carry/triton.tar.xz, by way of an empty cache -> what pack.json says of them.

    Peers are imported from carry's wheels, which this process can import meanwhile.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as site:
        carried.unpack_wheels(carry, Path(site))
        sys.path.append(site)
        knobs.cache.dir = folder
        try:
            kernels = collect(rows)
            collected = time.monotonic() - start
            compile_all(kernels, processes)
        finally:
            del knobs.cache.dir
            sys.path.remove(site)
        with tarfile.open(carry / "triton.tar.xz", "w:xz") as archive:
            archive.add(folder, arcname=".", filter=_anonymous)
    return {
        "kernels": len(kernels),
        "names": dict(Counter(sorted(kernel.name for kernel in kernels))),
        "triton_key": carried.triton_key(),
        "sources": carried.kernel_sources(),
        "seconds": {"collect": round(collected, 1), "compile": round(time.monotonic() - start - collected, 1)},
    }


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def describe(carry: Path, kernels: dict) -> None:
    """carry/pack.json. Raises RuntimeError outside of a git checkout: a report must name its commit."""
    if not git("rev-parse", "HEAD"):
        raise RuntimeError("gpu-pack: git names no commit here: expected a checkout")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    content = {**revision(), "python": platform.python_version(), **versions, **kernels}
    (carry / "pack.json").write_text(json.dumps(content, indent=1) + "\n")


def download_wheels(carry: Path) -> None:
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"]
    words += [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run([*words, "-d", str(carry / "wheels"), "-r", str(WHEELS)], check=True)


def tree_bytes() -> int:
    """Of what a copy of the working tree holds: tracked files, and untracked ones that git does not ignore."""
    names = git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return sum((ROOT / name).stat().st_size for name in set(names) if name and (ROOT / name).is_file())


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_sizes(carry: Path, tree: int) -> None:
    """Raises RuntimeError for what does not travel in one copy."""
    size = folder_bytes(carry)
    if size > MOST_CARRIED:
        raise RuntimeError(f"gpu-pack: {carry.name} holds {size} bytes: expected at most {MOST_CARRIED}")
    if size + tree > MOST_WITH_TREE:
        raise RuntimeError(
            f"gpu-pack: {carry.name} and the tree hold {size} + {tree} bytes: expected at most {MOST_WITH_TREE}; "
            "ignore or delete what need not travel"
        )


def check_proof(carry: Path) -> dict:
    """Unpacked elsewhere, in a fresh process, every launch finds its kernel. Raises RuntimeError where one does not."""
    with tempfile.TemporaryDirectory() as folder:
        environment, facts = carried.unpack(carry, Path(folder))
        if carried.need_compiling(facts) or "failures" in facts:
            raise RuntimeError(f"gpu-pack: what was packed does not unpack: {facts}")
        words = [sys.executable, "-m", "benchmarks.gpu.pack", "--prove"]
        done = subprocess.run(
            words, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
        )
    proof = json.loads(done.stdout.splitlines()[-1])
    if proof["compiled"] or proof["modules_compiled"] or proof["hits"] != facts["kernels"]:
        raise RuntimeError(f"gpu-pack: the carried cache was missed: {proof}")
    return proof


def pack(carry: Path, processes: int) -> None:
    start = time.monotonic()
    carry.mkdir(exist_ok=True)
    for name in ("wheels", "triton.tar.xz", "pack.json"):
        path = carry / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not list((carry / "native").glob("cuda-*.so")):
        raise RuntimeError(
            f"gpu-pack: no compiled csrc/cuda in {carry.name}/native: expected what the Makefile puts there"
        )
    download_wheels(carry)
    kernels = pack_kernels(carry, processes)
    describe(carry, kernels)
    check_sizes(carry, tree := tree_bytes())
    proof = check_proof(carry)
    print("gpu-pack: " + ", ".join(f"{name} {count}" for name, count in kernels["names"].items()))
    print(f"gpu-pack: {proof['rows']} rows launch {proof['kernels']} kernels: {proof['hits']} found, none compiled")
    for path in sorted(carry.iterdir()):
        size = folder_bytes(path) if path.is_dir() else path.stat().st_size
        print(f"gpu-pack: {path.name:16} {size:>12,} bytes")
    print(
        f"gpu-pack: {carry.name} {folder_bytes(carry):,} bytes and the tree {tree:,}; {time.monotonic() - start:.0f} s"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="that compile side by side")
    parser.add_argument("--compile", action="store_true", help="only what Triton's cache lacks")
    parser.add_argument("--prove", action="store_true", help="only count what Triton's cache holds")
    options = parser.parse_args(arguments)
    if options.prove:
        print(json.dumps(prove()))
    elif options.compile:
        start = time.monotonic()
        kernels = collect()
        compiled = compile_all(kernels, options.processes)
        print(json.dumps({"kernels": len(kernels), "compiled": compiled, "seconds": time.monotonic() - start}))
    else:
        pack(carried.CARRY, options.processes)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
