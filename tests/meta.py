"""The meta device in the place of a GPU."""

import pytest
import torch

from longpo_ops.ops import products


def add_products_on_meta(dtype: torch.dtype, monkeypatch) -> None:
    """Products of 16 bits are added to float32 there, as a GPU's are; the question whether they can be is not asked."""
    if dtype.itemsize == 2 and torch.__version__ < (2, 12):
        pytest.skip("torch 2.11's meta kernel of addmm.dtype_out raises a TypeError")
    monkeypatch.setattr(products, "_addmm_takes_float32", lambda *_: True)
