"""Scratch is what the caller says, for any number of rows: counted in the allocator, and as memory of a fresh process.

    scratch = peak - (inputs + delivered gradients + results + the float32 head gradient)

The allocator's own count is exact but sees tensors only. The process's resident high-water mark sees everything; its
constant part (interpreter, libraries, thread pools, the product library's packing buffers) is taken away by a first
call with few rows in the same process, after which the mark is reset. A million rows are for the allocator alone. Exact
numbers of fixed cases, and the PyTorch form on a GPU, are in test_costs.py.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from longpo_ops import fused_preference_loss, linear_cross_entropy, linear_kl, linear_logprobs, packed_preference_loss
from longpo_ops.ops.sweep import scratch_bytes

ROOT = Path(__file__).resolve().parents[2]
V, H = 64, 8
ROWS = (4_096, 65_536, 1_048_576)
MiB = 1 << 20


def cross_entropy(N, hidden, weight, **more):
    return linear_cross_entropy(hidden, weight, torch.arange(N) % V, **more)


def weighted_cross_entropy(N, hidden, weight, **more):
    return linear_cross_entropy(hidden, weight, torch.arange(N) % V, row_weights=torch.ones(N), **more)


def logprobs(N, hidden, weight, **more):
    return linear_logprobs(hidden, weight, torch.arange(N) % V, **more).sum()


def preference(N, hidden, weight, answers, **more):
    """Two pairs in halves of the rows, `answers` answer tokens at the end of each sequence, NLL on all chosen rows."""
    chosen, rejected = (part.requires_grad_() for part in hidden.detach().view(2, 2, N // 4, H))
    tokens = (torch.arange(N) % V).view(2, 2, -1)
    labels = tokens.clone()
    labels[..., :-answers] = -100
    return fused_preference_loss(
        chosen, rejected, weight, *labels, objective="simpo", nll_labels=tokens[0], **more
    ).loss


def single_visit(N, hidden, weight, **more):
    return preference(N, hidden, weight, 64, **more)


def scored_first(N, hidden, weight, **more):
    return preference(N, hidden, weight, N // 4 - 1, **more)


def many_pairs(N, hidden, weight, **more):
    """Pairs of 16,384 rows, so that their number grows with N."""
    sequences = torch.arange(N) // min(8192, N // 2)
    pairs = max(1, N // 16_384)
    return packed_preference_loss(
        hidden, weight, torch.arange(N) % V, sequences // 2 + pairs * (sequences % 2), num_chosen=pairs,
        rejected_pair=torch.arange(pairs), objective="simpo", **more,
    ).loss  # fmt: skip


def kl(N, hidden, weight, **more):
    teacher = hidden.detach()[:, :1].expand(N, H)  # no memory of its own
    return linear_kl(hidden, weight, teacher, weight.detach(), **more)


CASES = {
    f.__name__: f for f in (cross_entropy, weighted_cross_entropy, logprobs, single_visit, scored_first, many_pairs, kl)
}


def budget(name: str, dtype=torch.float32) -> int:
    """16 MiB: room for some thousand rows beside the fixed blocks."""
    fixed, _ = scratch_bytes(torch.empty(V, H, dtype=dtype), dtype, 2 if name == "kl" else 1)
    return fixed + 8 * MiB


def inputs(N, dtype=torch.float32):
    return torch.randn(N, H).to(dtype).requires_grad_(), torch.randn(V, H).to(dtype).requires_grad_()


def delivered(hidden, weight) -> int:
    """dh, dW, and the float32 dW where that is another tensor."""
    own = 4 * weight.numel() if weight.dtype.itemsize < 4 else 0
    return hidden.numel() * hidden.dtype.itemsize + weight.numel() * weight.dtype.itemsize + own


def labels_and_results(name, N) -> int:
    """What the cases above allocate themselves (labels, weights, sequence numbers), and per-row results."""
    return {"weighted_cross_entropy": 12, "logprobs": 16, "many_pairs": 48, "kl": 0}.get(name, 16) * N


def peak_of_tensors(call) -> int:
    """The most bytes of CPU tensors alive at once during call(), beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    alive = peak = 0
    for event in sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    assert peak > 0
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_scratch_of_tensors(name, dtype, backend):
    if backend not in ("torch", "cpu"):
        pytest.skip("counted in the CPU's allocator")
    scratch = {}
    for N in ROWS if backend == "torch" and dtype == torch.float32 else ROWS[:2]:
        hidden, weight = inputs(N, dtype)
        own = labels_and_results(name, N)
        options = dict(workspace_bytes=budget(name, dtype), backend=backend)
        call = functools.partial(CASES[name], N, hidden, weight, **options)
        scratch[N] = peak_of_tensors(lambda call=call: call().backward()) - delivered(hidden, weight) - own
    assert max(scratch.values()) <= budget(name, dtype), scratch


@pytest.fixture(scope="module")
def grown() -> dict[str, dict[str, int]]:
    """case -> {N: bytes}, each case in a process of its own, forked from one that has imported and computed nothing."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", LONGPO_OPS_BACKEND="torch", PYTHONPATH=str(ROOT))
    # large blocks go back to the system when they are freed, or the high-water mark would count holes
    environment |= dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")
    code = (
        "import os\n"
        "import torch._dynamo\n"  # seconds of a first call, for all of them at once
        "from tests.ops.test_workspace import CASES, measure\n"
        "for name in CASES:\n"
        "    if os.fork() == 0:\n"
        "        measure(name)\n"
        "        os._exit(0)\n"
        "    if os.wait()[1]:\n"
        "        raise SystemExit(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return {name: scratch for line in done.stdout.splitlines() for name, scratch in json.loads(line).items()}


@pytest.mark.parametrize("name", CASES)
def test_memory_of_a_fresh_process(name, grown):
    limit = budget(name) + 2 * MiB  # pages of the interpreter and of small blocks
    assert max(grown[name].values()) <= limit, grown[name]


def measure(name: str) -> None:
    """Prints {name: {N: bytes the resident high-water mark rose by, beyond what is delivered}}."""

    def status(field: str) -> int:
        with open("/proc/self/status") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

    def run(N: int) -> int:
        hidden, weight = inputs(N)
        own = labels_and_results(name, N)
        before = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        CASES[name](N, hidden, weight, workspace_bytes=budget(name)).backward()
        return status("VmHWM") - before - delivered(hidden, weight) - own

    run(4_096)
    print(json.dumps({name: {N: run(N) for N in (4_096, 131_072)}}), flush=True)
