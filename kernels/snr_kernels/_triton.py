"""What the Triton kernels share: how they are launched, and which programs a sequence gets.

Also rows that can be read 16 bytes at a time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from snr_kernels.dispatch import interprets
from snr_kernels.segments import Segments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREADS = 256


class Configuration(NamedTuple):
    """A kernel and the constants it is compiled with."""

    kernel: Any
    dtype: torch.dtype  # of what is large
    constants: dict[str, Any]
    threads: int = THREADS  # per program, on every target
    stages: int = 3  # blocks on their way from memory; AMD's share of a compute unit holds two


def launch_options(configuration: Configuration, hip: bool) -> dict[str, int]:
    """Warps and stages on AMD or NVIDIA."""
    if hip:
        return {"num_warps": configuration.threads // 64, "num_stages": 2}
    return {"num_warps": configuration.threads // 32, "num_stages": configuration.stages}


def launch(configuration: Configuration, programs: int, *arguments: Any) -> None:
    device = arguments[0].device
    given = {**configuration.constants, **launch_options(configuration, hip=torch.version.hip is not None)}
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():  # no device: interpreted
        configuration.kernel[(programs,)](*arguments, **given)


def aligned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` with rows of whole 16 numbers that begin at whole 16: itself, or a copy filled up with zeros.

    Threads then read 16 bytes at a time, straight into shared memory. Odd layers are copied once, as kernels for them
    would read number by number, and every tile of tokens as often as there are tiles.
    """
    rows, width = x.shape
    of_integers = dtype == torch.bfloat16 and interprets()  # to the interpreter its bits are integers
    x = x.to(torch.float32 if of_integers else dtype)
    full = 16 * max(1, triton.cdiv(width, 16))
    if width == full and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(rows, full)
    copy[:, :width] = x
    return copy


class Programs(NamedTuple):
    """Those of a launch, in the order of the sequences."""

    segments: Segments  # of the programs: how many each sequence has
    sequences: Tensor  # the sequence of each program


def programs_of(segments: Segments, count: Callable[[Any], Any]) -> Programs:
    """``count(length)`` programs for each sequence; of an int on the host, and of a tensor on the device."""
    lengths = (end - begin for begin, end in itertools.pairwise(segments.bounds))
    bounds = tuple(itertools.accumulate(map(count, lengths), initial=0))
    counts = count(segments.cu_seqlens.diff())
    programs = Segments(bounds, torch.nn.functional.pad(counts.cumsum(0), (1, 0)))
    return Programs(programs, programs.ids())
