"""Proxies of the gradient norm of a sequence: they need no backward pass, only the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from snr_kernels.checks import expect_integers
from snr_kernels.logprob_stats import IGNORE_INDEX, logprob_stats


def logit_grad_norms(
    logits: Tensor, labels: Tensor, mask: Tensor | None = None, temperature: float | Tensor = 1.0
) -> Tensor:
    r"""Per-token squared norm of the gradient of ``log p_y`` with respect to the scaled logits.

    .. math::
        w_t = \|e_{y_t} - p_t\|^2 = (1 - p_{y_t})^2 + \sum_{v \neq y_t} p_{t,v}^2

    Summed over a sequence it is the sequence form of the weight in Optimal Token Baseline
    (arXiv 2602.07078), computed without its cancellation (see :func:`~snr_kernels.logprob_stats`).

    Args:
        logits: ``[..., V]``, aligned with ``labels``: ``logits[..., t, :]`` predict ``labels[..., t]``.
        labels: ``[...]`` integers; -100 gives 0.
        mask: ``[...]`` bool or 0/1; tokens that are not a policy's own choice (prompt, padding) give 0,
            whatever their logits and labels, which are not read.
        temperature: the sampling temperature, a number or one per token.

    Returns:
        ``[...]`` float32 (float64 for float64 logits), in ``[0, 2]``, without gradient.

    Raises:
        TypeError, ValueError: what :func:`~snr_kernels.logprob_stats` raises; a mask of another shape.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 30.0]]])
        >>> labels = torch.tensor([[0, 1]])
        >>> logit_grad_norms(logits, labels)
        tensor([[5.0000e-01, 1.7513e-26]])
        >>> logit_grad_norms(logits, labels, mask=torch.tensor([[1, 0]])).sum(-1)     # one weight per sequence
        tensor([0.5000])
    """
    if mask is not None:
        if mask.shape != labels.shape:
            raise ValueError(f"mask: expected the shape of labels, {list(labels.shape)}, got {list(mask.shape)}")
        expect_integers("labels", labels)  # before they are widened
        labels = torch.where(mask.bool(), labels, torch.full_like(labels, IGNORE_INDEX, dtype=torch.long))
    if isinstance(temperature, Tensor):
        temperature = temperature.detach()
    with torch.no_grad():
        wanted = ["grad_norm_squared"]
        norms = logprob_stats(logits, labels, temperature, ignore_index=IGNORE_INDEX, outputs=wanted).grad_norm_squared
    assert norms is not None  # it was asked for
    return norms
