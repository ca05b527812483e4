"""The op by its definitions, in float64: what the tests hold both paths to."""

from __future__ import annotations

import torch
from torch import Tensor

from snr_kernels.logprob_stats.results import LogprobStats


def logprob_stats_reference(logits: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> LogprobStats:
    """``log p_y``, ``-sum p log p``, ``sum p^2``, ``||e_y - p||^2`` by the definitions, in float64 and plain torch.

    It is slow, and differentiable in any mode and order.

    Args:
        logits: ``[..., V]``.
        labels: ``[...]`` integers in ``[0, V)``.
        temperature: a number, or a tensor that broadcasts to ``[...]``.

    Returns:
        float64 tensors.

    Example:
        >>> logprob_stats_reference(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).entropy
        tensor([0.6931], dtype=torch.float64)
    """
    divisor = torch.as_tensor(temperature, dtype=torch.float64, device=logits.device).unsqueeze(-1)
    log_p = (logits.double() / divisor).log_softmax(-1)
    p = log_p.exp()
    index = labels.long().unsqueeze(-1)
    others = p.scatter(-1, index, 0.0)
    return LogprobStats(
        log_prob=log_p.gather(-1, index).squeeze(-1),
        entropy=-(p * log_p.clamp_min(torch.finfo(torch.float64).min)).sum(-1),
        sum_p_squared=p.square().sum(-1),
        grad_norm_squared=others.sum(-1).square() + others.square().sum(-1),
    )
