"""The door of both ops: their functions, and checks of their arguments.

The two paths that compute them are next door: ``_torch``, and ``_triton``, which is imported when the first GPU tensor
comes.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from snr_kernels.checks import expect_integers
from snr_kernels.dispatch import Impl, runs_triton
from snr_kernels.norm_embedding_grad_norms import _torch
from snr_kernels.precision import exactly
from snr_kernels.segments import Segments


def normalization_grad_norms(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor | Segments,
    eps: float,
    *,
    center: bool = False,
    bias: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    r"""Squared norm of the gradient of the scale of RMSNorm or LayerNorm, for each sequence.

    .. math::
        \Big\| \sum_{t \in s} G_t \odot \hat x_t \Big\|^2, \qquad
        \hat x = \frac{x - c\,\bar x}{\sqrt{\overline{(x - c\,\bar x)^2} + \epsilon}}

    with ``c = 0`` for RMSNorm, ``1`` for LayerNorm. For ``y = w x^`` and for Gemma's ``y = (1 + w) x^`` alike.

    Args:
        inputs: ``[N, d]``, what was normalised. Where a token has several rows, as under a norm of queries and keys,
            ``cu_seqlens`` counts rows.
        grad_outputs: ``[N, d]``, the gradient with respect to the output.
        cu_seqlens: ``[S + 1]`` integers, ``0`` and the last row of each sequence; sequences may be empty.
        eps: of the norm.
        center: LayerNorm.
        bias: add the norm of the bias gradient, ``||sum_t G_t||^2``.
        impl: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        ``[S]``, float32 (float64 for float64 inputs); 0 for empty sequences.

    Raises:
        TypeError: inputs not floating, ``cu_seqlens`` not integers.
        ValueError: shapes or devices that disagree, ``cu_seqlens`` that do not add up to ``N``, unknown ``impl``.

    Example:
        >>> import torch
        >>> x, g = torch.tensor([[3.0, -3.0], [2.0, 2.0]]), torch.tensor([[1.0, 1.0], [5.0, 0.0]])
        >>> norms = normalization_grad_norms(x, g, torch.tensor([0, 1, 2]), eps=0.0)     # ||(1, -1)||^2, ||(5, 0)||^2
        >>> norms.round(decimals=4)
        tensor([ 2., 25.])
    """
    segments = Segments.of(cu_seqlens).on(inputs.device)
    for name, x in [("inputs", inputs), ("grad_outputs", grad_outputs)]:
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
    if inputs.dim() != 2 or inputs.shape != grad_outputs.shape or len(inputs) != segments.rows:
        raise ValueError(
            f"inputs, grad_outputs: expected [N, d] with N = {segments.rows}, the end of cu_seqlens, "
            f"got {list(inputs.shape)} and {list(grad_outputs.shape)}"
        )
    if grad_outputs.device != inputs.device:
        raise ValueError(f"grad_outputs: expected the device of inputs, {inputs.device}, got {grad_outputs.device}")
    path = _path(impl, inputs, grad_outputs)
    with exactly(inputs.device):
        norms: Tensor = path.norm(inputs, grad_outputs, segments, eps, center, bias)
        return norms


def embedding_grad_norms(
    ids: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor | Segments,
    *,
    padding_idx: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    r"""Squared norm of the gradient of an embedding matrix, for each sequence.

    .. math::
        \sum_v \Big\| \sum_{t \in s,\; x_t = v} G_t \Big\|^2

    Tokens are sorted by sequence and id, equal ones summed, the sums squared: linear in the tokens, no matrix of the
    size of the vocabulary, nothing read back from a GPU.

    Args:
        ids: ``[N]`` integers, none negative.
        grad_outputs: ``[N, d]``, the gradient with respect to the embeddings.
        cu_seqlens: ``[S + 1]`` integers, ``0`` and the end of each sequence; sequences may be empty.
        padding_idx: the id whose row gets no gradient.
        impl: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        ``[S]``, float32 (float64 for float64 gradients); 0 for empty sequences.

    Raises:
        TypeError: ``grad_outputs`` not floating, ``ids`` or ``cu_seqlens`` not integers.
        ValueError: shapes or devices that disagree, ``cu_seqlens`` that do not add up to ``N``, unknown ``impl``.

    Example:
        >>> import torch
        >>> ids, g = torch.tensor([7, 7, 7, 4]), torch.ones(4, 1)
        >>> embedding_grad_norms(ids, g, torch.tensor([0, 2, 4]))     # 2^2, 1 + 1
        tensor([4., 2.])
    """
    segments = Segments.of(cu_seqlens).on(grad_outputs.device)
    expect_integers("ids", ids)
    if not grad_outputs.is_floating_point():
        raise TypeError(f"grad_outputs: expected a floating dtype, got {grad_outputs.dtype}")
    if ids.dim() != 1 or grad_outputs.dim() != 2 or not len(ids) == len(grad_outputs) == segments.rows:
        raise ValueError(
            f"ids, grad_outputs: expected [N] and [N, d] with N = {segments.rows}, the end of cu_seqlens, "
            f"got {list(ids.shape)} and {list(grad_outputs.shape)}"
        )
    if ids.device != grad_outputs.device:
        raise ValueError(f"ids: expected the device of grad_outputs, {grad_outputs.device}, got {ids.device}")
    path = _path(impl, grad_outputs)
    with exactly(ids.device):
        norms: Tensor = path.embedding(ids.long(), grad_outputs, segments, padding_idx)
        return norms


def _path(impl: Impl, *tensors: Tensor) -> ModuleType:
    if not all(runs_triton(impl, tensor) for tensor in tensors):
        return _torch
    from snr_kernels.norm_embedding_grad_norms import _triton

    return _triton
