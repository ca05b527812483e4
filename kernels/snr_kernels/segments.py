"""Where the sequences of a packed stream of tokens begin: on the device for kernels, on the host for choices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from snr_kernels.checks import expect_integers


class Segments:
    """Sequences that follow each other in the rows of a tensor; some may be empty.

    Attributes:
        bounds: ``0 = bounds[0] <= bounds[1] <= ... <= bounds[S]``: sequence ``s`` has the rows from ``bounds[s]`` on.
        cu_seqlens: the same as an int64 tensor, ``[S + 1]``.
        max_length: rows of the longest sequence.
        length: rows of every sequence, where all have as many; else None.
    """

    def __init__(self, bounds: tuple[int, ...], cu_seqlens: Tensor) -> None:
        self.bounds, self.cu_seqlens = bounds, cu_seqlens
        lengths = {end - start for start, end in pairwise(bounds)}
        self.max_length = max(lengths, default=0)
        self.length = self.max_length if len(lengths) == 1 else None

    @classmethod
    def of(cls, cu_seqlens: Tensor | Segments, name: str = "cu_seqlens") -> Segments:
        """Check ``cu_seqlens`` and bring it to the host: the only wait for a GPU.

        Raises:
            TypeError: not an integer tensor.
            ValueError: not one-dimensional, not from 0 on, or decreasing.
        """
        if isinstance(cu_seqlens, Segments):
            return cu_seqlens
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"{name}: expected an integer tensor, got {type(cu_seqlens).__name__}")
        expect_integers(name, cu_seqlens)
        if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(f"{name}: expected [number of sequences + 1], got shape {list(cu_seqlens.shape)}")
        bounds = tuple(cu_seqlens.tolist())
        if bounds[0] != 0 or any(end < start for start, end in pairwise(bounds)):
            raise ValueError(f"{name}: expected 0 and then ends of sequences that never decrease, got {_brief(bounds)}")
        return cls(bounds, cu_seqlens.long())

    @classmethod
    def uniform(cls, num: int, length: int, device: torch.device) -> Segments:
        """``num`` sequences of ``length`` rows each."""
        bounds = tuple(length * s for s in range(num + 1))
        return cls(bounds, length * torch.arange(num + 1, device=device))

    def on(self, device: torch.device, name: str = "cu_seqlens") -> Segments:
        """Itself.

        Raises:
            ValueError: it lies on another device.
        """
        if self.cu_seqlens.device != device:
            raise ValueError(f"{name}: expected the device of the tokens, {device}, got {self.cu_seqlens.device}")
        return self

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def rows(self) -> int:
        return self.bounds[-1]

    def times(self, factor: int) -> Segments:
        """The same sequences where every token has ``factor`` rows."""
        if factor == 1:
            return self
        return Segments(tuple(factor * bound for bound in self.bounds), factor * self.cu_seqlens)

    def stacks(self, most_rows: int) -> Iterator[Stack]:
        """The sequences, not empty ones, in stacks of equal length: as many at a time as have ``most_rows`` together.

        Neighbours of equal length come together, so that padded batches are one stack.
        """
        first = 0
        while first < len(self):
            start, end = self.bounds[first], self.bounds[first + 1]
            length, last = end - start, first + 1
            while last < len(self) and self.bounds[last + 1] - self.bounds[last] == length:
                if (last + 1 - first) * length > most_rows:
                    break
                last += 1
            if length:
                yield Stack(slice(first, last), slice(start, self.bounds[last]), length)
            first = last

    def ids(self) -> Tensor:
        """The sequence of every row, ``[rows]``."""
        numbers = torch.arange(len(self), device=self.cu_seqlens.device)
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=self.rows)


class Stack(NamedTuple):
    """Neighbouring sequences of equal length."""

    sequences: slice
    rows: slice
    length: int

    def of(self, x: Tensor) -> Tensor:
        """Their part of ``[rows, ...]``, as ``[sequences, length, ...]``."""
        return x[self.rows].view(self.sequences.stop - self.sequences.start, self.length, *x.shape[1:])


def segment_sums(values: Tensor, segments: Segments) -> Tensor:
    """Sum over the rows of each sequence: ``[rows, ...]`` to ``[S, ...]``, in a fixed order."""
    if segments.length is not None and segments.rows:
        return values.view(len(segments), segments.length, *values.shape[1:]).sum(1)
    lengths = segments.cu_seqlens.diff()
    sums: Tensor = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums


def _brief(bounds: tuple[int, ...]) -> str:
    return str(list(bounds)) if len(bounds) <= 8 else f"[{', '.join(map(str, bounds[:8]))}, ...]"
