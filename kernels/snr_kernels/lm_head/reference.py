"""Both ops by their definitions, with all logits in float64: what the tests hold them to."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from snr_kernels.lm_head.results import HeadGradNorms
from snr_kernels.logprob_stats import LogprobStats, logprob_stats_reference


def linear_logprob_stats_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> LogprobStats:
    """`logprob_stats_reference` of ``x = softcap tanh(scale (W h + b) / softcap)``, all logits in float64.

    It is differentiable in any mode and order.

    Args:
        hidden: ``[..., d]``.
        weight: ``[V, d]``.
        labels: ``[...]`` integers in ``[0, V)``.
        temperature: a number, or a tensor that broadcasts to ``[...]``.
        bias: ``[V]``.
        softcap: of the scaled logits.
        scale: of the logits.

    Returns:
        float64 tensors.

    Example:
        >>> linear_logprob_stats_reference(torch.ones(1, 1), torch.zeros(4, 1), torch.tensor([2])).sum_p_squared
        tensor([0.2500], dtype=torch.float64)
    """
    logits = hidden.double() @ weight.double().t()
    logits = scale * (logits if bias is None else logits + bias.double())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logprob_stats_reference(logits, labels, temperature)


def head_grad_norms_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> HeadGradNorms:
    """``||d log pi / d (W, b)||^2`` and ``||d log pi / d h||^2`` by autograd, one log-prob after another, in float64.

    Args:
        hidden: ``[N, d]``.
        weight: ``[V, d]``.
        labels: ``[N]`` integers in ``[0, V)``.
        cu_seqlens: ``[S + 1]``.
        temperature: a number, or a tensor that broadcasts to ``[N]``.
        bias: ``[V]``.
        softcap: of the scaled logits.
        scale: of the logits.

    Returns:
        float64, ``[S]`` each.

    Example:
        >>> hidden, labels, cu_seqlens = torch.ones(1, 2), torch.tensor([0]), torch.tensor([0, 1])
        >>> head_grad_norms_reference(hidden, torch.zeros(2, 2), labels, cu_seqlens).head
        tensor([1.], dtype=torch.float64)
    """
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, *([] if bias is None else [bias]))]
    log_prob = linear_logprob_stats_reference(
        leaves[0], leaves[1], labels, temperature, None if bias is None else leaves[2], softcap=softcap, scale=scale
    ).log_prob
    assert log_prob is not None  # a reference computes all statistics

    def squared_norms(loss: Tensor) -> tuple[Tensor, Tensor]:
        of_hidden, *of_head = torch.autograd.grad(loss, leaves, retain_graph=True)
        return torch.stack([g.square().sum() for g in of_head]).sum(), of_hidden.square().sum()

    bounds = cu_seqlens.tolist()
    whole = [squared_norms(log_prob[start:end].sum()) for start, end in pairwise(bounds)]
    single = [squared_norms(each)[0] for each in log_prob]
    per_token = [sum(single[start:end], log_prob.new_zeros(())) for start, end in pairwise(bounds)]
    return HeadGradNorms(
        torch.stack([norms[0] for norms in whole]), torch.stack(per_token), torch.stack([norms[1] for norms in whole])
    )
