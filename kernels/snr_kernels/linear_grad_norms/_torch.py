"""The torch path of `linear_grad_norms`: batched products of stacks of equal sequences, a few rows at a time.

For every device and dtype that torch has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from snr_kernels.precision import exact_dtype
from snr_kernels.segments import Segments

BLOCK = 64  # rows of a Gram matrix at a time
BUDGET = 1 << 25  # numbers in a float32 copy: 128 MB
CACHED = 1 << 20  # numbers of a product at a time
CANCELLED = 1e-3  # of the sum of absolute terms: float32 has four digits left


def forward(activations: Tensor, gradients: Sequence[Tensor], segments: Segments, method: str, bias: bool) -> Tensor:
    """As `linear_grad_norms`, of checked arguments."""
    d_in, d_out = activations.shape[1], sum(g.shape[1] for g in gradients)
    exact = exact_dtype(activations, *gradients)
    norms = torch.zeros(len(segments), dtype=exact, device=activations.device)
    for stack in segments.stacks(most_rows=max(1, BUDGET // max(1, d_in, *(g.shape[1] for g in gradients)))):
        a, gs = stack.of(activations), [stack.of(g) for g in gradients]
        by_gram = stack.length <= longest_by_gram(d_in, d_out, block_rows(stack.length), method)
        if not by_gram:
            norms[stack.sequences] = _direct(a, gs, bias, exact)
            continue
        found, sizes = _gram(a, gs, bias, exact)
        if method == "auto" and found.device.type == "cpu":  # elsewhere it would wait for the device
            cancelled = (found < CANCELLED * sizes).nonzero().flatten().tolist()
            for s in cancelled:
                found[s] = _direct(a[s : s + 1], [g[s : s + 1] for g in gs], bias, exact)[0]
        norms[stack.sequences] = found
    return norms


def longest_by_gram(d_in: int, d_out: int, tile: int, method: str) -> int:
    """The most tokens ``T`` of a sequence for which Gram matrices take no more FLOP.

    ``T (T + tile) (d_in + d_out) <= 2 T d_in d_out``.
    """
    if method == "auto":
        return max(0, 2 * d_in * d_out // max(1, d_in + d_out) - tile)
    return 2**31 - 1 if method == "gram" else 0


def block_rows(length: int) -> int:
    return min(length, max(BLOCK, length // 8))


def _gram(a: Tensor, gs: Sequence[Tensor], bias: bool, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """``sum (A A^T + bias) * (G G^T)`` of each sequence, and the sum of absolute terms.

    From ``[s, T, d_in]`` and several ``[s, T, d_out]`` to ``[s]``.
    """
    length, step = a.shape[1], block_rows(a.shape[1])
    total, size = a.new_zeros(2, len(a), dtype=exact)
    for start in range(0, length, step):  # some rows of the lower triangle
        end = min(length, start + step)
        of_a = _inner_products(a, start, end, exact)
        if bias:
            of_a += 1
        of_g = _inner_products(gs[0], start, end, exact)
        for g in gs[1:]:
            of_g = _inner_products(g, start, end, exact, of_g)
        products = of_a.mul_(of_g)
        products[:, :, :start] *= 2  # the upper triangle
        total += products.sum((1, 2))
        size += products.abs_().sum((1, 2))
    return total, size


def _inner_products(x: Tensor, start: int, end: int, exact: torch.dtype, into: Tensor | None = None) -> Tensor:
    """``X[start:end] X[:end]^T`` of each sequence, ``[s, end - start, end]``, added to ``into``."""
    for columns in column_chunks(x, exact, rows=end):
        right = x[:, :end, columns].to(exact)
        left = right[:, start:end]
        into = torch.bmm(left, right.mT) if into is None else into.baddbmm_(left, right.mT)
    return x.new_zeros(len(x), end - start, end, dtype=exact) if into is None else into


def _direct(a: Tensor, gs: Sequence[Tensor], bias: bool, exact: torch.dtype) -> Tensor:
    """``||A^T G||^2`` of each sequence, some sequences and columns of the product at a time."""
    total = a.new_zeros(len(a), dtype=exact)
    for g in gs:
        columns = max(1, CACHED // max(1, a.shape[2]))
        together = max(1, CACHED // max(1, a.shape[2] * min(columns, g.shape[2])))
        for first in range(0, len(a), together):
            some = slice(first, first + together)
            left = a[some].to(exact).mT
            for right in torch.split(g[some], columns, dim=2):
                right = right.to(exact)
                total[some] += torch.bmm(left, right).square_().sum((1, 2))
                if bias:
                    total[some] += right.sum(1).square().sum(1)
    return total


def column_chunks(x: Tensor, exact: torch.dtype, rows: int) -> Iterator[slice]:
    """All columns, or as many at a time as a copy in another dtype may have."""
    width = x.shape[-1]
    step = width if x.dtype == exact else max(1, BUDGET // max(1, len(x) * rows))
    return (slice(first, first + step) for first in range(0, width, max(1, step)))
