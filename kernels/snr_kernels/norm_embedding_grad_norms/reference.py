"""Both ops by their definitions, one sequence after another, in float64: what the tests hold both paths to."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def normalization_grad_norms_reference(
    inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, eps: float, *, center: bool = False, bias: bool = False
) -> Tensor:
    """``||sum_t g_t x_t / rms(x_t)||^2`` by the definition, one sequence after another, in float64.

    Args:
        inputs: ``[N, d]``, what was normalised.
        grad_outputs: ``[N, d]``.
        cu_seqlens: ``[S + 1]``.
        eps: added to the mean square.
        center: whether the layer subtracts the mean, as LayerNorm does.
        bias: add the norm of the bias gradient.

    Returns:
        ``[S]``, float64.

    Example:
        >>> normalization_grad_norms_reference(torch.ones(2, 2), torch.ones(2, 2), torch.tensor([0, 2]), 0.0, bias=True)
        tensor([16.], dtype=torch.float64)
    """
    norms = []
    for start, end in pairwise(cu_seqlens.tolist()):
        x, g = inputs[start:end].double(), grad_outputs[start:end].double()
        if center:
            x = x - x.mean(-1, keepdim=True)
        normalised = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        norm = (g * normalised).sum(0).square().sum()
        norms.append(norm + g.sum(0).square().sum() if bias else norm)
    return torch.stack(norms) if norms else inputs.new_zeros(0, dtype=torch.float64)


def embedding_grad_norms_reference(
    ids: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, *, padding_idx: int | None = None
) -> Tensor:
    """``sum_v ||sum_{t: id_t = v} g_t||^2`` by the definition, one sequence after another, in float64.

    Args:
        ids: ``[N]`` integers.
        grad_outputs: ``[N, d]``.
        cu_seqlens: ``[S + 1]``.
        padding_idx: the row that gets no gradient.

    Returns:
        ``[S]``, float64.

    Example:
        >>> embedding_grad_norms_reference(torch.tensor([1, 1]), torch.ones(2, 3), torch.tensor([0, 2]))
        tensor([12.], dtype=torch.float64)
    """
    norms = []
    for start, end in pairwise(cu_seqlens.tolist()):
        x, g = ids[start:end], grad_outputs[start:end].double()
        rows = [g[x == token].sum(0) for token in set(x.tolist()) - {padding_idx}]
        norms.append(torch.stack(rows).square().sum() if rows else g.new_zeros(()))
    return torch.stack(norms) if norms else grad_outputs.new_zeros(0, dtype=torch.float64)
