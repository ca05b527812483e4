"""Whether nothing was left out: what the layers report must add up to the gradients that autograd finds."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from snr_optim.grad_norms.contributions import Use

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the gradient's norm
LOW_PRECISION = 5e-2  # of products that were rounded; gradients that are sums in low precision tell nothing
ROUNDING = 16  # units in the last place of what a gradient is a sum of, where little of it is left


class GradientCheck:
    """Compares, in a training backward pass, the gradient of a parameter with the sum of its uses.

    Args:
        confirmed: parameters that need no comparison any more; those that stand the test are added. A gradient of zero,
            or one that is not finite, tells nothing.
    """

    def __init__(self, confirmed: set[str]) -> None:
        self._confirmed = confirmed
        self._done: Collection[str] = frozenset(confirmed)
        self._expected: dict[str, Tensor] = {}
        self._largest: dict[str, Tensor] = {}

    def expect(self, uses: Mapping[str, Use]) -> None:
        """Uses of parameters, by name, as their gradients arrive."""
        for name, use in uses.items():
            if name not in self._done:
                gradient, largest = use.gradient(), use.largest()
                self._expected[name] = self._expected[name] + gradient if name in self._expected else gradient
                self._largest[name] = self._largest[name] + largest if name in self._largest else largest

    def compare(self, name: str, gradient: Tensor, lowest: torch.dtype) -> None:
        """The gradient that autograd is about to accumulate.

        Raises:
            RuntimeError: it is not what the uses add up to.
        """
        expected = self._expected.pop(name, None)
        if expected is None or gradient.layout != torch.strided or gradient.dtype not in TOLERANCE:
            return
        size = torch.linalg.vector_norm(gradient.to(expected.dtype))
        difference = torch.linalg.vector_norm(gradient.to(expected.dtype) - expected.view_as(gradient))
        rounding = ROUNDING * torch.finfo(lowest).eps * self._largest[name]
        if difference > TOLERANCE.get(lowest, LOW_PRECISION) * size + rounding:  # False where either is NaN
            raise RuntimeError(
                f"{name!r}: its gradient, of norm {float(size):.3g}, differs by {float(difference):.3g} from what "
                "the layers that own it account for. Is it also used elsewhere, outside of a layer's own forward, or "
                "does a hook of the parameter change it?"
            )
        if 0 < size < torch.inf:
            self._confirmed.add(name)
