"""The process that answers: orders come in as lines of JSON, rows go out as they are done.

    in   {"question": name, "only": keys or null, "done": keys, "seed": n, "until": unix time, "pace": measured/expected}
    out  {"head": ...} once;  {"start": key} and {"row": {...}} for each row;  {"end": question}

It dies with its parent. A row that leaves the device unusable ends it with status BROKEN, after the row is told.

Tests: tests/benchmarks/gpu/test_check.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import torch

from ..stamp import stamp
from .questions import BY_NAME, Question
from .rows import Row, perform
from .setting import REHEARSAL, Setting, setting_here

BROKEN = 3
LARGE = 1 << 30  # bytes of a row after which the allocator's cache is emptied


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it died before the line above
        os._exit(1)


def count_compiles() -> Callable[[], int]:
    """-> how many kernels Triton has compiled in this process, caches aside."""
    compiled = []

    def listener(*, cache_hit, **_):
        if not cache_hit:
            compiled.append(1)

    try:
        from triton import knobs
    except ImportError:
        return lambda: 0
    knobs.compilation.listener = listener
    return lambda: len(compiled)


def answer(question: Question, order: dict, setting: Setting, compiled: Callable[[], int]) -> Iterator[dict]:
    """The messages of one order."""
    for row in question.rows(setting):
        if row.key in order["done"] or (order["only"] is not None and row.key not in order["only"]):
            continue
        yield {"start": row.key}
        yield {"row": {"question": question.name} | row.name | _result(row, order, setting, compiled)}
    yield {"end": question.name}


def _result(row: Row, order: dict, setting: Setting, compiled: Callable[[], int]) -> dict:
    if (shortage := row.shortage(setting)) is not None:
        return {"status": f"skipped: {shortage}"}
    if row.seconds * order["pace"] > order["until"] - time.time():
        return {"status": f"skipped: no time: it would take {row.seconds * order['pace']:.0f} s"}
    start, before = time.monotonic(), compiled()
    result = perform(row, order["seed"])
    if row.device_bytes >= LARGE:
        gc.collect()
        if setting.on_gpu and not device_is_broken(setting):  # else the row could not be told
            torch.cuda.empty_cache()
    return result | {"took": time.monotonic() - start, "expected": row.seconds, "compiled": compiled() - before}


def device_is_broken(setting: Setting) -> bool:
    if not setting.on_gpu:
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--host-bytes", type=int)
    options = parser.parse_args()
    _die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints is no message

    def tell(message: dict) -> None:
        print(json.dumps(message), file=out, flush=True)

    setting, compiled = REHEARSAL if options.rehearse else setting_here(options.host_bytes), count_compiles()
    memory = {"device_bytes": setting.device_bytes, "host_bytes": setting.host_bytes}
    tell({"head": stamp() | {"card": setting.card} | memory})
    for line in sys.stdin:
        order = json.loads(line)
        for message in answer(BY_NAME[order["question"]], order, setting, compiled):
            tell(message)
            if "row" in message and device_is_broken(setting):  # also after a peer that is only "skipped"
                os._exit(BROKEN)


if __name__ == "__main__":
    main()
