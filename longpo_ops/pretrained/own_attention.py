"""The attention that a model was loaded with, held against the one that is written out in its own file.

    sdpa(ids) = eager(ids)    for a small model (probe.py) whose scores are large, as those of trained models are

does not hold of every model: transformers loads Gemma 2 with PyTorch's attention, which knows no soft-cap, and says so nowhere.
Such a model is given its eager attention, whose scores take rows x rows of memory. Cost: 0.1 to 0.5 s of a processor, once
for a config. Not covered: flash attention, which runs on a GPU only, and knows soft-caps.

Tests: tests/pretrained/test_own_attention.py.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .probe import Refused, build, difference, pick_layers, randomise, remembered, shake
from .small import small_config

log = logging.getLogger("longpo_ops.pretrained")

WINDOW, TOKENS = 5, 24
LARGE = 3.0  # times the weights of a fresh model: scores are some ten, where soft-caps show
TOLERANCE = 1e-3  # of the largest logit


def use_right_attention(model: nn.Module) -> None:
    """Gives a transformers model its eager attention where PyTorch's, with which it was loaded, computes other numbers; that is
    told as a warning. A model that cannot be tried small stays as it is."""
    if model.config._attn_implementation != "sdpa":
        return
    if not (off := _difference(type(model), model.config)):
        return
    model.set_attn_implementation("eager")
    log.warning(
        "%s is given its eager attention: PyTorch's computes other numbers (%.1e of the largest logit), as it leaves out "
        "what it does not know, a soft-cap of scores for one. Eager attention takes rows x rows of memory; a model that is "
        "loaded with attn_implementation='flash_attention_2' does not",
        type(model).__name__,
        off,
    )


@remembered
@torch.no_grad()
def _difference(kind: type[nn.Module], config: Any) -> float:
    """Of the logits of a few tokens, as a share of the largest; 0 where it may be rounding, and where no small model runs."""
    try:
        layers, _ = pick_layers(kind, config)
    except Refused:
        layers = None
    try:
        model = build(kind, small_config(config, WINDOW, layers), "eager")
        randomise(model)
        for weight in model.parameters():
            weight.mul_(LARGE if weight.ndim > 1 else 1.0)
        ids = torch.randint(3, min(model.config.get_text_config().vocab_size, 100), (1, TOKENS))
        eager = {"logits": model(input_ids=ids).logits}
        model.set_attn_implementation("sdpa")
        off = difference({"logits": model(input_ids=ids).logits}, eager)[1]
        model.set_attn_implementation("eager")
        shake(model)
        rounding = difference({"logits": model(input_ids=ids).logits}, eager)[1]
        return off if off > max(TOLERANCE, 10 * rounding) else 0.0
    except Exception:  # of any kind: of a model that was never tried
        return 0.0
