"""Passes over the logits of a language-model head, of which only a slab exists at a time.

What is done to a slab is `logprob_stats`'s. The last slab of the forward pass is kept, and is the first of the backward
pass: what lies in it is not computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from snr_kernels.lm_head import _merge
from snr_kernels.lm_head._merge import PartialSoftmax
from snr_kernels.lm_head._tiles import Head, Tile
from snr_kernels.logprob_stats.results import IGNORE_INDEX
from snr_kernels.products import add_product, multiply


class Kept(NamedTuple):
    """The last slab of the forward pass, left to the backward pass; or, once used, its room."""

    buffer: Tensor
    ready: bool


# ---------------------------------------------------------------------------------------------------------- forward
def statistics(
    head: Head, tiles: Sequence[Tile], entropy: bool, squares: bool
) -> tuple[tuple[Tensor, ...], Kept | None]:
    """The seven results of `logprob_stats` over the whole vocabulary, ``[N]`` each, and the last slab of all rows."""
    path, rows = head.path(), len(head.hidden)
    if not tiles:
        nothing = head.divisor.new_zeros(0)
        return (nothing,) * 7, None
    buffer = head.new_buffer(tiles)
    whole = PartialSoftmax(*head.divisor.new_empty(len(PartialSoftmax._fields), rows))
    for tile in tiles:
        slab = head.fill(buffer, tile)
        labels, owned = head.labels_of(tile, elsewhere=0)
        asked = (True, entropy, squares, squares, True, True, True)
        results = [head.divisor.new_empty(tile.height if each else 0) for each in asked]
        path.forward(slab[None], labels, head.divisor_of(tile), IGNORE_INDEX, results, entropy, squares)
        part = PartialSoftmax.of(results, owned, path.LOG_UNIT)
        if tile.columns.start:
            before = PartialSoftmax(*(x[tile.rows] for x in whole))
            part = _merge.join(PartialSoftmax(*map(torch.stack, zip(before, part, strict=True))), head.divisor_of(tile))
        for x, of_tile in zip(whole, part, strict=True):
            x[tile.rows] = of_tile
    if head.options.group is not None:
        whole = _merge.join(of_all_ranks(head, whole), head.divisor)
    kept = Kept(buffer, ready=True) if tiles[-1].height == rows else None
    return whole.finish(head.ignored, path.LOG_UNIT), kept


def of_all_ranks(head: Head, mine: PartialSoftmax) -> PartialSoftmax:
    """What each rank knows of the rows, ``[ranks, N]``; NaN where their slices are not one vocabulary."""
    edges = [head.options.first_label, head.options.first_label + len(head.weight)]
    packed = torch.cat([*mine, mine.reference.new_tensor(edges)])
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(head.options.group))]
    dist.all_gather(gathered, packed, head.options.group)
    everyone = torch.stack(gathered)
    first, last = everyone[:, -2].sort().values, everyone[:, -1].sort().values
    is_whole = (first[0] == 0) & (first[1:] == last[:-1]).all()
    parts = PartialSoftmax(*everyone[:, :-2].view(len(gathered), len(mine), -1).unbind(1))
    return parts._replace(log_total=torch.where(is_whole, parts.log_total, torch.nan))


# --------------------------------------------------------------------------------------------------------- backward
class Gradients(NamedTuple):
    """With respect to hidden states (not yet rounded), weight and bias; None where not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(
    head: Head,
    tiles: Sequence[Tile],
    results: Sequence[Tensor],
    given: Sequence[Tensor | None],
    kept: Kept | None,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """The backward pass, from the results of `statistics` and the gradients of the first four of them."""
    divided = not tiles or tiles[0].height < len(head.hidden)  # rows of the weight gradient are sums over tiles
    of_hidden = torch.zeros_like(head.hidden, dtype=head.exact) if wanted[0] else None
    of_weight = (torch.zeros_like if divided else torch.empty_like)(head.weight) if wanted[1] else None
    of_bias = head.divisor.new_zeros(len(head.weight)) if wanted[2] else None
    for tile, d in logit_gradients(head, tiles, results, given, kept):
        if of_hidden is not None:
            add_product(of_hidden[tile.rows], d, head.weight_of(tile))
        if of_bias is not None:
            of_bias[tile.columns] += d.sum(0, dtype=of_bias.dtype)
        if of_weight is not None:
            target, hidden = of_weight[tile.columns], head.hidden[tile.rows]
            if not divided:
                multiply(d.t(), hidden, target)
                continue
            if tile.rows.start == 0:
                total = torch.zeros_like(target, dtype=head.exact)
            add_product(total, d.t(), hidden)
            if tile.rows.stop == len(head.hidden):
                target.copy_(total)
    if of_hidden is not None and head.options.group is not None:
        dist.all_reduce(of_hidden, group=head.options.group)
    if of_bias is not None and head.bias is not None:
        of_bias = of_bias.to(head.bias.dtype)
    return Gradients(of_hidden, of_weight, of_bias)


def logit_gradients(
    head: Head,
    tiles: Sequence[Tile],
    results: Sequence[Tensor],
    given: Sequence[Tensor | None],
    kept: Kept | None,
) -> Iterator[tuple[Tile, Tensor]]:
    """Slab after slab, the gradient with respect to ``hidden weight^T + bias``, in the dtype of the products.

    A kept slab, the last one, comes first and is used up.
    """
    if not tiles:
        return
    path, given = head.path(), [None if g is None else g * head.options.gain for g in given]
    ready = False
    if kept is None:
        buffer = head.new_buffer(tiles)
    else:
        (buffer, ready), tiles = kept, [tiles[-1], *tiles[:-1]]
    squashed = head.new_buffer(tiles) if head.options.softcapped else None
    for tile in tiles:
        slab = tile.view(buffer) if ready else head.fill(buffer, tile)
        ready = False
        labels, _ = head.labels_of(tile, elsewhere=tile.width)
        known = [x[tile.rows] for x in results]
        of_rows = [None if g is None else g[tile.rows] for g in given]
        d = slab if squashed is None else tile.view(squashed)
        path.backward(slab[None], labels, head.divisor_of(tile), IGNORE_INDEX, known, of_rows, out=d[None])
        if squashed is not None:
            torch.ops.aten.tanh_backward.grad_input(d, slab, grad_input=d)
        yield tile, d.to(head.options.product_dtype)
