"""A contribution is what one call of a layer adds to the gradient of a parameter; it is kept as a product's factors.

It knows its squared norm per unit, its inner product with another contribution to the same parameter (tied
embeddings, a module that is called twice), and, so that those two can be checked, the gradient itself. A unit is one
sequence, or several that are measured as one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from snr_kernels.linear_grad_norms import linear_grad_norms
from snr_kernels.norm_embedding_grad_norms import embedding_grad_norms, normalised, normalization_grad_norms
from snr_kernels.precision import exact_dtype
from snr_kernels.segments import Segments, segment_sums

MOST_PRODUCTS = 1 << 25  # inner products of tokens with tokens that are in memory at once


class Contribution(Protocol):
    """A gradient that one call of a layer adds to one of its parameters."""

    def squared(self) -> Tensor:
        """Squared norm per unit, ``[S]``."""

    def inner(self, other: Contribution) -> Tensor:
        """Inner product per unit with another contribution to the same parameter, ``[S]``."""

    def gradient(self) -> Tensor:
        """The sum over all units, in the shape of the parameter."""

    def norm_bound(self) -> Tensor:
        """A bound on the norm of that sum if nothing cancelled: the scale of its rounding."""


Contributions: TypeAlias = dict[str, Contribution]  # by the name of the parameter within its module


class InputIdentity:
    """Tells whether two layers were given the same tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor  # held, as another tensor could otherwise come to lie in its place
        self._mark = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)

    def is_same(self, other: InputIdentity | None) -> bool:
        return other is not None and self._mark == other._mark


@dataclass
class MatrixContribution:
    """``sum_t left_t right_t^T`` for a matrix ``[d_out, d_in]``.

    Attributes:
        left: ``[N, d_out]``, or ``[N]`` ids that stand for one-hot rows.
        right: ``[N, d_in]``.
        segments: bounds of the units in the rows.
        shape: the shape of the matrix.
        transposed: whether the parameter is kept as ``[d_in, d_out]``.
        padding_idx: the id whose row gets no gradient.
        layer_input: the tensor from which ``right`` was taken, to find layers that were given the same one.
    """

    left: Tensor
    right: Tensor
    segments: Segments
    shape: tuple[int, int]
    transposed: bool = False
    padding_idx: int | None = None
    layer_input: InputIdentity | None = None

    @property
    def one_hot(self) -> bool:
        return self.left.dim() == 1

    def squared(self) -> Tensor:
        if self.one_hot:
            return embedding_grad_norms(self.left, self.right, self.segments, padding_idx=self.padding_idx)
        return linear_grad_norms(self.right, self.left, self.segments)

    def inner(self, other: Contribution) -> Tensor:
        r"""``sum_{t,u} (left_t . left'_u) (right_t . right'_u)``, which needs nothing of the size of the matrix."""
        if isinstance(other, PerUnitContribution):
            return other.inner(self)
        assert isinstance(other, MatrixContribution)
        if self.transposed != other.transposed:
            raise RuntimeError("a weight is tied to its own transpose: not supported")
        exact = exact_dtype(self.right, other.right)
        totals = []
        for s in range(len(self.segments)):
            total = torch.zeros((), dtype=exact, device=self.right.device)
            theirs = slice(*other.segments.bounds[s : s + 2])
            first, last = self.segments.bounds[s : s + 2]
            step = max(1, MOST_PRODUCTS // max(1, theirs.stop - theirs.start))
            for start in range(first, last, step):
                mine = slice(start, min(last, start + step))
                of_right = self._right(mine).to(exact) @ other._right(theirs).to(exact).T
                total += (of_right * _products(self.left[mine], other.left[theirs], exact)).sum()
            totals.append(total)
        return torch.stack(totals)

    def narrowed(self, ids: Tensor, segments: Segments) -> NarrowedMatrixContribution:
        """Keep the columns of ``left`` that these ids select: all that the inner product with their embedding needs."""
        columns = []
        for mine, theirs in zip(pairwise(self.segments.bounds), pairwise(segments.bounds), strict=True):
            columns.append(self.left[slice(*mine)][:, ids[slice(*theirs)]])
        return NarrowedMatrixContribution(self.squared(), columns, self.right, self.segments)

    def gradient(self) -> Tensor:
        exact = exact_dtype(self.right)
        right = self._right(slice(None)).to(exact)
        if self.one_hot:
            return right.new_zeros(self.shape).index_add_(0, self.left, right)
        gradient = self.left.to(exact).T @ right
        return gradient.T if self.transposed else gradient

    def norm_bound(self) -> Tensor:
        return _size(self.right) * (math.sqrt(len(self.left)) if self.one_hot else _size(self.left))

    def sketch(self, signs: Tensor) -> Tensor:
        """``sum_t (left_t R)^T right_t`` per unit for ``R = signs``, ``[d_out, k]``: ``[S, k, d_in]``."""
        exact = exact_dtype(self.right)
        if self.one_hot:
            projected = signs[self.left].to(exact)
        elif self.left.dtype == torch.bfloat16:  # sums in float32, and rounded once: no copy of the larger factor
            projected = (self.left @ signs.to(torch.bfloat16)).to(exact)
        else:
            projected = self.left.to(exact) @ signs.to(exact)
        right = self._right(slice(None)).to(exact)
        sums = torch.zeros(len(self.segments), signs.shape[1], right.shape[1], dtype=exact, device=right.device)
        for stack in self.segments.stacks(most_rows=self.segments.rows):
            sums[stack.sequences] = stack.of(projected).mT @ stack.of(right)
        return sums

    def _right(self, rows: slice) -> Tensor:
        right = self.right[rows]
        if self.padding_idx is None:
            return right
        return right.masked_fill((self.left[rows] == self.padding_idx)[:, None], 0.0)


@dataclass
class NarrowedMatrixContribution:
    """What has to be kept for a matrix that is tied to an embedding: its norms, and the columns that the ids select.

    The gradient of all logits would otherwise stay in memory until the embedding's gradient comes, last of all.
    """

    norms: Tensor
    columns: list[Tensor]  # [T, number of ids] for each unit
    right: Tensor
    segments: Segments

    def squared(self) -> Tensor:
        return self.norms

    def inner(self, other: Contribution) -> Tensor:
        assert isinstance(other, MatrixContribution)
        assert other.one_hot
        totals = []
        for s, columns in enumerate(self.columns):
            mine, theirs = (slice(*bounds[s : s + 2]) for bounds in (self.segments.bounds, other.segments.bounds))
            exact = self.norms.dtype
            of_right = self.right[mine].to(exact) @ other._right(theirs).to(exact).T
            totals.append((of_right * columns.to(exact)).sum())
        return torch.stack(totals)

    def gradient(self) -> Tensor:
        raise NotImplementedError("the gradient is compared before the contribution is narrowed")

    def norm_bound(self) -> Tensor:
        raise NotImplementedError("the gradient is compared before the contribution is narrowed")


def _size(x: Tensor) -> Tensor:
    size: Tensor = torch.linalg.vector_norm(x, dtype=exact_dtype(x))
    return size


def _products(left: Tensor, other: Tensor, exact: torch.dtype) -> Tensor:
    """Inner products of rows, ``[n, m]``; ids on either side stand for one-hot rows."""
    if left.dim() == 1 and other.dim() == 1:
        return (left[:, None] == other).to(exact)
    if left.dim() == 1:
        return other[:, left].T.to(exact)
    if other.dim() == 1:
        return left[:, other].to(exact)
    return left.to(exact) @ other.to(exact).T


class VectorContribution:
    """For a parameter whose gradient per unit is small enough to be formed: biases, scales of normalization layers."""

    def sums(self) -> Tensor:
        """The gradient per unit, flattened: ``[S, numel]``."""
        raise NotImplementedError

    def squared(self) -> Tensor:
        return self.sums().square().sum(-1)

    def inner(self, other: Contribution) -> Tensor:
        assert isinstance(other, VectorContribution)
        return (self.sums() * other.sums()).sum(-1)

    def gradient(self) -> Tensor:
        return self.sums().sum(0)

    def norm_bound(self) -> Tensor:
        sums = self.sums()
        return _size(sums) * math.sqrt(len(sums))


@dataclass
class BiasContribution(VectorContribution):
    """``sum_t G_t`` for a bias."""

    grad_outputs: Tensor  # [N, d]
    segments: Segments

    def sums(self) -> Tensor:
        return segment_sums(self.grad_outputs.to(exact_dtype(self.grad_outputs)), self.segments)

    def norm_bound(self) -> Tensor:
        return _size(self.grad_outputs) * math.sqrt(len(self.grad_outputs))


@dataclass
class NormalizationScaleContribution(VectorContribution):
    """``sum_t G_t x^_t`` for the scale of an RMSNorm or a LayerNorm."""

    inputs: Tensor  # [N, d]
    grad_outputs: Tensor
    segments: Segments
    eps: float
    center: bool

    def squared(self) -> Tensor:
        return normalization_grad_norms(self.inputs, self.grad_outputs, self.segments, self.eps, center=self.center)

    def sums(self) -> Tensor:
        g = self.grad_outputs.to(exact_dtype(self.grad_outputs))
        return segment_sums(g * normalised(self.inputs, self.eps, self.center), self.segments)

    def norm_bound(self) -> Tensor:
        return _size(self.grad_outputs) * math.sqrt(self.grad_outputs.numel())  # x^ is of norm sqrt(d)


@dataclass
class PerUnitContribution(VectorContribution):
    """Gradients that were formed for each unit."""

    gradients: Tensor  # [S, *shape]

    def inner(self, other: Contribution) -> Tensor:
        r"""``sum_t left_t^T G right_t`` with a matrix, such as an embedding that is tied to this layer."""
        if not isinstance(other, MatrixContribution):
            return super().inner(other)
        gradients = self.gradients.to(exact_dtype(self.gradients, other.right))
        totals = []
        for matrix, (start, end) in zip(gradients, pairwise(other.segments.bounds), strict=True):
            gradient = matrix.T if other.transposed else matrix
            left, right = other.left[start:end], other._right(slice(start, end)).to(gradient.dtype)
            of_left = gradient[left] if other.one_hot else left.to(gradient.dtype) @ gradient
            totals.append((of_left * right).sum())
        return torch.stack(totals)

    def sums(self) -> Tensor:
        return self.gradients.flatten(1).to(exact_dtype(self.gradients))

    def gradient(self) -> Tensor:
        return self.gradients.sum(0)
