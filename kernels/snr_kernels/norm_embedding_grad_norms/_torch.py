"""The torch path of both ops, for every device and dtype that torch has."""

from __future__ import annotations

import torch
from torch import Tensor

from snr_kernels.precision import exact_dtype
from snr_kernels.segments import Segments, segment_sums


def norm(inputs: Tensor, grad_outputs: Tensor, segments: Segments, eps: float, center: bool, bias: bool) -> Tensor:
    """As `normalization_grad_norms`, of checked arguments."""
    exact = exact_dtype(grad_outputs)
    g = grad_outputs.to(exact)
    if inputs.dtype == exact == torch.float32 and not center and segments.length:
        sums = _scaled_sums(g * inputs, inputs, segments, eps)  # fewer passes over memory
    else:
        sums = segment_sums(g * normalised(inputs, eps, center), segments)
    norms = sums.square().sum(-1)
    return norms + segment_sums(g, segments).square().sum(-1) if bias else norms


def _scaled_sums(products: Tensor, inputs: Tensor, segments: Segments, eps: float) -> Tensor:
    """``sum_t products_t / RMS(x_t)`` of sequences of one length."""
    squares = torch.linalg.vector_norm(inputs, dim=-1).square()
    scale = torch.rsqrt(squares / inputs.shape[1] + eps)
    shape = (len(segments), segments.length, -1)
    return (scale.view(len(segments), 1, -1) @ products.view(shape)).squeeze(1)  # type: ignore[arg-type]


def normalised(inputs: Tensor, eps: float, center: bool) -> Tensor:
    """``x^``, in float32 at least."""
    x = inputs.to(exact_dtype(inputs))
    if center:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def embedding(ids: Tensor, grad_outputs: Tensor, segments: Segments, padding_idx: int | None) -> Tensor:
    """As `embedding_grad_norms`, of checked arguments."""
    exact = exact_dtype(grad_outputs)
    order, number = sort_by_sequence_and_id(ids, segments)
    g = grad_outputs.to(exact)
    if padding_idx is not None:
        g = g.masked_fill((ids == padding_idx)[:, None], 0.0)
    rows = torch.zeros_like(g).index_add_(0, number, g[order])  # one per id of a sequence, then zeros
    of_sequence = segments.ids()[order]
    squares = rows.square().sum(-1)
    norms = torch.zeros(len(segments), dtype=exact, device=g.device)
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    return norms.index_add_(0, of_sequence, torch.where(first, squares[number], 0.0))


def sort_by_sequence_and_id(ids: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The order of tokens, and in that order a number for each pair of sequence and id, from 0 on."""
    by_id = ids.argsort(stable=True)
    order = by_id[segments.ids()[by_id].argsort(stable=True)]
    key_id, key_sequence = ids[order], segments.ids()[order]
    new = torch.ones_like(order)
    new[:1] = 0
    new[1:] = (key_id[1:] != key_id[:-1]) | (key_sequence[1:] != key_sequence[:-1])
    return order, new.cumsum(0)
