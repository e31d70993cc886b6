"""How much memory this process has taken at most.

The system's own mark of resident bytes. Memory of devices is torch's to tell; what other processes take is not in it.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The highest resident size in bytes since the process began, or since its mark was reset (/proc/self/clear_refs).

    Where a system keeps no such mark it is getrusage's, which on Linux may be the process's that started this one.
    """
    try:
        kib = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return int(kib[1]) * 1024
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
