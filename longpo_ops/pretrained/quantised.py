"""Weights of 4 and 8 bits: which ways of storing a body adapters may be trained on, and the tensors inside a weight.

    W ~ scale * code, frozen          the head, embeddings, norms and fused experts stay as they are

int8   torchao, any machine: a byte for each weight, a scale for each of its rows
nf4    bitsandbytes, 4-bit NormalFloat: half a byte for each weight, a scale for 64 of them, itself of 8 bits

A model is stored so already (quantization_config in its config.json), or is made so while it is loaded. Whether this machine
can load what is stored, and whether gradients pass through it, transformers' own quantiser says, before a weight is read.
Not covered: int4 of torchao, through which PEFT trains no adapters.

Tests: tests/train/test_qlora.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kinds import shown

NONE = "none"
SCHEMES = (NONE, "int8", "nf4")


def check_scheme(scheme: str) -> None:
    """Raises ValueError for the name of none."""
    if scheme == "int4":
        raise ValueError(
            "quantization='int4': torchao's weights of 4 bits need a package (mslk), and PEFT trains no adapters on them; "
            "expected 'nf4' (pip install bitsandbytes) for 4 bits, or 'int8'"
        )
    if scheme not in SCHEMES:
        raise ValueError(f"quantization={shown(scheme)}: expected one of {', '.join(SCHEMES)}")


def quantization_options(config, scheme: str, dtype: torch.dtype | None) -> dict:
    """What from_pretrained needs to make a model so while it loads it. dtype: of its other weights, in which it computes; None
    for the stored one's.

    Raises ValueError for a model that is quantised already, and where this machine cannot.
    """
    check_scheme(scheme)
    stored = getattr(config, "quantization_config", None)
    if scheme == NONE:
        if stored is not None:
            _quantiser(stored, True, config.name_or_path)
        return {}
    if stored is not None:
        raise ValueError(
            f"quantization={scheme!r}: its weights are quantised already ({_method(stored)}); leave the setting out, or give "
            "the model that it was made of"
        )
    made = _config_of(scheme, dtype or config.dtype or torch.float32)
    _quantiser(made, False)
    return {"quantization_config": made}


def _config_of(scheme: str, dtype: torch.dtype):
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if scheme == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig
    except ImportError as error:
        raise ValueError("quantization='int8': torchao is not installed; pip install torchao") from error
    return TorchAoConfig(Int8WeightOnlyConfig())


def _method(stored) -> str:
    told = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(told, "value", told))


def _quantiser(quantization, stored: bool, name: str = ""):
    """transformers' own. name: of the model that is stored so. Raises ValueError where there is none for it, and where it
    cannot work on this machine."""
    from transformers.quantizers import AutoHfQuantizer

    told = f"model {name!r}: its weights are quantised ({_method(quantization)})"
    told = told if stored else f"quantization={_method(quantization)}"
    try:
        quantiser = AutoHfQuantizer.from_config(quantization, pre_quantized=stored)
        quantiser.validate_environment(device_map=None, weights_only=True)
    except Exception as error:  # of many libraries, which are not there
        raise ValueError(
            f"{told}, which transformers cannot load here: {error}; install what it names, or give the model in full "
            "precision, and quantization=int8 or nf4 for adapters on fewer bits"
        ) from error
    return quantiser


def check_trainable(name: str, config) -> None:
    """Raises ValueError for a stored model through whose weights transformers trains no adapters."""
    if (stored := getattr(config, "quantization_config", None)) is None:
        return
    if not _quantiser(stored, True, name).is_trainable:
        raise ValueError(
            f"model {name!r}: its weights are quantised ({_method(stored)}), through which transformers trains no "
            "adapters; give it in full precision (load it with dequantize=True in its quantization config where transformers "
            "has that, and save_pretrained), and quantization=int8 or nf4 for adapters on fewer bits"
        )


def plain_parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors that a weight is made of, its codes first; one of a library's own kind holds several."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(weight, name))]


def is_plain(weight: Tensor) -> bool:
    """Whether its numbers are its own, of 16 bits or more, and no codes that others scale."""
    return weight.is_floating_point() and weight.itemsize > 1 and not hasattr(weight, "__tensor_flatten__")
