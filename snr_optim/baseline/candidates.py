"""The baselines that a batch could get: what they may look at, each of them, and how well each does.

A candidate is a shrinkage ``kappa / (1 + kappa)`` and the share of a prompt's remembered outputs that counts. Outputs
are worked on in blocks of whole prompts that stay in the cache of a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from snr_optim.baseline.estimator import Sums, shrunk_mean, sums_of_groups, sums_of_others
from snr_optim.baseline.inputs import Batch
from snr_optim.prompt_groups import sum_of_others

BLOCK = 1 << 19  # numbers at a time


class View(NamedTuple):
    """What baselines of a batch may look at beside the outputs of their own prompt; for each of ``P`` prompts."""

    totals: Sums  # of the prompt's own outputs
    prior: Sums | None  # the average output of the pool; None where it is of no interest
    recalled: Sums | None  # earlier outputs of the prompt

    def map(self, function: Callable[[Tensor], Tensor]) -> View:
        """The same done to all of its tensors."""
        prior, recalled = (None if sums is None else sums.map(function) for sums in (self.prior, self.recalled))
        return View(self.totals.map(function), prior, recalled)


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
    batch: Batch, view: View, leave_one_out: bool, shrinkage: Tensor, share: Tensor, *, subtract: bool = False
) -> Tensor:
    """Those of one candidate, like ``batch.rewards``; with ``subtract`` the advantages."""
    result = torch.empty_like(batch.rewards)
    for part, outputs, prompts in blocks(batch):
        own, prior, recalled = _for_each_output(part, view, prompts, leave_one_out)
        own = own if recalled is None else own + recalled.map(share.mul)
        b = part.groups.unfold(own.mean() if prior is None else shrunk_mean(own, prior, shrinkage))
        if not subtract:
            result[outputs] = b
        elif part.scored is None:
            torch.sub(part.rewards, b, out=result[outputs])
        else:
            result[outputs] = (part.rewards - b) * part.scored
    return result


def losses(batch: Batch, view: View, leave_one_out: bool, shrinkages: Tensor, shares: Tensor) -> Tensor:
    """``sum w (r - b)^2`` of every candidate and prompt: ``[shrinkages, shares or 1, P]``."""
    parts = []
    for part, _, prompts in blocks(batch):
        own, prior, recalled = _for_each_output(part, view, prompts, leave_one_out)
        assert prior is not None
        owns = [own] if recalled is None else [own + recalled.map(share.mul) for share in shares]
        of_outputs = []
        for shrinkage in shrinkages:
            for some in owns:
                b = part.groups.unfold(shrunk_mean(some, prior, shrinkage))
                of_outputs.append((part.weights * (part.rewards - b).square()).view(len(b), -1).sum(1))
        parts.append(part.groups.sum(torch.stack(of_outputs, dim=1).to(view.totals.w.dtype)))
    return torch.cat(parts).T.reshape(len(shrinkages), -1, len(view.totals.w))


def blocks(batch: Batch) -> Iterator[tuple[Batch, slice, slice]]:
    """Parts of whole prompts; and their outputs and prompts in the batch."""
    most = len(batch.rewards)
    if batch.rewards.device.type == "cpu":  # on an accelerator, the fewer kernels the better
        most = max(1, BLOCK // (batch.rewards[:1].numel() or 1))
    for outputs, prompts, groups in batch.groups.blocks(most):
        yield batch.part(outputs, groups), outputs, prompts


def _for_each_output(
    part: Batch, view: View, prompts: slice, leave_one_out: bool
) -> tuple[Sums, Sums | None, Sums | None]:
    """Outputs of its prompt, the prior and the remembered outputs; in shapes that :meth:`PromptGroups.fold` gives."""
    groups = part.groups
    totals, prior, recalled = view.map(lambda of_prompts: groups.spread(of_prompts[prompts].to(part.rewards.dtype)))
    if leave_one_out:
        return sums_of_others(part.rewards, part.weights, part.scored, groups, totals), prior, recalled
    return totals.map(lambda total: total.expand_as(groups.fold(part.rewards))), prior, recalled
