"""What the ops on a language-model head are given: its arguments checked, and its logits cut into slabs.

A slab is some columns (a slice of the vocabulary) of all rows, or of some where there are very many. Slices of the
vocabulary and not of the tokens, because then each row of the weight gradient is one product, rounded once, and the
only sum over slabs is the gradient of the hidden states, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from snr_kernels.checks import expect_integers
from snr_kernels.dispatch import Impl
from snr_kernels.logprob_stats.paths import path_of
from snr_kernels.logprob_stats.results import IGNORE_INDEX, temperature_tensor
from snr_kernels.precision import exact_dtype
from snr_kernels.products import multiply

FEWEST_COLUMNS = 1024  # below that rows are divided too: thinner products are slow
GRANULE = 64  # columns are multiples of it, but for the last: rows of a slab start where kernels read fastest
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Tile(NamedTuple):
    """Some rows of the hidden states and some of the vocabulary."""

    rows: slice
    columns: slice

    @property
    def height(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def width(self) -> int:
        return int(self.columns.stop - self.columns.start)

    def view(self, buffer: Tensor) -> Tensor:
        return buffer[: self.height * self.width].view(self.height, self.width)


class Options(NamedTuple):
    """What a pass is told besides tensors.

    Attributes:
        gain: of the logits before the ``tanh`` of a softcap; 1 without.
        softcapped: whether ``tanh`` follows.
        ignore_index: label of rows that are left out.
        product_dtype: in which hidden states and weights are multiplied.
        slab_dtype: of the logits.
        slab_bytes: most that a slab, and what is made of it, may take.
        first_label: the label of the first row of the weights.
        group: of ranks with the other rows of the vocabulary.
        impl: of `logprob_stats`.
    """

    gain: float
    softcapped: bool
    ignore_index: int
    product_dtype: torch.dtype
    slab_dtype: torch.dtype
    slab_bytes: int
    first_label: int
    group: dist.ProcessGroup | None
    impl: Impl


@dataclass(frozen=True)
class Head:
    """``x = gain (hidden weight^T + bias)``, or ``tanh`` of that, and ``p = softmax(x / divisor)``.

    Attributes:
        hidden: ``[N, d]``, in the dtype of the products.
        weight: ``[V, d]``: all rows of the vocabulary, or those of this rank.
        bias: ``[V]``.
        labels: ``[N]``, int64, counted over the vocabulary of all ranks.
        divisor: ``[]`` or ``[N]``.
        options: the rest.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    divisor: Tensor
    options: Options

    @property
    def exact(self) -> torch.dtype:
        return exact_dtype(self.hidden, self.weight)

    @property
    def ignored(self) -> Tensor:
        return self.labels == self.options.ignore_index

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, divisor: Tensor, options: Options
    ) -> Head:
        """From ``[..., d]`` and ``[...]``."""
        rows = hidden.detach().reshape(labels.numel(), hidden.shape[-1]).to(options.product_dtype)
        bias = None if bias is None else bias.detach()
        divisor = divisor.reshape(-1).contiguous() if divisor.dim() else divisor
        return Head(rows, weight.detach(), bias, labels.reshape(-1).long(), divisor, options)

    def path(self) -> ModuleType:
        """That of `logprob_stats` for the slabs."""
        return path_of(self.options.impl, self.hidden.new_empty(0, dtype=self.options.slab_dtype))

    def tiles(self, whole_rows: bool = False) -> list[Tile]:
        """The slabs, in the order of the forward pass: rows within columns.

        Raises:
            ValueError: not even the narrowest slab of ``whole_rows`` is within ``slab_bytes``.
        """
        rows, vocab, options = len(self.hidden), len(self.weight), self.options
        if rows == 0:
            return []
        size = options.slab_dtype.itemsize * (1 + options.softcapped)  # a softcap is differentiated from its output
        size += options.product_dtype.itemsize * (options.slab_dtype != options.product_dtype)
        per_column = (
            self.weight.shape[1] * options.product_dtype.itemsize * (self.weight.dtype != options.product_dtype)
        )
        fewest = min(vocab, GRANULE if whole_rows else FEWEST_COLUMNS)
        most = options.slab_bytes // (size * rows + per_column)
        if whole_rows and most < fewest:
            least = (size * rows + per_column) * fewest
            raise ValueError(f"slab_bytes: expected {least} or more for {rows} tokens, got {options.slab_bytes}")
        most = max(fewest, most // GRANULE * GRANULE)
        columns = math.ceil(math.ceil(vocab / math.ceil(vocab / most)) / GRANULE) * GRANULE
        height = min(rows, max(1, (options.slab_bytes // min(columns, vocab) - per_column) // size))
        return [
            Tile(slice(r, min(rows, r + height)), slice(c, min(vocab, c + columns)))
            for c, r in product(range(0, vocab, columns), range(0, rows, height))
        ]

    def new_buffer(self, tiles: Sequence[Tile]) -> Tensor:
        """Room for any of the tiles."""
        size = max(tile.height * tile.width for tile in tiles)
        return self.hidden.new_empty(size, dtype=self.options.slab_dtype)

    def fill(self, buffer: Tensor, tile: Tile) -> Tensor:
        """The logits of a tile in ``buffer``."""
        slab = tile.view(buffer)
        hidden, weight = self.hidden[tile.rows], self.weight_of(tile).t()
        bias = None if self.bias is None else self.bias[tile.columns].to(slab.dtype)
        if slab.dtype == hidden.dtype:
            beta = 0.0 if bias is None else self.options.gain
            torch.addmm(slab if bias is None else bias, hidden, weight, beta=beta, alpha=self.options.gain, out=slab)
        else:
            multiply(hidden, weight, slab)
            if bias is not None:
                slab += bias
            if self.options.gain != 1:
                slab *= self.options.gain
        return slab.tanh_() if self.options.softcapped else slab

    def weight_of(self, tile: Tile) -> Tensor:
        return self.weight[tile.columns].to(self.options.product_dtype)

    def labels_of(self, tile: Tile, elsewhere: int) -> tuple[Tensor, Tensor]:
        """Labels as columns of the tile, ``elsewhere`` where they are in none; and where they are in one."""
        labels, ignored = self.labels[tile.rows], self.ignored[tile.rows]
        column = labels - (self.options.first_label + tile.columns.start)
        owned = (column >= 0) & (column < tile.width)
        return torch.where(ignored, IGNORE_INDEX, torch.where(owned, column, elsewhere)), owned

    def divisor_of(self, tile: Tile) -> Tensor:
        return self.divisor[tile.rows] if self.divisor.dim() else self.divisor


def prepare(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    scale: float,
    ignore_index: int,
    slab_bytes: int | None,
    logits_dtype: torch.dtype | None,
    process_group: dist.ProcessGroup | None,
    first_label: int | None,
    impl: Impl,
) -> tuple[Tensor, Options]:
    """Check the arguments of `linear_logprob_stats`; the divisor and the options of the `Head`.

    Without a cap the scale is part of the temperature. With one the cap is: ``c tanh(s u / c) / T`` is
    ``tanh(s u / c)`` divided by ``T / c``.
    """
    _check(hidden, weight, labels, bias)
    limits = torch.finfo(torch.float32)
    for name, number in (("softcap", softcap), ("scale", scale)):
        if number is not None and not limits.tiny <= number <= limits.max:
            raise ValueError(f"{name}: expected a positive finite number, got {number!r}")
    if slab_bytes is None:
        slab_bytes = 2**30 if hidden.is_cuda else 2**26
    if not isinstance(slab_bytes, int) or slab_bytes < 1:
        raise ValueError(f"slab_bytes: expected a positive integer, got {slab_bytes!r}")
    if not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an integer, got {ignore_index!r}")
    product_dtype, exact = _product_dtype(hidden, weight), exact_dtype(hidden, weight)
    if logits_dtype is None:
        logits_dtype = exact if softcap else product_dtype
    if logits_dtype not in (product_dtype, exact):
        raise ValueError(f"logits_dtype: expected {product_dtype} or {exact}, got {logits_dtype}")
    rank = 0 if process_group is None else dist.get_rank(process_group)
    if rank < 0:
        raise ValueError("process_group: expected one that this rank is in")
    options = Options(
        gain=scale / softcap if softcap else 1.0,
        softcapped=softcap is not None,
        ignore_index=ignore_index,
        product_dtype=product_dtype,
        slab_dtype=logits_dtype,
        slab_bytes=slab_bytes,
        first_label=rank * len(weight) if first_label is None else first_label,
        group=process_group,
        impl=impl,
    )
    return temperature_tensor(temperature, labels, exact) / (softcap or scale), options


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in tensors.items():
        if hasattr(x, "placements"):
            raise TypeError(f"{name}: expected a plain tensor, got a DTensor; pass its to_local() and a process_group")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name}: expected the device of hidden, {hidden.device}, got {x.device}")
    expect_integers("labels", labels)
    if hidden.dim() == 0 or hidden.shape[:-1] != labels.shape:
        shapes = f"{list(hidden.shape)} and {list(labels.shape)}"
        raise ValueError(f"hidden, labels: expected [..., d] and [...], got {shapes}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
        raise ValueError(f"weight: expected [V, d] with d = {hidden.shape[-1]}, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected [V] with V = {len(weight)}, got {list(bias.shape)}")
    if labels.device != hidden.device:
        raise ValueError(f"labels: expected the device of hidden, {hidden.device}, got {labels.device}")


def _product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight: expected the dtype of hidden, {hidden.dtype}, or autocast; got {weight.dtype}")
    return hidden.dtype
