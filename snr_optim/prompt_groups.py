"""Which sequences share a prompt, and sums over a group, over its others, and over the other groups.

Sums that leave something out are built by adding what stays, never by subtracting what goes: gradient
weights are heavy-tailed, and ``total - own`` cancels exactly where it matters.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 32  # rows up to which adding row to row beats a cumulative sum


@dataclass(frozen=True)
class PromptGroups:
    """The partition of a batch of ``B`` sequences into ``P`` groups, sorted once and then reused.

    Build it with :meth:`of`. Groups may be ragged, and their members need not be neighbours.

    Attributes:
        index: ``[B]`` int64, the group of each sequence, in ``0..P-1``.
        order: ``[B]`` int64, a stable permutation that brings the members of each group together.
        sizes: ``[P]`` int64, sequences in each group; never zero.
        largest: the largest size, ``0`` for an empty batch.
        size: the size of all groups if they are equally large and their members neighbours; else None.
    """

    index: Tensor
    order: Tensor
    sizes: Tensor
    largest: int
    size: int | None

    @classmethod
    def of(cls, groups: int | Tensor, batch: int, device: torch.device | str = "cpu") -> PromptGroups:
        """Groups of one size (neighbours share a prompt), or one integer id per sequence.

        Args:
            groups: the size ``G`` of every group, a divisor of ``batch``; or ids ``[batch]`` of any
                integer type, in any order, with any gaps.
            batch: number of sequences ``B``.
            device: where the index tensors live.

        Raises:
            TypeError: ``groups`` is neither an int nor an integer tensor.
            ValueError: the size is not a positive divisor of ``batch``, or the ids are not ``[batch]``.

        Example:
            >>> PromptGroups.of(torch.tensor([7, -1, 7]), batch=3).index
            tensor([1, 0, 1])
        """
        if isinstance(groups, Tensor):
            if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
                raise TypeError(f"groups: expected integer ids, got dtype {groups.dtype}")
            if groups.shape != (batch,):
                raise ValueError(f"groups: expected one id per sequence, shape [{batch}], got {list(groups.shape)}")
            _, index, sizes = torch.unique(groups.to(device), return_inverse=True, return_counts=True)
            order = torch.argsort(index, stable=True)
            if not batch:
                return cls(index, order, sizes, 0, None)
            in_order = (index.diff() >= 0).all().to(sizes.dtype)
            largest, smallest, sorted_ = torch.stack([sizes.max(), sizes.min(), in_order]).tolist()
            return cls(index, order, sizes, largest, largest if sorted_ and largest == smallest else None)
        try:
            size = operator.index(None if isinstance(groups, bool) else groups)  # type: ignore[arg-type]  # NumPy's too
        except TypeError:
            kind = type(groups).__name__
            raise TypeError(f"groups: expected an int or a tensor of integer ids, got {kind}") from None
        if size < 1 or batch % size:
            raise ValueError(f"groups: expected a positive size that divides the batch of {batch}, got {groups}")
        order = torch.arange(batch, device=device)
        sizes = torch.full((batch // size,), size, device=device)
        return cls(order // size, order, sizes, size if batch else 0, size if batch else None)

    # ------------------------------------------------------------------------------------------------ a batch by groups
    def blocks(self, most: int) -> Iterator[tuple[slice, slice, PromptGroups]]:
        """The batch in parts of whole groups, at most ``most`` sequences each where groups are equally large.

        Yields:
            The sequences, the groups, and the partition of the part.
        """
        if self.size is None or len(self.index) <= most:
            yield slice(0, len(self.index)), slice(0, len(self.sizes)), self
            return
        step = max(1, most // self.size)
        for start in range(0, len(self.sizes), step):
            end = min(start + step, len(self.sizes))
            sequences = slice(start * self.size, end * self.size)
            device = self.index.device
            yield sequences, slice(start, end), PromptGroups.of(self.size, sequences.stop - sequences.start, device)

    def fold(self, values: Tensor) -> Tensor:
        """``[B, ...] -> [P, G, ...]`` where groups are equally large, ``[B, ...]`` elsewhere; a view."""
        return values if self.size is None else values.reshape(-1, self.size, *values.shape[1:])

    def unfold(self, values: Tensor) -> Tensor:
        """Back to ``[B, ...]``."""
        return values if self.size is None else values.flatten(0, 1)

    def spread(self, values: Tensor) -> Tensor:
        """What belongs to groups, ``[P, ...]``, in a shape that broadcasts with folded sequences."""
        return values[self.index] if self.size is None else values.unsqueeze(1)

    # ------------------------------------------------------------------------------------------------------------ sums
    def first(self, values: Tensor) -> Tensor:
        """The value of each group's first member: ``[B, ...] -> [P, ...]``.

        Example:
            >>> PromptGroups.of(torch.tensor([5, 3, 5]), batch=3).first(torch.tensor([1, 2, 3]))
            tensor([2, 1])
        """
        starts = self.sizes.cumsum(0) - self.sizes
        return values[self.order[starts]]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each group: ``[B, ...] -> [P, ...]``.

        Example:
            >>> PromptGroups.of(2, batch=4).sum(torch.tensor([1., 2., 3., 4.]))
            tensor([3., 7.])
        """
        totals = values.new_zeros(len(self.sizes), *values.shape[1:])
        return totals.index_add_(0, self.index, values)

    def sum_of_others(self, values: Tensor) -> Tensor:
        """Leave one out: the sum over the *other* members of each sequence's group, ``[B, ...] -> [B, ...]``.

        The sum of those before and those after, each by additions alone: for non-negative values the relative error is
        that of a plain sum. Groups of different sizes take ``log2(largest)`` passes, a segmented scan from either side.

        Example:
            >>> PromptGroups.of(3, batch=3).sum_of_others(torch.tensor([1., 1e30, 2.]))
            tensor([1.0000e+30, 3.0000e+00, 1.0000e+30])
        """
        if self.size is not None:
            return self.unfold(_sum_of_others(self.fold(values)))
        ordered, index = values[self.order], self.index[self.order]
        position = torch.arange(len(ordered), device=values.device) - (self.sizes.cumsum(0) - self.sizes)[index]
        from_end = self.sizes[index] - 1 - position
        before = self._exclusive_scan(ordered, position)
        after = self._exclusive_scan(ordered.flip(0), from_end.flip(0)).flip(0)
        return torch.empty_like(values).index_copy_(0, self.order, before + after)

    def sum_of_other_groups(self, values: Tensor) -> Tensor:
        """Leave one group out: the sum over every sequence of every *other* group, ``[B, ...] -> [B, ...]``.

        Example:
            >>> PromptGroups.of(2, batch=4).sum_of_other_groups(torch.tensor([1., 2., 3., 4.]))
            tensor([7., 7., 3., 3.])
        """
        return sum_of_others(self.sum(values))[self.index]

    def _exclusive_scan(self, values: Tensor, position: Tensor) -> Tensor:
        """Sum of the earlier members of each segment: Hillis and Steele's doubling, cut at segment starts."""
        position = position.view(-1, *[1] * (values.dim() - 1))
        running, stride = values, 1
        while stride < self.largest:
            reaches = position[stride:] >= stride
            step = torch.where(reaches, running[:-stride], 0)
            running = torch.cat([running[:stride], running[stride:] + step])
            stride *= 2
        shifted = torch.zeros_like(values)
        shifted[1:] = torch.where(position[1:] > 0, running[:-1], 0)
        return shifted


def sum_of_others(values: Tensor) -> Tensor:
    """Leave one out along the first dimension: the sum of all other rows, by additions alone.

    Example:
        >>> sum_of_others(torch.tensor([1., 2., 4.]))
        tensor([6., 5., 3.])
    """
    return _sum_of_others(values.unsqueeze(0)).squeeze(0)


def _sum_of_others(values: Tensor) -> Tensor:
    """Along the second dimension of ``[P, G, ...]``."""
    size, *columns = values.shape[1:]
    if columns and 0 < size <= FEW:  # row by row: few kernels, each along contiguous columns
        others = torch.empty_like(values)
        result, rows = others.unbind(1), values.unbind(1)
        result[0].zero_()
        for g in range(1, size):
            torch.add(result[g - 1], rows[g - 1], out=result[g])
        after = rows[-1].clone()
        for g in range(size - 2, -1, -1):
            result[g].add_(after)
            after.add_(rows[g])
        return others
    across = values.flatten(2).transpose(1, 2).contiguous() if columns else values.unsqueeze(1)
    others = torch.zeros_like(across)  # [P, columns, G]: a cumulative sum is fast along the last dimension
    others[..., 1:] = across[..., :-1].cumsum(-1)
    others[..., :-1].add_(across[..., 1:].flip(-1).cumsum(-1).flip(-1))
    return others.transpose(1, 2).reshape(values.shape)
