"""What the ops share: torch or Triton, checks and layout of rows, and the count of what a launch must move."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "triton"]


class Cost(NamedTuple):
    """The least that a launch can do: what no implementation of the same op can avoid.

    Attributes:
        bytes: read from and written to device memory, each element once.
        flops: multiplications, additions, comparisons and exponentials, one each.
    """

    bytes: int
    flops: int


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton kernels run on CPU tensors, by its interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(impl: str, tensor: Tensor) -> bool:
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


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Without gradients, and without autocast, which would round the sums within."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def exact_dtype(*tensors: Tensor) -> torch.dtype:
    """That of sums: float32 at least."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def expect_integers(name: str, x: Tensor) -> None:
    """Raise a TypeError unless ``x`` holds integers."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}")


def expect_names(argument: str, names: Collection[str], known: Sequence[str]) -> frozenset[str]:
    """Some of the ``known`` names, or a ValueError."""
    if isinstance(names, str):
        raise ValueError(f"{argument}: expected a list of names, got the string {names!r}")
    if unknown := set(names) - set(known):
        raise ValueError(f"{argument}: expected some of {list(known)}, got {sorted(unknown)}")
    return frozenset(names)


def as_rows(x: Tensor) -> Tensor:
    """``[..., V]`` as ``[outer, inner, V]`` with last stride 1: a view, unless the strides allow none."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    leading, vocab = x.shape[:-1], x.shape[-1]
    for cut in range(len(leading) + 1):  # a slice such as logits[:, :-1] has no [N, V] view, but an [outer, inner, V]
        try:
            return x.view(math.prod(leading[:cut]), math.prod(leading[cut:]), vocab)
        except RuntimeError:
            pass
    return x.reshape(1, math.prod(leading), vocab)
