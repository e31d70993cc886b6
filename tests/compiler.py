"""A C++ compiler for tests that build the same sources again: g++ behind a cache that all test processes share,
optimising less.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SCRIPT = """#!{python}
import fcntl, hashlib, os, shutil, subprocess, sys
from pathlib import Path

words = sys.argv[1:]
out = words.pop(words.index("-o") + 1)
words.remove("-o")
sources = [Path(word) for word in words if word.endswith(".cpp")]
key = hashlib.sha256(repr([word for word in words if not word.endswith(".cpp")]).encode())
for file in sorted(file for folder in {{source.parent for source in sources}} for file in folder.iterdir()):
    key.update(file.name.encode() + file.read_bytes())
made = Path({cache!r}, key.hexdigest())
with open(made.with_suffix(".lock"), "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not made.exists():
        status = subprocess.run([{compiler!r}, *words, "-O1", "-o", f"{{made}}.part"]).returncode
        if status:
            sys.exit(status)
        os.replace(f"{{made}}.part", made)
shutil.copyfile(made, out)
"""


def cached_compiler(tmp_path_factory) -> Path:
    """What CXX is set to."""
    base = tmp_path_factory.getbasetemp()
    cache = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "compiled"
    cache.mkdir(exist_ok=True)
    script = tmp_path_factory.mktemp("compiler") / "g++"
    compiler = os.environ.get("CXX", "g++")
    script.write_text(SCRIPT.format(python=sys.executable, cache=str(cache), compiler=compiler))
    script.chmod(0o755)
    return script
