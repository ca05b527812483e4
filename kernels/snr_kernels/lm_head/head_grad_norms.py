"""One op: squared gradient norms of the log-probs of sequences at the head of a language model, without the logits.

With respect to the head's own weights and to the hidden states that come into it: what a fused head hides from hooks
(`PerSampleGradNorms`), and stand-ins for the norm over all parameters that need no backward pass through the model.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from snr_kernels.checks import expect_names
from snr_kernels.dispatch import Impl
from snr_kernels.linear_grad_norms import Method, linear_grad_norms
from snr_kernels.lm_head._passes import logit_gradients, statistics
from snr_kernels.lm_head._tiles import Head, prepare
from snr_kernels.lm_head.results import HeadGradNorms
from snr_kernels.logprob_stats.results import IGNORE_INDEX
from snr_kernels.precision import exactly
from snr_kernels.products import add_product
from snr_kernels.segments import Segments, segment_sums


def head_grad_norms(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | Segments,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    outputs: Collection[str] = HeadGradNorms._fields,
    method: Method = "auto",
    slab_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    process_group: dist.ProcessGroup | None = None,
    first_label: int | None = None,
    impl: Impl = "auto",
) -> HeadGradNorms:
    r"""Squared gradient norms of each sequence's log-prob at the head, exact, without logits or gradients in memory.

    .. math::
        \Big\|\sum_t g_t h_t^\top\Big\|_F^2, \qquad \sum_t \|g_t\|^2 \|h_t\|^2, \qquad \sum_t \|W^\top g_t\|^2,
        \qquad g_t = \frac{s}{T}\,(e_{y_t} - p_t)

    (with a softcap, ``g_t`` times its derivative). One pass over the slabs of logits finds ``p_t``, a second
    one ``g_t``: two products, one more for ``hidden``, and `linear_grad_norms` of each slab for ``head``. For a loss
    ``sum_s c_s log pi_s`` multiply by ``c_s^2``. For a tied head, ``head`` is the norm of the head's part alone.

    Args:
        hidden: ``[N, d]``, the tokens of all sequences one after another; ``hidden[t]`` must predict ``labels[t]``.
        weight: as for `linear_logprob_stats`, like all that is not named here.
        labels: ``[N]``.
        cu_seqlens: ``[S + 1]`` integers, ``0`` and the end of each sequence; sequences may be empty.
        temperature: positive divisor of the logits, a number, ``[]`` or ``[N]``.
        bias: ``[V]``.
        softcap: of the scaled logits.
        scale: of the logits.
        ignore_index: label of the tokens to leave out.
        outputs: names of the norms to compute; the others are ``None``.
        method: of `linear_grad_norms`.
        slab_bytes: the most that logits, and copies of them, may take at any time; ``head`` wants all tokens in a slab.
        logits_dtype: of the slab.
        process_group: of the ranks that have the other rows of the vocabulary; all get the norms of all of it.
        first_label: the label of the first row of ``weight``.
        impl: ``"torch"`` or ``"triton"`` to insist on one.

    Returns:
        float32 (float64 for float64 inputs), without gradient. A token without an answer makes its sequence NaN.

    Raises:
        TypeError: as `linear_logprob_stats`.
        ValueError: likewise; ``cu_seqlens`` that do not add up to ``N``, or ``slab_bytes`` too small for 64 columns of
            all tokens.

    Example:
        >>> hidden, weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 2)
        >>> norms = head_grad_norms(hidden, weight, torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3]))
        >>> norms.head  # the first sequence says 0 and then 1, in the same state: what one teaches, the other undoes
        tensor([0., 2.])
        >>> norms.head_per_token.round(decimals=4)
        tensor([1., 2.])
    """
    asked = expect_names("outputs", outputs, HeadGradNorms._fields)
    segments = Segments.of(cu_seqlens).on(hidden.device)
    if hidden.dim() != 2 or len(hidden) != segments.rows:
        raise ValueError(
            f"hidden: expected [N, d] with N = {segments.rows}, the end of cu_seqlens, got {list(hidden.shape)}"
        )
    divisor, options = prepare(
        hidden, weight, labels, temperature, bias, softcap=softcap, scale=scale, ignore_index=ignore_index,
        slab_bytes=slab_bytes, logits_dtype=logits_dtype, process_group=process_group, first_label=first_label,
        impl=impl,
    )  # fmt: skip
    with exactly(hidden.device):
        head = Head.of(hidden, weight, bias, labels, divisor, options)
        tiles = head.tiles(whole_rows="head" in asked)
        results, kept = statistics(head, tiles, entropy=False, squares=False)
        given = [torch.ones_like(results[0]), None, None, None]
        of_head = results[0].new_zeros(len(segments))
        of_tokens = torch.zeros_like(results[0])
        of_hidden = torch.zeros_like(head.hidden, dtype=head.exact) if "hidden" in asked else None
        for tile, g in logit_gradients(head, tiles, results, given, kept):
            if "head" in asked:
                of_head += linear_grad_norms(head.hidden, g, segments, method, bias=bias is not None, impl=impl)
            if "head_per_token" in asked:
                of_tokens[tile.rows] += squared_norms(g, head.exact)
            if of_hidden is not None:
                add_product(of_hidden[tile.rows], g, head.weight_of(tile))
        if options.group is not None:
            for partial in (of_head, of_tokens, *([] if of_hidden is None else [of_hidden])):
                dist.all_reduce(partial, group=options.group)
        norms = {"head": of_head}
        if "head_per_token" in asked:
            sizes = squared_norms(head.hidden, head.exact) + (bias is not None)
            norms["head_per_token"] = segment_sums(of_tokens * sizes, segments)
        if of_hidden is not None:
            norms["hidden"] = segment_sums(squared_norms(of_hidden, head.exact), segments)
    return HeadGradNorms(*(norms[name] if name in asked else None for name in HeadGradNorms._fields))


def squared_norms(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the rows, without a copy in another dtype."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=dtype)
    return norms.square()
