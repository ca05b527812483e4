"""The formula: weighted means of the reward, shrunk towards a prior. Nothing is remembered here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snr_optim.prompt_groups import PromptGroups


@dataclass(frozen=True)
class Sums:
    """Over some outputs: of ``w r``, ``w`` and ``r``, and their number. Tensors that broadcast together.

    The first two give the weighted mean; the last two the plain one, for where no weight is left.
    """

    wr: Tensor
    w: Tensor
    r: Tensor
    n: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Sums:
        """The same done to all four."""
        return Sums(function(self.wr), function(self.w), function(self.r), function(self.n))

    @classmethod
    def cat(cls, parts: Sequence[Sums]) -> Sums:
        """One below the other."""
        return cls(*map(torch.cat, zip(*(part._tensors() for part in parts), strict=True)))

    @classmethod
    def unstack(cls, stacked: Tensor) -> Sums:
        """From ``[..., 4]``."""
        return cls(*stacked.unbind(-1))

    def stacked(self) -> Tensor:
        """As ``[..., 4]``."""
        return torch.stack(self._tensors(), dim=-1)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.wr, self.w, self.r, self.n

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.wr + other.wr, self.w + other.w, self.r + other.r, self.n + other.n)

    def per_output(self) -> Sums:
        """Of one average output; zeros where there was none."""
        n = self.n.clamp_min(torch.finfo(self.n.dtype).tiny)
        return self.map(lambda total: total / n)

    def mean(self) -> Tensor:
        """Weighted; plain where all weights are zero; 0 where nothing was summed."""
        return _mean(self.wr, self.w, lambda: (self.r, self.n))


def shrunk_mean(own: Sums, prior: Sums, shrinkage: Tensor) -> Tensor:
    r"""The mean of ``own`` outputs and ``kappa`` outputs like the ``prior``.

    .. math::
        b = \frac{\sum_{own} w_j r_j + \kappa\, \bar w_{prior}\, b_{prior}}
                 {\sum_{own} w_j + \kappa\, \bar w_{prior}}, \qquad \text{shrinkage} = \frac{\kappa}{1 + \kappa}

    In this form, with both sides divided by ``1 + kappa``, ``kappa = inf`` is a number like others. Where there are no
    outputs at hand the prior decides, for ``kappa = 0`` too.

    Args:
        own: over the outputs at hand.
        prior: of one pseudo-output; zeros where there is no prior, and then no shrinkage.
        shrinkage: in [0, 1], a scalar.
    """
    shrinkage = torch.where(prior.n > 0, torch.where(own.n > 0, shrinkage, 1), 0)
    return _mean(
        torch.lerp(own.wr, prior.wr, shrinkage),
        torch.lerp(own.w, prior.w, shrinkage),
        lambda: (torch.lerp(own.r, prior.r, shrinkage), torch.lerp(own.n, prior.n, shrinkage)),
    )


def _mean(wr: Tensor, w: Tensor, plain: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
    """``wr / w``, and where ``w`` is 0 the plain mean from its sum and count."""
    there = w > 0
    if w.device.type == "cpu" and there.all():  # nearly always, and half the price; not worth to wait for on a device
        return wr / w
    r, n = plain()
    return torch.where(there, wr / w, torch.where(n > 0, r / n, 0))


def sums_of_groups(rewards: Tensor, weights: Tensor, scored: Tensor | None, groups: PromptGroups) -> Sums:
    """The sums over all outputs of each group, ``[P, ...]``, in float64 (float32 on mps)."""
    exact = torch.float32 if rewards.device.type == "mps" else torch.float64

    def total(values: Tensor) -> Tensor:
        return groups.sum(values.to(exact)) if groups.size is None else groups.fold(values).sum(1).to(exact)

    r = total(rewards)
    n = groups.sizes.view(-1, *[1] * (rewards.dim() - 1)).to(exact).expand_as(r) if scored is None else total(scored)
    return Sums(total(weights * rewards), total(weights), r, n)


def sums_of_others(rewards: Tensor, weights: Tensor, scored: Tensor | None, groups: PromptGroups, totals: Sums) -> Sums:
    """The sums over the *other* outputs of each group; all shapes as ``PromptGroups.fold`` and ``spread`` give them.

    What is left beside a large number is added up, not what remains of a difference; counts are exact either way, and
    taken off the ``totals`` of the groups.
    """
    wr, w, r = (groups.fold(groups.sum_of_others(values)) for values in (weights * rewards, weights, rewards))
    return Sums(wr, w, r, totals.n - (1.0 if scored is None else groups.fold(scored)))
