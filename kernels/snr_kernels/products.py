"""Matrix products summed in float32 at least, whatever their dtype, and rounded once.

On a GPU as exactly as torch is told to: see ``torch.backends.cuda.matmul``.
"""

from __future__ import annotations

import torch
from torch import Tensor

HAS_OUT_DTYPE = hasattr(torch.ops.aten.mm, "dtype_out") and torch.version.hip is None  # torch 2.8
COPIED = 1 << 22  # numbers in a float32 copy: 16 MB


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``out = a b``."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and HAS_OUT_DTYPE:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        add_product(out.zero_(), a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a b``, with ``total`` in float32 at least."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and HAS_OUT_DTYPE:  # out of place: before torch 2.10 addmm wants all of it in one dtype
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        step = max(1, COPIED // (a.shape[0] + b.shape[1]))
        for start in range(0, a.shape[1], step):
            inner = slice(start, start + step)
            total.addmm_(a[:, inner].to(total.dtype), b[inner].to(total.dtype))
