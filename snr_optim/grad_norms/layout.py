"""Finds the tokens of each unit in an activation, for padded and for packed batches.

A unit is what gets one norm: a sequence, or several sequences that are measured as one, such as those of a prompt.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from snr_kernels.segments import Segments
from snr_optim.prompt_groups import PromptGroups


class Layout:
    """How activations are cut into units.

    The first dimension of an activation counts items: sequences in a padded batch, tokens in a packed one. An item has
    as many vectors as the layer makes of it. A unit is a run of items, after they were brought into order.

    Args:
        items: the size of that dimension.
        units: bounds of the units, in items.
        order: ``[items]``, a permutation that brings the items of each unit together; None where they are already.
        packed: whether items are tokens, which may have a leading dimension of 1.
    """

    def __init__(self, items: int, units: Segments, order: Tensor | None, packed: bool) -> None:
        self.items, self.packed = items, packed
        self._units, self._order = units, order
        self._segments: dict[int, Segments] = {}

    @classmethod
    def of_padded(cls, batch_size: int, groups: int | Tensor | None, device: torch.device) -> Layout:
        """For activations ``[batch_size, ...]``: one item per sequence."""
        try:
            batch_size = operator.index(batch_size)
        except TypeError:
            raise TypeError(f"batch_size: expected an integer, got {type(batch_size).__name__}") from None
        if batch_size < 1:
            raise ValueError(f"batch_size: expected a positive number of sequences, got {batch_size}")
        sequences = Segments.uniform(batch_size, 1, device)
        return cls(batch_size, *_units_of(sequences, groups, device), packed=False)

    @classmethod
    def of_packed(cls, cu_seqlens: Tensor, groups: int | Tensor | None, device: torch.device) -> Layout:
        """For activations ``[N, ...]`` or ``[1, N, ...]``: one item per token."""
        sequences = Segments.of(cu_seqlens)
        sequences = Segments(sequences.bounds, sequences.cu_seqlens.to(device))
        return cls(sequences.rows, *_units_of(sequences, groups, device), packed=True)

    def __len__(self) -> int:
        """The number of units."""
        return len(self._units)

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self._units.cu_seqlens.device

    def items_of(self, x: Tensor) -> Tensor:
        """An activation as ``[items, ...]``, in its own order.

        Raises:
            ValueError: the activation does not have the items of this layout.
        """
        if self.packed:
            return self._tokens_of(x)
        if x.dim() and x.shape[0] == self.items:
            return x
        hint = ""
        if x.dim() and x.shape[0] == 1:
            hint = ": one for the whole batch; pass ids (of positions, say) with a row per sequence"
        raise ValueError(
            f"batch_size: {self.items} sequences expected, but an activation has shape {list(x.shape)}{hint}"
        )

    def _tokens_of(self, x: Tensor) -> Tensor:
        """Find them in ``[tokens, ...]``, or in ``[1, ..., tokens, ..., d]``, as heads come first in some models."""
        found = [n for n in range(1, x.dim() - 1) if x.shape[n] == self.items] if x.shape[:1] == (1,) else []
        if len(found) == 1:
            return x[0].movedim(found[0] - 1, 0)
        if x.dim() > 1 and x.shape[0] == self.items:
            return x
        reason = "which dimension is theirs is not clear" if found else "expected [1, tokens, ...] or [tokens, ...]"
        raise ValueError(
            f"cu_seqlens: they end at {self.items} tokens, but an activation has shape {list(x.shape)}; {reason}"
        )

    def neighbours(self) -> Iterator[slice]:
        """The items of each unit, as a slice.

        Raises:
            RuntimeError: they are not neighbours.
        """
        if self._order is not None:
            raise RuntimeError("groups: this layer wants the sequences of a group to be neighbours")
        return (slice(start, end) for start, end in pairwise(self._units.bounds))

    def cut(self, x: Tensor) -> tuple[Tensor, Segments]:
        """The vectors ``[N, d]`` of an activation ``[..., d]`` in the order of the units, and the units' bounds."""
        x = self.items_of(x)
        if self._order is not None:
            x = x.index_select(0, self._order)
        vectors_per_item = x.shape[1:-1].numel()
        if vectors_per_item not in self._segments:
            self._segments[vectors_per_item] = self._units.times(vectors_per_item)
        return x.reshape(-1, x.shape[-1]), self._segments[vectors_per_item]

    def cut_ids(self, ids: Tensor) -> tuple[Tensor, Segments]:
        """The ids ``[N]`` of a tensor of ids ``[...]``, in the order of the units, and the units' bounds."""
        vectors, segments = self.cut(ids.unsqueeze(-1))
        return vectors.squeeze(-1), segments


def _units_of(sequences: Segments, groups: int | Tensor | None, device: torch.device) -> tuple[Segments, Tensor | None]:
    """The bounds of the units in items, and the order of items that brings each unit together; or None."""
    if groups is None:
        return sequences, None
    partition = PromptGroups.of(groups, len(sequences))
    by_unit = partition.order.tolist()
    lengths = [sequences.bounds[s + 1] - sequences.bounds[s] for s in by_unit]
    sizes = [0, *partition.sizes.cumsum(0).tolist()]
    ends = [0, *accumulate(lengths)]
    bounds = tuple(ends[size] for size in sizes)
    units = Segments(bounds, torch.tensor(bounds, device=device))
    if by_unit == sorted(by_unit):
        return units, None
    items = [torch.arange(sequences.bounds[s], sequences.bounds[s + 1]) for s in by_unit]
    return units, torch.cat(items).to(device)
