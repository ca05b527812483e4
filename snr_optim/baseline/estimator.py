"""The estimator: weighted means of the reward, shrunk towards a prior, for every candidate. Nothing is remembered here.

A candidate is a shrinkage ``kappa / (1 + kappa)`` and the share of a prompt's remembered outputs that counts. Outputs
are worked on in blocks of whole prompts that stay in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from snr_kernels.precision import widest_dtype
from snr_optim.baseline.inputs import Batch
from snr_optim.prompt_groups import PromptGroups, sum_of_others

BLOCK = 1 << 19  # numbers at a time


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
    exact = widest_dtype(rewards.device)

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


class VisibleSums(NamedTuple):
    """What baselines of a batch may look at beside the outputs of their own prompt; for each of ``P`` prompts."""

    totals: Sums  # of the prompt's own outputs
    prior: Sums | None  # the average output of the pool; None where it is of no interest
    recalled: Sums | None  # earlier outputs of the prompt

    def map(self, function: Callable[[Tensor], Tensor]) -> VisibleSums:
        """The same done to all of its tensors."""
        prior, recalled = (None if sums is None else sums.map(function) for sums in (self.prior, self.recalled))
        return VisibleSums(self.totals.map(function), prior, recalled)


def totals_of(batch: Batch) -> Sums:
    """The sums of each prompt, ``[P, ...]``."""
    return Sums.cat(
        [sums_of_groups(part.rewards, part.weights, part.scored, part.groups) for part, _, _ in blocks(batch)]
    )


def pooled(totals: Sums, past: Sums, leave_one_out: bool) -> Sums:
    """The average output of the other prompts and of the past, for each prompt."""
    everyone = totals.map(lambda total: total.sum(0))
    if leave_one_out:
        others = Sums(sum_of_others(totals.wr), sum_of_others(totals.w), sum_of_others(totals.r), everyone.n - totals.n)
    else:
        others = everyone.map(lambda total: total.expand_as(totals.r))
    return (others + past).per_output()


def baselines(
    batch: Batch, visible: VisibleSums, leave_one_out: bool, shrinkage: Tensor, share: Tensor, *, subtract: bool = False
) -> Tensor:
    """Those of one candidate, like ``batch.rewards``; with ``subtract`` the advantages."""
    result = torch.empty_like(batch.rewards)
    for part, outputs, prompts in blocks(batch):
        own, prior, recalled = _for_each_output(part, visible, prompts, leave_one_out)
        own = own if recalled is None else own + recalled.map(share.mul)
        b = part.groups.unfold(own.mean() if prior is None else shrunk_mean(own, prior, shrinkage))
        if not subtract:
            result[outputs] = b
        elif part.scored is None:
            torch.sub(part.rewards, b, out=result[outputs])
        else:
            result[outputs] = (part.rewards - b) * part.scored
    return result


def losses(batch: Batch, visible: VisibleSums, leave_one_out: bool, shrinkages: Tensor, shares: Tensor) -> Tensor:
    """``sum w (r - b)^2`` of every candidate and prompt: ``[shrinkages, shares or 1, P]``."""
    parts = []
    for part, _, prompts in blocks(batch):
        own, prior, recalled = _for_each_output(part, visible, prompts, leave_one_out)
        assert prior is not None
        owns = [own] if recalled is None else [own + recalled.map(share.mul) for share in shares]
        of_outputs = []
        for shrinkage in shrinkages:
            for some in owns:
                b = part.groups.unfold(shrunk_mean(some, prior, shrinkage))
                of_outputs.append((part.weights * (part.rewards - b).square()).view(len(b), -1).sum(1))
        parts.append(part.groups.sum(torch.stack(of_outputs, dim=1).to(visible.totals.w.dtype)))
    return torch.cat(parts).T.reshape(len(shrinkages), -1, len(visible.totals.w))


def blocks(batch: Batch) -> Iterator[tuple[Batch, slice, slice]]:
    """Parts of whole prompts; and their outputs and prompts in the batch."""
    most = len(batch.rewards)
    if batch.rewards.device.type == "cpu":  # on an accelerator, the fewer kernels the better
        most = max(1, BLOCK // (batch.rewards[:1].numel() or 1))
    for outputs, prompts, groups in batch.groups.blocks(most):
        yield batch.part(outputs, groups), outputs, prompts


def _for_each_output(
    part: Batch, visible: VisibleSums, prompts: slice, leave_one_out: bool
) -> tuple[Sums, Sums | None, Sums | None]:
    """Outputs of its prompt, the prior and the remembered outputs; in shapes that :meth:`PromptGroups.fold` gives."""
    groups = part.groups
    totals, prior, recalled = visible.map(lambda of_prompts: groups.spread(of_prompts[prompts].to(part.rewards.dtype)))
    if leave_one_out:
        return sums_of_others(part.rewards, part.weights, part.scored, groups, totals), prior, recalled
    return totals.map(lambda total: total.expand_as(groups.fold(part.rewards))), prior, recalled
