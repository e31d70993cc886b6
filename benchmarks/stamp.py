"""Where, with what, when and how a result was measured: what every JSON under results/ begins with.

Importing this is cheap: torch is imported where it is asked.

Tests: tests/benchmarks/losses/test_run.py.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "torchao"),
    *("cut-cross-entropy", "liger-kernel", "quack-kernels", "trl"),
)
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # what decides how fast a matrix product is


def stamp(**more) -> dict:
    """Date (UTC), command, commit, hardware and versions, then what the caller adds."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        **revision(),
        "hardware": hardware(),
        "versions": versions(),
    } | more


def revision() -> dict:
    """The commit and how many files differ from it; of a tree without .git, what LONGPO_COMMIT and LONGPO_CHANGED_FILES say."""
    commit = git("rev-parse", "HEAD")
    if commit:
        return {"commit": commit, "changed_files": len(git("status", "--porcelain").splitlines())}
    changed = os.environ.get("LONGPO_CHANGED_FILES")
    return {"commit": os.environ.get("LONGPO_COMMIT") or None, "changed_files": int(changed) if changed else None}


def command() -> str:
    """The command line from the checkout's root, without the paths of this machine."""
    words = [word.replace(f"{ROOT}{os.sep}", "") for word in sys.orig_argv[1:]]  # sys.argv has no `-m module`
    return " ".join(["python", *words])


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def hardware() -> dict:
    import torch

    info = _cpuinfo()
    flags = info.get("flags", info.get("Features", "")).split()
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "machine": platform.machine(),
        "processor": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [name for name in FEATURES if name in flags],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu and {"name": gpu.name, "bytes": gpu.total_memory, "count": torch.cuda.device_count()},
    }


def host_class() -> str:
    """A short name for machines that measure alike, such as x86_64-avx512_bf16-2core."""
    machine = hardware()
    return "-".join([machine["machine"], *machine["features"][-1:], f"{machine['cores']}core"])


def versions() -> dict:
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    return found | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's block of Linux's own list; empty elsewhere."""
    try:
        block = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
