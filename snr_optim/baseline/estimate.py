"""The formula: weighted means of the reward, shrunk towards a prior. Tensors in, tensors out; nothing is remembered.

Everything is written in four sums, the last dimension of the tensors here: ``w r``, ``w``, ``r`` and ``1`` over scored
outputs. The first two give the weighted mean, the last two the plain one where no weight is left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_sums(rewards: Tensor, weights: Tensor, scored: Tensor) -> Tensor:
    """``(w r, w, r, 1)`` of each output, zeros where it was not scored: ``[...] -> [..., 4]``."""
    return torch.stack([weights * rewards, weights, rewards, scored.to(rewards.dtype)], dim=-1)


def mean_of(sums: Tensor) -> Tensor:
    """The weighted mean; the plain one where all weights are zero; 0 where nothing was summed."""
    wr, w, r, n = sums.unbind(-1)
    plain = torch.where(n > 0, r / n, 0)
    return torch.where(w > 0, wr / w, plain)


def per_output(sums: Tensor) -> Tensor:
    """The sums of one average output, zeros where there was none."""
    return torch.where(sums[..., 3:] > 0, sums / sums[..., 3:], 0)


def shrunk_mean(own: Tensor, prior: Tensor, shrinkage: Tensor) -> Tensor:
    r"""The mean of ``own`` outputs and ``kappa`` outputs like the ``prior``.

    .. math::
        b = \frac{\sum_{own} w_j r_j + \kappa\, \bar w_{prior}\, b_{prior}}
                 {\sum_{own} w_j + \kappa\, \bar w_{prior}}, \qquad \text{shrinkage} = \frac{\kappa}{1 + \kappa}

    In this form, with both sides divided by ``1 + kappa``, ``kappa = inf`` is a number like others.

    Args:
        own: ``[..., 4]``, sums over the outputs at hand.
        prior: ``[..., 4]``, the sums of one pseudo-output; zeros where there is no prior, and then no shrinkage.
        shrinkage: in [0, 1].
    """
    shrinkage = torch.where(prior[..., 3:] > 0, shrinkage, 0)
    return mean_of((1 - shrinkage) * own + shrinkage * prior)
