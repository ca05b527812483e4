"""The op by its definition, one sequence after another, in float64: what the tests hold both paths to."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def linear_grad_norms_reference(
    activations: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, *, bias: bool = False
) -> Tensor:
    """``||sum_t g_t a_t^T||_F^2`` by the definition, one sequence after another, in float64.

    Args:
        activations: ``[N, d_in]``.
        grad_outputs: ``[N, d_out]``.
        cu_seqlens: ``[S + 1]``.
        bias: add the norm of the bias gradient.

    Returns:
        ``[S]``, float64.

    Example:
        >>> linear_grad_norms_reference(torch.ones(2, 3), torch.ones(2, 1), torch.tensor([0, 2]), bias=True)
        tensor([16.], dtype=torch.float64)
    """
    norms = []
    for start, end in pairwise(cu_seqlens.tolist()):
        a, g = activations[start:end].double(), grad_outputs[start:end].double()
        norm = (a.T @ g).square().sum()
        norms.append(norm + g.sum(0).square().sum() if bias else norm)
    return torch.stack(norms) if norms else activations.new_zeros(0, dtype=torch.float64)
