"""What no implementation of an op can avoid: bytes moved and operations done, for the roofline of a benchmark."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from snr_kernels import LogprobStats
from snr_kernels.linear_grad_norms import Method


class Cost(NamedTuple):
    """The least that a launch can do: what no implementation of the same op can avoid.

    Attributes:
        bytes: read from and written to device memory, each element once.
        flops: multiplications, additions, comparisons and exponentials, one each.
    """

    bytes: int
    flops: int


def logprob_stats_cost(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    outputs: Collection[str] = LogprobStats._fields,
    backward: bool = False,
) -> Cost:
    """What a call must move and compute; with ``backward`` its backward pass instead.

    Args:
        rows: tokens.
        vocab: size of the vocabulary.
        dtype: of the logits.
        outputs: that are asked for, or differentiated.
        backward: count the backward pass.

    Returns:
        Forward: each logit and label read once, a float32 written per output. Backward: each logit read and each
        gradient written once, label, outputs, log-sum-exp in two parts and the incoming gradients read.

    Example:
        >>> cost = logprob_stats_cost(8192, 151_936, torch.bfloat16)
        >>> f"{cost.bytes / 4.3e12 * 1e3:.2f} ms at 4.3 TB/s"
        '0.58 ms at 4.3 TB/s'
    """
    entropy, squares = "entropy" in outputs, "sum_p_squared" in outputs or "grad_norm_squared" in outputs
    if backward:  # fma, exp2, factor and product, scale; two fma more
        flops, nbytes = 5 + 2 * entropy + 2 * squares, 2 * vocab * dtype.itemsize + 8 + 4 * (2 * len(outputs) + 2)
    else:  # max, fma, exp2, sum; an fma each
        flops, nbytes = 5 + 2 * entropy + 2 * squares, vocab * dtype.itemsize + 8 + 4 * len(outputs)
    return Cost(rows * nbytes, rows * vocab * flops)


def linear_logprob_stats_cost(
    rows: int, width: int, vocab: int, dtype: torch.dtype, *, backward: bool = False, recomputed: float = 1.0
) -> Cost:
    """What a call must move and compute; with ``backward`` its backward pass instead.

    Args:
        rows: tokens.
        width: of the hidden states.
        vocab: rows of the weights.
        dtype: of both.
        backward: count the backward pass.
        recomputed: share of the logits that the backward pass has to multiply again.

    Returns:
        FLOP of the products; bytes of the hidden states, weights and, backward, gradients, once each.

    Example:
        >>> forward = linear_logprob_stats_cost(8192, 2560, 151_936, torch.bfloat16)
        >>> f"{forward.flops / 790e12 * 1e3:.2f} ms at 790 TFLOP/s"
        '8.07 ms at 790 TFLOP/s'
    """
    products = 2 + recomputed if backward else 1
    nbytes = (rows + vocab) * width * dtype.itemsize * (2 if backward else 1)
    return Cost(nbytes, round(2 * rows * width * vocab * products))


def linear_grad_norms_cost(
    lengths: Sequence[int], d_in: int, d_out: int, dtype: torch.dtype, method: Method = "auto"
) -> Cost:
    """What a call must move and compute.

    Args:
        lengths: tokens of each sequence.
        d_in: of the activations.
        d_out: of the output gradients, the sum where there are several.
        dtype: of both.
        method: which side of the formula; ``"auto"`` is the cheaper one for each sequence.

    Returns:
        Every activation and gradient read once and a float32 written per sequence; the FLOP of the side, with
        ``T (T + 1) / 2`` pairs of tokens for ``gram``.

    Example:
        >>> cost = linear_grad_norms_cost([1024] * 8, 2560, 9728, torch.bfloat16)
        >>> f"{cost.flops / 1e12:.2f} TFLOP, direct {8 * 2 * 1024 * 2560 * 9728 / 1e12:.2f}"
        '0.10 TFLOP, direct 0.41'
    """

    def flops(length: int) -> int:
        gram, direct = length * (length + 1) * (d_in + d_out), 2 * length * d_in * d_out
        return {"gram": gram, "direct": direct, "auto": min(gram, direct)}[method]

    nbytes = sum(lengths) * (d_in + d_out) * dtype.itemsize + 4 * len(lengths)
    return Cost(nbytes, sum(map(flops, lengths)))
