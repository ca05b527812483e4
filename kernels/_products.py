"""Matrix products summed in float32 at least, whatever their dtype, and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8 and a GPU
COPIED = 1024  # rows or columns of a float32 copy


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b``, summed in float32 at least and rounded once."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        add_product(out.zero_(), a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, with ``total`` in float32 at least."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and HAS_OUT_DTYPE:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        for start in range(0, a.shape[1], COPIED):  # copies of a bounded size
            inner = slice(start, start + COPIED)
            total.addmm_(a[:, inner].to(total.dtype), b[inner].to(total.dtype))
