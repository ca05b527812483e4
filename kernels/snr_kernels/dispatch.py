"""Which path of an op computes: torch or Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton kernels run on CPU tensors, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether ``impl`` means the Triton kernels for this tensor.

    Raises:
        ValueError: an unknown ``impl``, or ``"triton"`` where it cannot run.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl: expected 'auto', 'torch' or 'triton', got {impl!r}")
    if impl == "torch":
        return False
    reason = _why_not_triton(tensor)
    if impl == "triton" and reason:
        raise ValueError(f"impl: 'triton' cannot run here: {reason}")
    return not reason and (tensor.is_cuda or impl == "triton")


def _why_not_triton(tensor: Tensor) -> str:
    if not has_triton():
        return "the package triton is not installed"
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and interprets()):
        return f"expected a CUDA or ROCm tensor, or TRITON_INTERPRET=1 on a CPU, got {tensor.device}"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"expected float32, bfloat16 or float16, got {tensor.dtype}"
    return ""
