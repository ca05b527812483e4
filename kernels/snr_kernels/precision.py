"""In which precision sums are taken, whatever the dtype of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


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


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it, else float32."""
    return torch.float32 if device.type == "mps" else torch.float64
