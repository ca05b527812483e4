"""Adds contributions up to a squared norm per unit: exactly, or by an estimate from random projections."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from snr_kernels.linear_grad_norms import linear_grad_norms
from snr_kernels.precision import exact_dtype, widest_dtype
from snr_kernels.segments import Segments
from snr_optim.grad_norms.contributions import BiasContribution, Contribution, Contributions, MatrixContribution

FEWEST_COLUMNS, MOST_COLUMNS = 4, 1024


class NormAccumulator(Protocol):
    """Adds up what the layers contribute during one backward pass."""

    def add(self, names: Mapping[str, str], contributions: Contributions) -> None:
        """Add what a layer contributes to parameters that get no other contribution.

        Args:
            names: names within the model, by names within the layer.
            contributions: by names within the layer.
        """

    def keep(self, name: str, contribution: Contribution, tied_ids: tuple[Tensor, Segments] | None) -> None:
        """Keep one of several contributions to a parameter until all have come.

        Args:
            name: the parameter, by its name within the model.
            contribution: one of them.
            tied_ids: what an embedding was given, and the bounds of the units in it, if the embedding makes the only
                other contribution.
        """

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Squared norms, ``[S]``, and the variances of their estimates; None where the norms are exact."""


class ExactNorms:
    """Sums of exact squared norms."""

    def __init__(self, num_units: int, device: torch.device) -> None:
        self._parts = [torch.zeros(num_units, device=device)]
        self._kept: dict[str, list[Contribution]] = {}
        self._queue: list[tuple[MatrixContribution, bool]] = []  # from layers that were given the same input

    def add(self, names: Mapping[str, str], contributions: Contributions) -> None:
        weight, bias = contributions.get("weight"), contributions.get("bias")
        if isinstance(weight, MatrixContribution) and not weight.one_hot and isinstance(bias, BiasContribution | None):
            self._enqueue(weight, bias is not None)
            contributions = {local: each for local, each in contributions.items() if local not in ("weight", "bias")}
        self._parts += [each.squared() for each in contributions.values()]

    def _enqueue(self, weight: MatrixContribution, has_bias: bool) -> None:
        """Wait for other layers that were given the same activations: their Gram matrix is then computed once."""
        if self._queue:
            first, its_bias = self._queue[0]
            if its_bias != has_bias or first.layer_input is None or not first.layer_input.is_same(weight.layer_input):
                self._flush()
        self._queue.append((weight, has_bias))

    def _flush(self) -> None:
        if not self._queue:
            return
        first, has_bias = self._queue[0]
        gradients = [weight.left for weight, _ in self._queue]
        self._parts.append(linear_grad_norms(first.right, gradients, first.segments, bias=has_bias))
        self._queue.clear()

    def keep(self, name: str, contribution: Contribution, tied_ids: tuple[Tensor, Segments] | None) -> None:
        if tied_ids is not None and isinstance(contribution, MatrixContribution) and not contribution.one_hot:
            contribution = contribution.narrowed(*tied_ids)
        self._kept.setdefault(name, []).append(contribution)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        self._flush()
        for kept in self._kept.values():
            self._parts += [each.squared() for each in kept]
            self._parts += [2 * other.inner(each) for i, each in enumerate(kept) for other in kept[:i]]
        self._kept.clear()
        return _sum(self._parts), None


class SketchedNorms:
    r"""Random projections of the gradients of matrices; what is linear in the tokens anyway stays exact.

    For a gradient ``M`` and ``k`` columns ``r`` of random signs, ``E ||M^T r||^2 = ||M||_F^2``. The mean over the
    columns is unbiased, and its variance is estimated from how they scatter.

    Args:
        num_units: how many norms are estimated.
        device: where the gradients are.
        num_columns: ``k``.
        seed: the seed of the signs.
        exact: parameters, by name, to which some layers make contributions that cannot be sketched.
    """

    def __init__(
        self,
        num_units: int,
        device: torch.device,
        num_columns: int,
        seed: tuple[int, ...],
        exact: Collection[str] = (),
    ) -> None:
        self._parts, self._variances = ([torch.zeros(num_units, device=device)] for _ in range(2))
        self._num_columns, self._seed = num_columns, seed
        self._sign_numbers: dict[str, int] = {}  # which signs each parameter gets
        self._is_sketched = dict.fromkeys(exact, False)
        self._transposed: dict[str, bool] = {}
        self._kept: dict[str, list[Tensor]] = {}
        self._exact = ExactNorms(num_units, device)

    def add(self, names: Mapping[str, str], contributions: Contributions) -> None:
        for local, each in contributions.items():
            if isinstance(each, MatrixContribution) and not each.one_hot and self._is_cheaper(each):
                self._estimate(self._sketch(names[local], each))
            else:
                self._exact.add(names, {local: each})

    def keep(self, name: str, contribution: Contribution, tied_ids: tuple[Tensor, Segments] | None) -> None:
        if isinstance(contribution, MatrixContribution) and self._is_sketched.setdefault(  # all to a parameter, or none
            name, self._is_cheaper(contribution)
        ):
            if self._transposed.setdefault(name, contribution.transposed) != contribution.transposed:
                raise RuntimeError("a weight is tied to its own transpose: not supported")
            self._kept.setdefault(name, []).append(self._sketch(name, contribution))
        else:
            self._exact.keep(name, contribution, tied_ids)

    def _is_cheaper(self, matrix: MatrixContribution) -> bool:
        """Whether projections cost less than the exact norm: not for short sequences, nor for narrow matrices."""
        return 2 * self._num_columns < matrix.segments.max_length and self._num_columns < matrix.shape[0]

    def _sketch(self, name: str, matrix: MatrixContribution) -> Tensor:
        number = self._sign_numbers.setdefault(name, len(self._sign_numbers))  # one for all that a parameter gets
        device = matrix.right.device
        generator = torch.Generator(device).manual_seed(hash((*self._seed, number)) % 2**63)
        shape = (matrix.shape[0], self._num_columns)
        signs = torch.randint(2, shape, generator=generator, device=device, dtype=torch.int8).mul_(2).sub_(1)
        return matrix.sketch(signs)

    def _estimate(self, sketch: Tensor) -> None:
        columns = sketch.square().sum(-1)  # [S, k]
        self._parts.append(columns.mean(1))
        widest = columns.to(widest_dtype(columns.device))  # the fourth powers of a scaled loss overflow float32
        self._variances.append(widest.var(1) / self._num_columns)

    def finish(self) -> tuple[Tensor, Tensor | None]:
        for sketches in self._kept.values():
            self._estimate(torch.stack(sketches).sum(0))
        self._kept.clear()
        return _sum([*self._parts, self._exact.finish()[0]]), _sum(self._variances)


def next_num_columns(num_columns: int, squared: Tensor, variances: Tensor, relative_error: float) -> int:
    """How many columns the next sketch should have, by the errors of this one: their root mean square over the units.

    It is the geometric mean of the number that this sketch asks for and the present one, as a single sketch knows its
    error only roughly. Where nothing was estimated, because exact norms were cheaper, the number stays.
    """
    relative = (variances.sqrt() / squared).square()
    relative = relative[torch.isfinite(relative) & (variances > 0)]
    if not len(relative):
        return num_columns
    wanted = num_columns * float(relative.mean()) / relative_error**2
    return min(MOST_COLUMNS, max(FEWEST_COLUMNS, math.ceil(math.sqrt(num_columns * wanted))))


def _sum(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    exact = exact_dtype(*parts)
    return torch.stack([part.to(exact) for part in parts]).sum(0)
