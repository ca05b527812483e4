"""The torch path of `logprob_stats`: some rows at a time, so that the float32 copies stay in the cache.

For every device and dtype that torch has. Made for CPUs; on others it is the fallback, and waits for nothing there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20  # logits at a time: two float32 buffers of 4 MB
FAR_BELOW = -1e4  # exp of it is 0; stands in for z = -inf where p * z must be 0 and not NaN
LOG_UNIT = 1.0  # of log_total, in nats


def forward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    results: Sequence[Tensor],
    entropy: bool,
    squares: bool,
) -> None:
    """Write the four statistics, the two parts of log-sum-exp (reference, log_total) and ``1 - p_y`` to ``results``.

    Args:
        logits: ``[outer, inner, V]``, last stride 1.
        labels: ``[rows]`` int64, contiguous.
        temperature: ``[]`` or ``[rows]``, in the dtype of the arithmetic, contiguous.
        ignore_index: label of rows that are left out.
        results: seven, ``[rows]``, contiguous, in the dtype of the arithmetic; empty where not asked for.
        entropy: whether to compute it.
        squares: whether to compute sum_p_squared and grad_norm_squared.
    """
    vocab = logits.shape[-1]
    buffers = torch.empty(2, chunk_rows(logits), vocab, dtype=temperature.dtype, device=logits.device)
    for where, some in row_chunks(logits):
        row = Rows.of(labels, temperature, where, vocab, ignore_index)
        if row.nothing_to_do():
            for result in results:
                result[where] = 0.0
            continue
        z = copied(buffers[0], some)
        lowest = torch.finfo(z.dtype).min  # finite, so that -inf minus it is -inf
        reference = z.amax(-1, keepdim=True).clamp_min_(lowest)
        z.sub_(reference).mul_(row.scale)
        own = torch.where(row.valid, z.gather(-1, row.label), math.nan)
        z.scatter_(-1, row.label, -math.inf)  # the label stays out of the sums: nothing to cancel
        e = torch.exp(z, out=buffers[1][: len(z)])
        others = e.sum(-1, keepdim=True)
        weighted = z.clamp_min_(FAR_BELOW).mul_(e).sum(-1, keepdim=True) if entropy else None
        sums = Sums(reference, own, others, e.square_().sum(-1, keepdim=True) if squares else None, weighted)
        for result, value in zip(results, sums.finish(), strict=True):
            if value is not None:
                result[where] = value.masked_fill_(row.ignored, 0.0).squeeze(-1)


def backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    results: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    r"""Gradient with respect to the logits, contiguous, from the results of `forward` and gradients of the first four.

    Written to ``out`` if there is one, which may be the logits. Results that hold for a vocabulary of which the logits
    are a slice give the gradient of the slice, where labels that are not in it are out of its range.

    .. math::
        T\, dx_j = g_{lp} (\delta_{jy} - p_j) - g_H p_j (\log p_j + H) + 2 g_2 p_j (p_j - s_2)
                   + 2 g_w p_j \big( (p_j - \delta_{jy}) - (s_2 - p_y) \big)

    With ``q = 1 - p_y`` as summed, ``s_2 - p_y = w - q``: for the label, and for the others of a row that it leads, no
    difference of two near numbers is left.
    """
    vocab, entropy = logits.shape[-1], gradients[1] is not None
    squares = gradients[2] is not None or gradients[3] is not None
    nothing = torch.zeros_like(results[0])
    result = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    buffers = torch.empty(2, chunk_rows(logits), vocab, dtype=temperature.dtype, device=logits.device)
    for where, some in row_chunks(logits):
        row = Rows.of(labels, temperature, where, vocab, ignore_index)
        target = result.view(-1, vocab)[where]
        if row.nothing_to_do():
            target.zero_()
            continue
        log_p_y, h, s2, w, reference, log_total, q = ((x if x.numel() else nothing)[where, None] for x in results)
        g_log_prob, g_entropy, g_s2, g_w = (row.scale * (nothing if g is None else g)[where, None] for g in gradients)
        log_p = copied(buffers[0], some).sub_(reference).mul_(row.scale).sub_(log_total)
        p = torch.exp(log_p, out=buffers[1][: len(log_p)])
        # dx = p (bias - g_H log p + slope p), but for the label
        p_y = torch.where(q < 0.5, 1 - q, log_p_y.exp())
        excess = torch.where(q < 0.5, w - q, s2 - p_y)  # s2 - p_y, from whichever are small numbers
        bias = -g_log_prob - g_entropy * h - 2 * (g_s2 * s2 + g_w * excess)
        d = log_p.clamp_min_(FAR_BELOW).mul_(-g_entropy) if entropy else log_p.zero_()
        if squares:
            d.addcmul_(p, 2 * (g_s2 + g_w))
        d.add_(bias).mul_(p)
        at_label = -2 * (g_s2 * excess + g_w * w) - g_entropy * (log_p_y.clamp_min(FAR_BELOW) + h)
        of_label = torch.where(row.valid, p_y * at_label + q * g_log_prob, d.gather(-1, row.label))
        target.copy_(d.scatter_(-1, row.label, of_label))
        if row.mixed():
            target.masked_fill_(row.ignored, 0.0)
    return result


def row_chunks(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of ``[outer, inner, V]`` at a time, ``[a, b, V]``, and their places among all ``outer * inner``."""
    outer, inner, _ = logits.shape
    size = chunk_rows(logits)
    whole = max(1, size // max(1, inner))  # outer slices at a time: one where not even one fits
    for o in range(0, outer, whole):
        some = logits[o : o + whole]
        step = size if whole == 1 else inner
        for start in range(0, inner, max(1, step)):
            part = some[:, start : start + step]
            first = o * inner + start
            yield slice(first, first + part.shape[0] * part.shape[1]), part


def chunk_rows(logits: Tensor) -> int:
    return min(max(1, CHUNK // logits.shape[-1]), logits.shape[0] * logits.shape[1])


def copied(buffer: Tensor, some: Tensor) -> Tensor:
    """The logits of a chunk in the dtype of the arithmetic, ``[rows, V]``."""
    rows = buffer[: some.shape[0] * some.shape[1]]
    rows.view(some.shape).copy_(some)
    return rows


class Rows(NamedTuple):
    """What is asked of some rows, ``[R, 1]`` each."""

    label: Tensor  # 0 where it is not valid
    valid: Tensor
    ignored: Tensor
    scale: Tensor  # 1 / temperature, NaN where that is no positive finite number

    @staticmethod
    def of(labels: Tensor, temperature: Tensor, where: slice, vocab: int, ignore_index: int) -> Rows:
        label = labels[where, None]
        t = temperature[where, None] if temperature.dim() else temperature
        scale = torch.where((t > 0) & (t < math.inf), t.reciprocal(), math.nan)
        valid = (label >= 0) & (label < vocab)
        return Rows(torch.where(valid, label, 0), valid, label == ignore_index, scale)

    # Only a CPU is asked what its tensors hold: elsewhere that would wait for the device.
    def nothing_to_do(self) -> bool:
        return self.ignored.device.type == "cpu" and bool(self.ignored.all())

    def mixed(self) -> bool:
        return self.ignored.device.type != "cpu" or bool(self.ignored.any())


class Sums(NamedTuple):
    """The label, and sums over all other tokens; ``z`` is relative to the largest of them all."""

    reference: Tensor  # the largest logit: z = (logit - reference) / temperature
    label: Tensor  # z_y
    others: Tensor  # sum exp z
    squares: Tensor | None  # sum exp 2z
    weighted: Tensor | None  # sum z exp z

    def finish(self) -> tuple[Tensor | None, ...]:
        own = self.label.exp()
        total = self.others + own
        total.masked_fill_(total == 0, math.nan)  # no token can be
        log_total = torch.where(self.label == 0, self.others.log1p(), total.log())
        complement = self.others / total
        entropy = sum_p_squared = grad_norm_squared = None
        if self.weighted is not None:
            entropy = log_total - (self.weighted + own * self.label.clamp_min(FAR_BELOW)) / total
            entropy.clamp_min_(0.0)  # by rounding, where one token has all
        if self.squares is not None:
            squares = self.squares / total.square()
            sum_p_squared = squares + (own / total).square()
            grad_norm_squared = squares + complement.square()
        log_prob = self.label - log_total
        return log_prob, entropy, sum_p_squared, grad_norm_squared, self.reference, log_total, complement
