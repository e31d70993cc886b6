"""Other libraries' offload of layer inputs beside ours in offload.py: where each runs and how it is switched on.

    transformers   checkpoints in pinned host memory (save_on_cpu), on the compute stream; here
    DeepSpeed      a pinned pool and a stream beside (CheckpointHiddenStatesOffload); ported from axolotl's
    axolotl        files of a temporary folder, written and prefetched by threads (Disco)

The last two need pins of their own, so an environment of their own (requirements/offload.txt). A peer is given a model whose
layers are checkpointed and returns a context for each forward and backward, and a function that counts the tensors it has
moved since: of one that moves nothing on this device there is no time to compare, and the row says so (counted() below). Not
covered: axolotl's offload to the host, which is DeepSpeed's, and peers beside tiles.

Tests: tests/benchmarks/training/test_offload.py.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

Attached = tuple[AbstractContextManager, Callable[[], int] | None]  # None: it does not count


class Peer(NamedTuple):
    attach: Callable[..., Attached]
    own_environment: bool


def _transformers(model) -> Attached:
    model.gradient_checkpointing_enable({"use_reentrant": False}, offload=True)
    return nullcontext(), None


def _deepspeed(model) -> Attached:
    from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload

    around = CheckpointHiddenStatesOffload()
    return around, lambda: around.stats.offloaded_tensors


def _axolotl_disk(model) -> Attached:
    from axolotl.monkeypatch.gradient_checkpointing import Disco, hf_grad_checkpoint_disk_offload_wrapper

    for layer in model.model.layers:
        layer._gradient_checkpointing_func = hf_grad_checkpoint_disk_offload_wrapper
    return nullcontext(), lambda: Disco.get_instance().idx


PEERS = {
    "transformers' offload to the host": Peer(_transformers, False),
    "DeepSpeed's offload to the host": Peer(_deepspeed, True),
    "axolotl's offload to disk": Peer(_axolotl_disk, True),
}


def attach(setting: str, model) -> Attached:
    """Switches a peer on; of a setting of ours nothing."""
    return PEERS[setting].attach(model) if setting in PEERS else (nullcontext(), None)


def counted(moved: Callable[[], int] | None) -> dict:
    """{"moved": tensors}, with a status where there are none."""
    if moved is None:
        return {}
    tensors = moved()
    return {"moved": tensors} | ({} if tensors else {"status": "runs, but moves nothing off this device"})
