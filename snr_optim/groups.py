"""Which sequences share a prompt, and sums over a group, over its others, and over the other groups.

Sums that leave something out are built by adding what stays, never by subtracting what goes: gradient
weights are heavy-tailed, and ``total - own`` cancels exactly where it matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """The partition of a batch of ``B`` sequences into ``P`` groups, sorted once and then reused.

    Build it with :meth:`of`. Groups may be ragged, and their members need not be neighbours.

    Attributes:
        index: ``[B]`` int64, the group of each sequence, in ``0..P-1``.
        order: ``[B]`` int64, a stable permutation that brings the members of each group together.
        position: ``[B]`` int64, place within its group of each sequence *of the sorted batch*.
        sizes: ``[P]`` int64, sequences in each group; never zero.
        largest: the largest size, ``0`` for an empty batch.
    """

    index: Tensor
    order: Tensor
    position: Tensor
    sizes: Tensor
    largest: int

    @classmethod
    def of(cls, groups: int | Tensor, batch: int, device: torch.device | str = "cpu") -> Groups:
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
            >>> Groups.of(torch.tensor([7, -1, 7]), batch=3).index
            tensor([1, 0, 1])
        """
        if isinstance(groups, Tensor):
            if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool:
                raise TypeError(f"groups: expected integer ids, got dtype {groups.dtype}")
            if groups.shape != (batch,):
                raise ValueError(f"groups: expected one id per sequence, shape [{batch}], got {list(groups.shape)}")
            _, index, sizes = torch.unique(groups.to(device), return_inverse=True, return_counts=True)
            order = torch.argsort(index, stable=True)
            largest = int(sizes.max()) if batch else 0
        elif isinstance(groups, int) and not isinstance(groups, bool):
            if groups < 1 or batch % groups:
                raise ValueError(f"groups: expected a positive size that divides the batch of {batch}, got {groups}")
            order = torch.arange(batch, device=device)
            index = order // groups
            sizes = torch.full((batch // groups,), groups, device=device)
            largest = groups if batch else 0
        else:
            raise TypeError(f"groups: expected an int or an integer tensor, got {type(groups).__name__}")
        starts = sizes.cumsum(0) - sizes
        position = torch.arange(batch, device=device) - starts[index[order]]
        return cls(index, order, position, sizes, largest)

    def first(self, values: Tensor) -> Tensor:
        """The value of each group's first member: ``[B, ...] -> [P, ...]``.

        Example:
            >>> Groups.of(torch.tensor([5, 3, 5]), batch=3).first(torch.tensor([1, 2, 3]))
            tensor([2, 1])
        """
        starts = self.sizes.cumsum(0) - self.sizes
        return values[self.order[starts]]

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each group: ``[B, ...] -> [P, ...]``.

        Example:
            >>> Groups.of(2, batch=4).sum(torch.tensor([1., 2., 3., 4.]))
            tensor([3., 7.])
        """
        totals = values.new_zeros(len(self.sizes), *values.shape[1:])
        return totals.index_add_(0, self.index, values)

    def sum_of_others(self, values: Tensor) -> Tensor:
        """Leave one out: the sum over the *other* members of each sequence's group, ``[B, ...] -> [B, ...]``.

        A segmented exclusive scan from either side, in ``log2(largest)`` vectorised passes. No term is
        ever subtracted, so for non-negative values the relative error is that of a plain sum.

        Example:
            >>> Groups.of(3, batch=3).sum_of_others(torch.tensor([1., 1e30, 2.]))
            tensor([1.0000e+30, 3.0000e+00, 1.0000e+30])
        """
        ordered = values[self.order]
        before = self._exclusive_scan(ordered, self.position)
        from_end = self.sizes[self.index[self.order]] - 1 - self.position
        after = self._exclusive_scan(ordered.flip(0), from_end.flip(0)).flip(0)
        return torch.empty_like(values).index_copy_(0, self.order, before + after)

    def sum_of_other_groups(self, values: Tensor) -> Tensor:
        """Leave one group out: the sum over every sequence of every *other* group, ``[B, ...] -> [B, ...]``.

        Example:
            >>> Groups.of(2, batch=4).sum_of_other_groups(torch.tensor([1., 2., 3., 4.]))
            tensor([7., 7., 3., 3.])
        """
        totals = self.sum(values)
        others = torch.zeros_like(totals)
        others[1:] = totals[:-1].cumsum(0)
        others[:-1] += totals[1:].flip(0).cumsum(0).flip(0)
        return others[self.index]

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
