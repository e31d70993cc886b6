"""Decoder layers by tiles of rows: no temporary of a layer is as long as the sequence, but what attention itself needs.

    q, k, v = rope(norm'(W n(x)))         rows of x at a time     saves x
    a       = attention(q, k, v)          as the model has it     saves q, k, v, a, logsumexp
    y       = h + mlp(n(h)), h = x + W a  rows of x, a at a time  saves x, a

x, y (B, T, H), q (B, heads, T, D), a (B, T, heads, D). This is a Llama; what a layer does before and after attention is its own
forward's affair (tiled_calls.py), and that it may be parted is proved (tile_proof.py). Both row-wise parts keep their inputs
only: the backward runs each tile's forward again and differentiates it, parameter gradients summed over tiles in float32
(rowwise.py). Memory: x, a, y, q, k, v and their gradients at full length, the temporaries of one tile, 4 bytes per parameter of
one part. Attention goes by groups of kv heads already, in shared-prefix attention. Under checkpointing the last part runs
twice, not three times; the projections to q, k and v do run three times: 3 % more products for an 8B Llama.

Layers that cannot be parted so (linear attention, state spaces, attention of their own code) have their row-wise modules tiled:
norms, the MLP, experts. A row's experts do not depend on its tile, and what transformers records of routers is put together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from longpo_ops.kinds import check_object, check_whole
from longpo_ops.memory.rowwise import RowWise
from longpo_ops.memory.tile_proof import Proof, forwards_of, prove
from longpo_ops.memory.tiled_calls import INTERFACE, restore, run_rowwise, run_split
from longpo_ops.pretrained.probe import layers_of

__all__ = ["ROWS", "RowWise", "TilingHandle", "explain_tiling", "is_tiled", "tile_layers"]

ROWS = 8192  # large enough for full matrix-product rates; an 8B model's MLP then takes about 1 GiB of temporaries


class TilingHandle:
    """Undoes tile_layers: by remove(), or at the end of a with block. proof: which layers are tiled, and in which parts."""

    def __init__(self, proof: Proof, forwards: dict[nn.Module, Callable]):
        self.proof = proof
        self._before = {module: module.__dict__.get("forward") for module in forwards}
        for module, forward in forwards.items():
            module.forward = forward
        INTERFACE.open()

    def remove(self) -> None:
        """Gives every module its former forward back."""
        if not self._before:
            return
        for module, forward in self._before.items():
            restore(module, forward)
        self._before = {}
        INTERFACE.close()

    def __enter__(self) -> TilingHandle:
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def tile_layers(model: nn.Module, rows: int = ROWS) -> TilingHandle:
    """Makes the decoder layers of a transformers causal LM (or a PEFT model of one), and its last norm, work by tiles of
    `rows` rows; the returned handle undoes it, and says what is tiled. Results are the model's own up to floating-point order.

    Which layers can be tiled, and in which parts, is proved on a small model of the same class and config, seconds for
    the first of its kind. Submodules are called as they are, so adapters, hooks and compiled submodules on them stay in force;
    those on the attention module as a whole do not, as it may not be called. With a cache of keys, and where attention weights
    are asked for, layers use their own forward.

    Raises ValueError for a model of which nothing can be tiled, one that is tiled already, and rows below 1.
    """
    causal = _causal(check_object("model", model, nn.Module, "a transformers model"))
    rows = check_whole("rows", rows, 1, "a whole number of rows per tile, at least 1")
    if is_tiled(model):
        raise ValueError("model: its layers are tiled already: remove() the handle first")
    config = getattr(causal, "config", None)
    if config is None:
        raise ValueError(f"model: a {type(causal).__name__} has no config of transformers, expected a causal LM of it")
    proof = prove(type(causal), config)
    if not proof:
        raise ValueError(
            f"model: nothing of {type(causal).__name__} (model type {config.model_type!r}) can be computed by tiles ({proof}): "
            "leave tile_rows out; offloading its activations does not need it"
        )
    return TilingHandle(proof, forwards_of(causal, proof, rows))


def explain_tiling(config) -> Proof:
    """What tile_layers would do for a causal LM of this transformers config: true if anything; its text says what. Needs no
    weights."""
    from transformers import AutoModelForCausalLM

    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return prove(model_class, config) if model_class else Proof(why=f"{config.model_type!r} is no causal LM")


def is_tiled(model: nn.Module) -> bool:
    """Whether tile_layers is in force."""
    forwards = [module.__dict__.get("forward") for layer in layers_of(_causal(model)) for module in layer.modules()]
    return any(isinstance(f, partial) and f.func in (run_split, run_rowwise) for f in forwards)


def _causal(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
