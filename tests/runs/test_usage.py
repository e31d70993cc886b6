"""The peak is this process's own, whatever the process that started it has taken."""

from __future__ import annotations

import os
import subprocess
import sys

from longpo_ops.runs.usage import peak_bytes

MIB = 1 << 20


def test_a_small_process_started_by_a_large_one_has_a_small_peak():
    large = bytearray(os.urandom(1)) * (600 * MIB)
    code = "from longpo_ops.runs.usage import peak_bytes; print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5 * MIB < int(done.stdout) < 300 * MIB < len(large) < peak_bytes()


def test_what_was_taken_and_given_back_is_in_it():
    before = peak_bytes()
    block = bytearray(os.urandom(1)) * (before + 50 * MIB)
    del block
    assert peak_bytes() >= before + 50 * MIB
