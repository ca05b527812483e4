"""What `head_grad_norms` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HeadGradNorms(NamedTuple):
    """Squared norms of gradients of ``log pi = sum_t log p_t``, ``[S]`` each; None where ``outputs=`` has left one out.

    Attributes:
        head: with respect to weight and bias, ``||sum_t g_t h_t^T||_F^2`` (and ``||sum_t g_t||^2``), where ``g_t`` is
            the gradient with respect to ``W h_t + b``.
        head_per_token: the same for each token alone, summed: ``sum_t ||g_t||^2 ||h_t||^2`` (``+ 1`` with a bias),
            which is ``sum_t w_t ||h_t||^2`` of `LogprobStats.grad_norm_squared` at temperature 1.
        hidden: with respect to the hidden states, ``sum_t ||W^T g_t||^2``.
    """

    head: Tensor | None
    head_per_token: Tensor | None
    hidden: Tensor | None
