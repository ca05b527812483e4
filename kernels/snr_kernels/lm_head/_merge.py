"""A softmax known in parts, of slices of the vocabulary or of the ranks that hold them, and how parts are joined.

What a part says of its own tokens is as exact where the label has all the mass as the whole would be: all sums here
are of positive terms, but for ``w - q^2``, whose error is small against the ``q^2`` that it is added to again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snr_kernels.logprob_stats.paths import FAR_BELOW


class PartialSoftmax(NamedTuple):
    """The softmax of each row over some of its tokens, ``[N]`` each (``[K, N]`` for several); logs in nats.

    Attributes:
        reference: a logit near the largest.
        log_total: log-sum-exp relative to ``reference / temperature``; ``-inf`` where no token can be.
        log_prob: of the label; 0 where it is not among the tokens.
        owned: how often the label is among them.
        entropy: of these tokens alone, as are the following.
        sum_p_squared: all of them.
        rest: mass of those that are not the label: 1 where it is not among them.
        rest_squared: sum of ``p^2`` over those.
    """

    reference: Tensor
    log_total: Tensor
    log_prob: Tensor
    owned: Tensor
    entropy: Tensor
    sum_p_squared: Tensor
    rest: Tensor
    rest_squared: Tensor

    @staticmethod
    def of(results: Sequence[Tensor], owned: Tensor, log_unit: float) -> PartialSoftmax:
        """From the seven results of `logprob_stats` for a slice, called with any label of the slice where it has none.

        Args:
            results: ``[N]`` each; entropy, ``sum_p_squared`` and the norm may be empty, where they are not wanted.
            owned: ``[N]`` bool, whether the label is in the slice.
            log_unit: nats per unit of its log_total.
        """
        log_prob, entropy, squares, norm, reference, log_total, q = results
        empty = reference == torch.finfo(reference.dtype).min
        nothing = torch.zeros_like(reference)
        entropy, squares, norm = (x if x.numel() else nothing for x in (entropy, squares, norm))
        return PartialSoftmax(
            reference=reference,
            log_total=(log_total * log_unit).masked_fill(empty, -math.inf),
            log_prob=torch.where(owned, log_prob.masked_fill(empty, -math.inf), 0.0),
            owned=owned.to(reference.dtype),
            entropy=entropy.masked_fill(empty, 0.0),
            sum_p_squared=squares.masked_fill(empty, 0.0),
            rest=torch.where(owned, q, 1.0).masked_fill(empty, 0.0),
            rest_squared=torch.where(owned, norm - q.square(), squares).masked_fill(empty, 0.0),
        )

    def finish(self, ignored: Tensor, log_unit: float) -> tuple[Tensor, ...]:
        """The seven results of `logprob_stats`: NaN where the label is in no part; 0 where ``ignored``."""
        bad = (self.owned == 0) | (self.log_total == -math.inf)
        norm = self.rest.square() + self.rest_squared
        log_total = self.log_total / log_unit
        found = (self.log_prob, self.entropy, self.sum_p_squared, norm, self.reference, log_total, self.rest)
        return tuple(x.masked_fill(bad, math.nan).masked_fill(ignored, 0.0) for x in found)


def join(parts: PartialSoftmax, temperature: Tensor) -> PartialSoftmax:
    r"""Several parts as one.

    With :math:`\pi_k` the share of part `k` in the total:

    .. math::
        H = \sum_k \pi_k (H_k - \log \pi_k), \quad \sum p^2 = \sum_k \pi_k^2 s_k, \quad
        \log p_y = \log p_y^{(k)} + \log \pi_k

    Args:
        parts: ``[K, N]`` each.
        temperature: ``[]`` or ``[N]``.
    """
    scale = temperature.reciprocal()
    highest = parts.reference.amax(0)
    level = (parts.reference - highest) * scale + parts.log_total  # log of each total, relative to one number a row
    top, leader = level.max(0, keepdim=True)
    below = level - torch.where(top == -math.inf, 0.0, top)
    followers = below.exp().scatter(0, leader, 0.0).sum(0).log1p()  # log of the total, relative to the leader's
    log_share = below - followers
    share = log_share.exp()
    leading = PartialSoftmax(*(x.gather(0, leader).squeeze(0) for x in parts))
    return PartialSoftmax(
        reference=leading.reference,
        log_total=leading.log_total + followers,
        log_prob=torch.where(parts.owned > 0, parts.log_prob + log_share, 0.0).sum(0),
        owned=parts.owned.sum(0),
        entropy=(share * (parts.entropy - log_share.clamp_min(FAR_BELOW))).sum(0),
        sum_p_squared=(share.square() * parts.sum_p_squared).sum(0),
        rest=(share * parts.rest).sum(0),
        rest_squared=(share.square() * parts.rest_squared).sum(0),
    )
