"""Whether nothing was left out: what the layers report must add up to the gradients that autograd finds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from snr_optim.per_sample.uses import Use

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
LOW_PRECISION = 5e-2  # of products that were rounded; gradients that are sums in low precision tell nothing


class GradientCheck:
    """Compares, for one training backward pass, every parameter's gradient with the sum of its uses."""

    def __init__(self) -> None:
        self._expected: dict[str, Tensor] = {}
        self.compared = False  # anything

    def expect(self, uses: Mapping[str, Use]) -> None:
        """Uses of parameters, by name, as their gradients arrive."""
        for name, use in uses.items():
            gradient = use.gradient()
            self._expected[name] = self._expected[name] + gradient if name in self._expected else gradient

    def compare(self, name: str, gradient: Tensor, lowest: torch.dtype) -> None:
        """The gradient that autograd is about to accumulate.

        Raises:
            RuntimeError: it is not what the uses add up to.
        """
        expected = self._expected.pop(name, None)
        if expected is None or gradient.layout != torch.strided or gradient.dtype not in TOLERANCE:
            return
        self.compared = True
        size = torch.linalg.vector_norm(gradient.to(expected.dtype))
        difference = torch.linalg.vector_norm(gradient.to(expected.dtype) - expected.view_as(gradient))
        if difference > TOLERANCE.get(lowest, LOW_PRECISION) * size:  # False where either is NaN
            raise RuntimeError(
                f"{name!r}: its gradient, of norm {float(size):.3g}, differs by {float(difference):.3g} from what "
                "the layers that own it account for. Is it also used elsewhere, outside of a layer's own forward?"
            )
