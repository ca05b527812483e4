"""From the uses of parameters to a norm per unit: exact, or estimated from random projections."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from snr_kernels.dispatch import exact_dtype
from snr_kernels.linear_grad_norms import linear_grad_norms
from snr_kernels.segments import Segments
from snr_optim.grad_norms.contributions import BiasUse, MatrixUse, Use
from snr_optim.grad_norms.rules import Uses

Ids: TypeAlias = tuple[Tensor, Segments]  # and the bounds of the units


class Totals(Protocol):
    """Adds up what the layers report during one backward pass."""

    def add(self, names: dict[str, str], uses: Uses) -> None:
        """The uses of a layer whose parameters, ``names`` by their names within the layer, have no other use."""

    def keep(self, name: str, use: Use, tied: Ids | None) -> None:
        """One of several uses of a parameter; ``tied``: what an embedding was given, if that is the only other use."""

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Squared norms, ``[S]``; and the variances of their estimates."""


class ExactTotals:
    """Sums of exact squared norms."""

    def __init__(self, num: int, device: torch.device) -> None:
        self._parts = [torch.zeros(num, device=device)]
        self._kept: dict[str, list[Use]] = {}
        self._queue: list[tuple[MatrixUse, bool]] = []  # of layers that were given the same input

    def add(self, names: dict[str, str], uses: Uses) -> None:
        weight, bias = uses.get("weight"), uses.get("bias")
        if isinstance(weight, MatrixUse) and not weight.one_hot and isinstance(bias, BiasUse | None):
            self._enqueue(weight, bias is not None)
            uses = {local: use for local, use in uses.items() if local not in ("weight", "bias")}
        self._parts += [use.squared() for use in uses.values()]

    def _enqueue(self, use: MatrixUse, bias: bool) -> None:
        """Wait for the layers that share the activations: their Gram matrix is then computed once."""
        if self._queue:
            first, its_bias = self._queue[0]
            if its_bias != bias or first.source is None or not first.source.is_same(use.source):
                self._flush()
        self._queue.append((use, bias))

    def _flush(self) -> None:
        if not self._queue:
            return
        first, bias = self._queue[0]
        gradients = [use.left for use, _ in self._queue]
        self._parts.append(linear_grad_norms(first.right, gradients, first.segments, bias=bias))
        self._queue.clear()

    def keep(self, name: str, use: Use, tied: Ids | None) -> None:
        if tied is not None and isinstance(use, MatrixUse) and not use.one_hot:
            use = use.narrowed(*tied)
        self._kept.setdefault(name, []).append(use)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        self._flush()
        for uses in self._kept.values():
            self._parts += [use.squared() for use in uses]
            self._parts += [2 * other.inner(use) for i, use in enumerate(uses) for other in uses[:i]]
        self._kept.clear()
        return _sum(self._parts), None


class SketchTotals:
    r"""Random projections of the gradients of matrices; what is linear in the tokens anyway stays exact.

    For a gradient ``M`` and ``k`` columns ``r`` of random signs, ``E ||M^T r||^2 = ||M||_F^2``. The mean over the
    columns is unbiased, and its variance is estimated from how they scatter.

    Args:
        exact: parameters, by name, that some layers have other uses of than those that can be sketched.
    """

    def __init__(
        self, num: int, device: torch.device, size: int, seed: tuple[int, ...], exact: Collection[str] = ()
    ) -> None:
        self._parts, self._variances = [torch.zeros(num, device=device)], [torch.zeros(num, device=device)]
        self._size, self._seed = size, seed
        self._signs: dict[str, int] = {}
        self._sketched = dict.fromkeys(exact, False)
        self._transposed: dict[str, bool] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._exact = ExactTotals(num, device)

    def add(self, names: dict[str, str], uses: Uses) -> None:
        for local, use in uses.items():
            if isinstance(use, MatrixUse) and not use.one_hot and self._saves(use):
                self._estimate(self._sketch(names[local], use))
            else:
                self._exact.add(names, {local: use})

    def keep(self, name: str, use: Use, tied: Ids | None) -> None:
        if isinstance(use, MatrixUse) and self._sketched.setdefault(name, self._saves(use)):  # all uses, or none
            if self._transposed.setdefault(name, use.transposed) != use.transposed:
                raise RuntimeError("a weight is tied to its own transpose: not supported")
            self._kept.setdefault(name, []).append(self._sketch(name, use))
        else:
            self._exact.keep(name, use, tied)

    def _saves(self, use: MatrixUse) -> bool:
        """Whether projections cost less than the exact norm: not with short sequences, nor with narrow matrices."""
        return 2 * self._size < use.segments.max_length and self._size < use.shape[0]

    def _sketch(self, name: str, use: MatrixUse) -> Tensor:
        number = self._signs.setdefault(name, len(self._signs))  # the same signs for all uses of a parameter
        generator = torch.Generator(use.right.device).manual_seed(hash((*self._seed, number)) % 2**63)
        shape = (use.shape[0], self._size)
        signs = torch.randint(2, shape, generator=generator, device=use.right.device, dtype=torch.int8).mul_(2).sub_(1)
        return use.sketch(signs)

    def _estimate(self, sketch: Tensor) -> None:
        columns = sketch.square().sum(-1)  # [S, k]
        self._parts.append(columns.mean(1))
        exact = columns if columns.device.type == "mps" else columns.double()  # fourth powers of a scaled loss
        self._variances.append(exact.var(1) / self._size)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        for sketches in self._kept.values():
            self._estimate(torch.stack(sketches).sum(0))
        self._kept.clear()
        return _sum([*self._parts, self._exact.finish()[0]]), _sum(self._variances)


def next_size(size: int, squared: Tensor, variances: Tensor, relative_error: float) -> int:
    """Columns that the next sketch wants, from the errors of this one: the root mean square over the units.

    The geometric mean with the present number, as a single sketch does not know its error well. Where nothing was
    estimated, exact norms being cheaper, the number stays.
    """
    relative = (variances.sqrt() / squared).square()
    relative = relative[torch.isfinite(relative) & (variances > 0)]
    if not len(relative):
        return size
    wanted = size * float(relative.mean()) / relative_error**2
    return min(MOST, max(FEWEST, math.ceil(math.sqrt(size * wanted))))


FEWEST, MOST = 4, 1024


def _sum(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    exact = exact_dtype(*parts)
    return torch.stack([part.to(exact) for part in parts]).sum(0)
