"""Which float32 products of a CPU are csrc/cpu's and which torch's: measured once for a processor, then remembered.

    logits   Z = h W^T          hidden   dh = dZ W          head   dW += dZ^T h

Neither is the faster one everywhere: it differs between processors, and between the three. torch's logits are its product of
a slice of the head's rows by one thread each (csrc/cpu/products.cpp), its other two one call. So at the first use with a
number of threads each is timed both ways on ROWS rows (a tenth of a second), and the answer is kept beside the compiled
library, for that, this processor and number of threads: later processes compute the same bits. Where that folder cannot be
written, each process measures by itself. LONGPO_OPS_PRODUCTS=blocks or torch forces one for all three; blocks gives the same
bits with any number of threads.

Tests: tests/ops/test_fastest.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..kinds import check_choice
from .build import BuildError, cache_folder, cpu_library_name, kept_once

LOGITS, HIDDEN, HEAD = PRODUCTS = ("logits", "hidden", "head")
VARIABLE, FORMS = "LONGPO_OPS_PRODUCTS", ("blocks", "torch")
ROWS, VOCAB, WIDTH = 256, 1024, 512  # half of the rows were not enough to tell logits apart in each of three tries
SLICE = 512  # rows of the head that each thread has at least, as it has of a real one
ROUNDS = 5  # of both forms in turn; the least time of each counts


def products_by_blocks(dtype: torch.dtype) -> tuple[str, ...]:
    """The products that csrc/cpu computes for operands of this dtype; torch's of 16 bits would round their results.

    Raises ValueError for a LONGPO_OPS_PRODUCTS that is neither blocks nor torch."""
    if dtype != torch.float32:
        return PRODUCTS
    forced = os.environ.get(VARIABLE)
    if forced:
        return PRODUCTS if check_choice(VARIABLE, forced, FORMS) == "blocks" else ()
    return _remembered(torch.get_num_threads())


def explain_products() -> str:
    """Which form each product takes with the threads of now, in words."""
    own = products_by_blocks(torch.float32)
    others = [name for name in PRODUCTS if name not in own]
    told = [
        f"{whose} products ({', '.join(names)})" for whose, names in (("its own", own), ("torch's", others)) if names
    ]
    return " and ".join(told) + (f" ({VARIABLE})" if os.environ.get(VARIABLE) else "")


@functools.cache
def _remembered(threads: int) -> tuple[str, ...]:
    def found() -> str:
        return json.dumps({"threads": threads, "by_blocks": measure()})

    try:
        told = json.loads(kept_once(file(threads), found))
    except (BuildError, OSError, ValueError):
        told = json.loads(found())
    return tuple(name for name in PRODUCTS if name in told["by_blocks"])


def file(threads: int) -> Path:
    """Where the answer for this processor is kept."""
    known = (_processor(), cpu_library_name(), threads, ROWS, VOCAB, SLICE, WIDTH)
    return cache_folder() / f"products-{hashlib.sha256(repr(known).encode()).hexdigest()[:16]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "; ".join(sorted({x for x in lines if x.startswith(("model name", "cpu family", "model\t", "stepping"))}))


def measure() -> list[str]:
    """The products that are faster by blocks."""
    runs = {(name, form): run for name, pair in _forms().items() for form, run in enumerate(pair)}
    least = dict.fromkeys(runs, float("inf"))
    with torch.autocast("cpu", enabled=False):
        for number in range(ROUNDS + 1):
            for key, run in runs.items():
                start = time.perf_counter()
                run()
                if number:  # the first one compiles
                    least[key] = min(time.perf_counter() - start, least[key])
    return [name for name in PRODUCTS if least[name, 0] < least[name, 1]]


def _forms() -> dict[str, tuple[Callable, Callable]]:
    """name -> the product by blocks, and torch's."""
    ops = torch.ops.longpo_cpu
    vocab = max(VOCAB, SLICE * torch.get_num_threads())
    h, w, z = torch.ones(ROWS, WIDTH), torch.ones(vocab, WIDTH), torch.ones(ROWS, vocab)
    dh, dw = torch.empty(ROWS, WIDTH), torch.zeros(vocab, WIDTH)
    return {
        LOGITS: (lambda: ops.logits_(h, w, z), lambda: ops.logits_by_slices_(h, w, z)),
        HIDDEN: (lambda: ops.hidden_gradient_(z, w, None, dh), lambda: torch.mm(z, w, out=dh)),
        HEAD: (lambda: ops.add_weight_gradient_(dw, z, h, False), lambda: torch.addmm(dw, z.t(), h, out=dw)),
    }
