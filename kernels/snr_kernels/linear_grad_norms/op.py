"""The op's door: its function, and checks of its arguments.

The two paths that compute it are next door: ``_torch``, and ``_triton``, which is imported when the first GPU tensor
comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from snr_kernels.dispatch import Impl, runs_triton
from snr_kernels.linear_grad_norms import _torch
from snr_kernels.precision import exactly
from snr_kernels.segments import Segments

Method = Literal["auto", "gram", "direct"]


def linear_grad_norms(
    activations: Tensor,
    grad_outputs: Tensor | Sequence[Tensor],
    cu_seqlens: Tensor | Segments,
    method: Method = "auto",
    *,
    bias: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    r"""Squared norm of the weight gradient of a linear layer, for each sequence of a packed batch.

    .. math::
        \|A_s^\top G_s\|_F^2 = \sum_{t,u} (A_s A_s^\top)_{tu} (G_s G_s^\top)_{tu}

    The left side, ``direct``, takes ``2 T d_in d_out`` FLOP per sequence of ``T`` tokens; the right side, ``gram``
    (ghost norm, arXiv 2205.10683; arXiv 1510.01799), ``T (T + tile) (d_in + d_out)`` as both matrices are
    symmetric. ``auto`` takes the one with fewer, for each sequence. Neither has the whole gradient, or all of
    ``T x T``, in memory, and sums are in float32 at least and in a fixed order: the same input gives the same bits.

    Where activations share a large direction along which the gradients add up to nothing, the terms of ``gram``
    cancel: its error is some 1e-7 of the sum of their absolute values. On a CPU ``auto`` then takes ``direct``;
    elsewhere insist on it where that matters.

    Args:
        activations: ``[N, d_in]``, the tokens of all sequences one after another.
        grad_outputs: ``[N, d_out]``, the gradient with respect to the layer's output; or several, of layers that
            share the activations (query, key, value; gate, up): the Gram matrix of the activations is then
            computed once, and the norms of the layers are added up.
        cu_seqlens: ``[S + 1]`` integers, ``0`` and the end of each sequence; sequences may be empty.
        method: ``"gram"`` or ``"direct"`` to insist on one.
        bias: add the norm of the bias gradient, ``||sum_t G_t||^2``, of each layer: ``A A^T + 1`` instead of ``A A^T``.
        impl: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        ``[S]``, float32 (float64 for float64 inputs), without gradient; 0 for empty sequences. NaN and infinity stay
        within their sequence.

    Raises:
        TypeError: inputs not floating, ``cu_seqlens`` not integers.
        ValueError: shapes or devices that disagree, ``cu_seqlens`` that do not add up to ``N``, unknown ``method`` or
            ``impl``.

    Example:
        >>> import torch
        >>> a = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
        >>> g = torch.tensor([[1.0], [1.0], [1.0]])
        >>> linear_grad_norms(a, g, torch.tensor([0, 2, 3]))     # ||(1, 2)||^2, ||(3, 0)||^2
        tensor([5., 9.])
    """
    gradients = [grad_outputs] if isinstance(grad_outputs, Tensor) else list(grad_outputs)
    segments = Segments.of(cu_seqlens).on(activations.device)
    _check(activations, gradients, segments)
    if method not in ("auto", "gram", "direct"):
        raise ValueError(f"method: expected 'auto', 'gram' or 'direct', got {method!r}")
    path = _torch
    if all(runs_triton(impl, x) for x in (activations, *gradients)):
        from snr_kernels.linear_grad_norms import _triton as path  # type: ignore[no-redef]
    with exactly(activations.device):
        norms: Tensor = path.forward(activations, gradients, segments, method, bias)
        return norms.clamp_min_(0.0)


def _check(activations: Tensor, gradients: Sequence[Tensor], segments: Segments) -> None:
    if not gradients:
        raise ValueError("grad_outputs: expected one tensor or more, got none")
    for name, x in [("activations", activations), *(("grad_outputs", g) for g in gradients)]:
        if not x.is_floating_point():
            raise TypeError(f"{name}: expected a floating dtype, got {x.dtype}")
        if x.dim() != 2 or len(x) != segments.rows:
            raise ValueError(
                f"{name}: expected [N, d] with N = {segments.rows}, the end of cu_seqlens, got {list(x.shape)}"
            )
        if x.device != activations.device:
            raise ValueError(f"{name}: expected the device of activations, {activations.device}, got {x.device}")
