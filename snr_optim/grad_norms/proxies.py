"""Proxies of the gradient norm of a sequence: they need no backward pass, only logits or log-probs."""

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


def chosen_token_grad_norms(log_probs: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""A lower bound of :func:`logit_grad_norms`, within a factor of two, from the chosen tokens' log-probs alone.

    .. math::
        w_t = (1 - p_{y_t})^2, \qquad
        w_t \le \|e_{y_t} - p_t\|^2 = (1 - p_{y_t})^2 + \sum_{v \neq y_t} p_{t,v}^2 \le 2 w_t

    The probabilities of the other tokens are not known here, but they add up to ``1 - p``, so that their squares add up
    to at most ``(1 - p)^2``. ``1 - p`` is computed as ``-expm1(log p)``, which has all the digits of ``log p`` where
    ``p`` is close to 1.

    Args:
        log_probs: any shape, ``log p`` of the chosen tokens. What rounding has put above 0 counts as 0.
        mask: the same shape, bool or 0/1; tokens that are not a policy's own choice give 0, whatever their log-prob.

    Returns:
        The shape of ``log_probs``, float32 (float64 for float64), in ``[0, 1]``, without gradient.

    Raises:
        TypeError: ``log_probs`` is not a tensor of floating-point numbers.
        ValueError: a mask of another shape.

    Example:
        >>> chosen_token_grad_norms(torch.tensor([0.5, 1.0]).log())
        tensor([0.2500, 0.0000])
        >>> chosen_token_grad_norms(torch.tensor([-1e-12]))  # 1 - exp(-1e-12) is 0 in float32
        tensor([1.0000e-24])
    """
    if not isinstance(log_probs, Tensor) or not log_probs.is_floating_point():
        kind = log_probs.dtype if isinstance(log_probs, Tensor) else type(log_probs).__name__
        raise TypeError(f"log_probs: expected a floating-point tensor, got {kind}")
    if mask is not None and mask.shape != log_probs.shape:
        raise ValueError(f"mask: expected the shape of log_probs, {list(log_probs.shape)}, got {list(mask.shape)}")
    log_probs = log_probs.detach().to(torch.promote_types(log_probs.dtype, torch.float32))
    bounds = torch.expm1(log_probs.clamp_max(0)).square()
    return bounds if mask is None else torch.where(mask.to(bounds.device).bool(), bounds, 0)
