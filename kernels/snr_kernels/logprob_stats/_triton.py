"""The Triton kernels of `logprob_stats`, and every configuration they are launched in.

Forward, two launches: `partial_sums` reads each logit once and leaves four numbers per row and slice of the
vocabulary, `merge` joins the slices with the label. Backward, one launch: `grad_logits` reads and writes each logit
once. Everything is base 2 inside: ``z = (logit - reference) * log2(e) / temperature``.

The label stays out of the sums until `merge`, so ``1 - p_y`` is a sum of positive terms and never a difference. Logits
are taken relative to the largest seen before they are scaled, so neither their size nor the temperature costs digits.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snr_kernels._triton import DTYPES, THREADS, Configuration, launch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the reference of an empty sum: finite, so that -inf minus it is -inf
FAR_BELOW = tl.constexpr(-1e4)  # exp2 of it is 0; stands in for z = -inf where p * z must be 0 and not NaN

LOG_UNIT = math.log(2)  # of log2_total, in nats
MERGE_ROWS = 4
MAX_SPLITS = 64
GRAD_BLOCK = 4096
SIZES = [  # not compiled in: one compilation serves all
    "rows", "vocab", "inner", "stride_outer", "stride_inner", "stride_temperature", "ignore_index", "splits",
    "slice_size", "stride_grad_log_prob", "stride_grad_entropy", "stride_grad_sum_p_squared", "stride_grad_norm",
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- forward
@triton.jit
def base_2_scale(temperature):
    """``log2(e) / temperature``; NaN where that is no positive finite number."""
    return tl.where((temperature > 0) & (temperature < float("inf")), LOG2_E / temperature, float("nan"))


@triton.jit
def log1p(u):
    """``log(1 + u)`` for ``u >= 0``, to a relative 1e-7 near 0 as well: ``2 artanh(u / (2 + u))`` by its series."""
    s = u / (2 + u)
    s2 = s * s
    series = 2 * s * (1 + s2 * (1.0 / 3 + s2 * (1.0 / 5 + s2 * (1.0 / 7))))
    return tl.where(u < 0.25, series, tl.log(1 + u))


@triton.jit
def move(reference, highest, total, squares, weighted, scale, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """The sums relative to ``highest`` instead of ``reference``."""
    shift = tl.maximum((reference - highest) * scale, FAR_BELOW)
    rescale = tl.exp2(shift)
    if ENTROPY:
        weighted = rescale * (weighted + total * shift)
    if SQUARES:
        squares = rescale * rescale * squares
    return rescale * total, squares, weighted


@triton.jit
def add_logits(x, scale, reference, total, squares, weighted, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """Add ``x [LANES, WIDTH]`` to the running sums of each lane: no thread waits for another."""
    new = tl.maximum(reference, tl.max(x, axis=1))
    total, squares, weighted = move(reference, new, total, squares, weighted, scale, ENTROPY, SQUARES)
    z = (x - new[:, None]) * scale
    e = tl.exp2(z)
    if ENTROPY:
        weighted += tl.sum(e * tl.maximum(z, FAR_BELOW), axis=1)
    if SQUARES:
        squares += tl.sum(e * e, axis=1)
    return new, total + tl.sum(e, axis=1), squares, weighted


@triton.jit
def join(reference, total, squares, weighted, scale, axis: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """The sums of several parts, relative to the highest of their references."""
    highest = tl.max(reference, axis=axis, keep_dims=True)
    total, squares, weighted = move(reference, highest, total, squares, weighted, scale, ENTROPY, SQUARES)
    return (
        tl.max(reference, axis=axis),
        tl.sum(total, axis=axis),
        tl.sum(squares, axis=axis),
        tl.sum(weighted, axis=axis),
    )


@triton.jit(do_not_specialize=SIZES)
def partial_sums(
    logits,
    labels,
    temperature,
    sums,  # float32 [rows, splits, 4]
    vocab: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_temperature: tl.int32,
    ignore_index: tl.int64,
    splits: tl.int32,
    slice_size: tl.int32,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Over one slice of one row, but for the label: its largest logit and the sums of ``e = 2^z``, ``e^2``, ``e z``."""
    row = (tl.program_id(0) // splits).to(tl.int64)
    part = tl.program_id(0) % splits
    label = tl.load(labels + row)
    if label == ignore_index:
        return
    label = label.to(tl.int32)
    scale = base_2_scale(tl.load(temperature + row * stride_temperature))
    logits += (row // inner) * stride_outer + (row % inner) * stride_inner
    if ALIGNED:  # each lane reads 16 bytes in a row
        offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    else:  # neighbouring lanes read neighbouring logits
        offsets = tl.arange(0, LANES)[:, None] + tl.arange(0, WIDTH)[None, :] * LANES
    BLOCK: tl.constexpr = LANES * WIDTH
    begin = part * slice_size
    end = tl.minimum(begin + slice_size, vocab)
    if ALIGNED:
        logits, begin, end = tl.multiple_of(logits, 16), tl.multiple_of(begin, 16), tl.multiple_of(end, 16)

    reference = tl.full([LANES], LOWEST, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    ahead = tl.load(logits + begin + offsets, mask=begin + offsets < end, other=float("-inf"))
    for start in range(begin, end, BLOCK):
        x = ahead.to(tl.float32)
        following = start + BLOCK + offsets  # on its way while this block is added up
        ahead = tl.load(logits + following, mask=following < end, other=float("-inf"))
        if (label >= start) & (label < start + BLOCK):  # the same for all threads: costs nothing elsewhere
            x = tl.where(start + offsets == label, float("-inf"), x)
        reference, total, squares, weighted = add_logits(
            x, scale, reference, total, squares, weighted, ENTROPY, SQUARES
        )

    reference, total, squares, weighted = join(reference, total, squares, weighted, scale, 0, ENTROPY, SQUARES)
    sums += (row * splits + part) * 4
    tl.store(sums, reference)
    tl.store(sums + 1, total)
    tl.store(sums + 2, squares)
    tl.store(sums + 3, weighted)


@triton.jit(do_not_specialize=SIZES)
def merge(
    logits,
    labels,
    temperature,
    sums,
    log_prob,
    entropy,
    sum_p_squared,
    grad_norm_squared,
    reference_of_row,
    log2_total,
    complement,
    rows: tl.int32,
    vocab: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_temperature: tl.int32,
    ignore_index: tl.int64,
    splits: tl.int32,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The slices of each row and its label, joined into the statistics."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    here = row < rows
    label = tl.load(labels + row, mask=here, other=ignore_index)
    ignored = label == ignore_index
    valid = (label >= 0) & (label < vocab) & ~ignored
    scale = base_2_scale(tl.load(temperature + row * stride_temperature, mask=here, other=1.0))
    offset = (row // inner) * stride_outer + (row % inner) * stride_inner + label
    x = tl.load(logits + offset, mask=valid, other=float("nan")).to(tl.float32)

    part = tl.arange(0, SPLITS)
    each = (row[:, None] * splits + part[None, :]) * 4
    known = (here & ~ignored)[:, None] & (part < splits)[None, :]
    reference, total, squares, weighted = join(
        tl.load(sums + each, mask=known, other=LOWEST),
        tl.load(sums + each + 1, mask=known, other=0.0),
        tl.load(sums + each + 2, mask=known, other=0.0),
        tl.load(sums + each + 3, mask=known, other=0.0),
        scale[:, None],
        1,
        ENTROPY,
        SQUARES,
    )
    leads = x >= reference
    highest = tl.where(leads, x, reference)
    others, squares, weighted = move(reference, highest, total, squares, weighted, scale, ENTROPY, SQUARES)
    z = (x - highest) * (scale * LN_2)  # of the label, in nats: base 2 would overflow before float32 does
    own = tl.exp2(z * LOG2_E)
    total = others + own
    total = tl.where(total == 0, float("nan"), total)  # no token can be
    log_total = tl.where(z == 0, log1p(others), tl.log(total))  # z is NaN where the label is +inf

    q = others / total  # 1 - p_y
    tl.store(log_prob + row, tl.where(ignored, 0.0, z - log_total), mask=here)
    tl.store(reference_of_row + row, tl.where(ignored, 0.0, highest), mask=here)
    tl.store(log2_total + row, tl.where(ignored, 0.0, log_total * LOG2_E), mask=here)
    tl.store(complement + row, tl.where(ignored, 0.0, q), mask=here)
    if ENTROPY:
        mean = (weighted * LN_2 + own * tl.maximum(z, FAR_BELOW)) / total
        h = log_total - mean
        h = tl.where(h < 0, 0.0, h)  # by rounding, where one token has all
        tl.store(entropy + row, tl.where(ignored, 0.0, h), mask=here)
    if SQUARES:
        tl.store(sum_p_squared + row, tl.where(ignored, 0.0, (squares + own * own) / (total * total)), mask=here)
        norm = q * q + squares / (total * total)
        tl.store(grad_norm_squared + row, tl.where(ignored, 0.0, norm), mask=here)


# --------------------------------------------------------------------------------------------------------- backward
@triton.jit(do_not_specialize=SIZES)
def grad_logits(
    logits,
    labels,
    temperature,
    log_prob,
    entropy,
    sum_p_squared,
    grad_norm_squared,
    reference_of_row,
    log2_total,
    complement,
    grad_log_prob,
    grad_entropy,
    grad_sum_p_squared,
    grad_norm,
    gradient,  # [rows, vocab], contiguous, the dtype of logits
    vocab: tl.int32,
    inner: tl.int32,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    stride_temperature: tl.int32,
    stride_grad_log_prob: tl.int32,
    stride_grad_entropy: tl.int32,
    stride_grad_sum_p_squared: tl.int32,
    stride_grad_norm: tl.int32,
    ignore_index: tl.int64,
    ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``p (bias + b p + c log p) / temperature``, and at the label what is left of it without cancellation."""
    blocks = tl.cdiv(vocab, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * BLOCK
    end = vocab
    logits += (row // inner) * stride_outer + (row % inner) * stride_inner
    gradient += row * vocab
    if ALIGNED:
        logits, gradient = tl.multiple_of(logits, 16), tl.multiple_of(gradient, 16)
        end = tl.multiple_of(end, 16)
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < end
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(gradient + offsets, tl.zeros([BLOCK], gradient.dtype.element_ty), mask=inside)
        return

    scale = base_2_scale(tl.load(temperature + row * stride_temperature))
    g = tl.load(grad_log_prob + row * stride_grad_log_prob)
    q = tl.load(complement + row)
    log_p_y = tl.load(log_prob + row)
    p_y = tl.where(q < 0.5, 1 - q, tl.exp(log_p_y))
    bias = -g
    at_label = 0.0
    if ENTROPY:
        g_entropy = tl.load(grad_entropy + row * stride_grad_entropy)
        mean = tl.load(entropy + row)
        bias -= g_entropy * mean
        at_label -= g_entropy * (tl.maximum(log_p_y, FAR_BELOW) + mean)
    if SQUARES:
        g_squares = 2 * tl.load(grad_sum_p_squared + row * stride_grad_sum_p_squared)
        g_norm = 2 * tl.load(grad_norm + row * stride_grad_norm)
        w = tl.load(grad_norm_squared + row)
        s2 = tl.load(sum_p_squared + row)
        excess = tl.where(q < 0.5, w - q, s2 - p_y)  # s2 - p_y, from whichever are small numbers
        bias -= g_squares * s2 + g_norm * excess
        at_label -= g_squares * excess + g_norm * w
    at_label = p_y * at_label + g * q

    x = tl.load(logits + offsets, mask=inside, other=0.0).to(tl.float32)
    z = (x - tl.load(reference_of_row + row)) * scale - tl.load(log2_total + row)  # log2 p
    p = tl.exp2(z)
    factor = tl.full([BLOCK], 0.0, tl.float32) + bias
    if ENTROPY:
        factor -= (g_entropy * LN_2) * tl.maximum(z, FAR_BELOW)
    if SQUARES:
        factor += (g_squares + g_norm) * p
    d = p * factor
    if (label >= start) & (label < start + BLOCK):
        d = tl.where(offsets == label, at_label, d)
    tl.store(gradient + offsets, (d * (scale * LN_2)).to(gradient.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------- launches
def for_partial_sums(dtype: torch.dtype, aligned: bool, entropy: bool, squares: bool) -> Configuration:
    constants = {"LANES": THREADS, "WIDTH": 16 // dtype.itemsize}
    return Configuration(partial_sums, dtype, {"ENTROPY": entropy, "SQUARES": squares, "ALIGNED": aligned, **constants})


def for_merge(dtype: torch.dtype, entropy: bool, squares: bool) -> Configuration:
    constants = {"ENTROPY": entropy, "SQUARES": squares, "ROWS": MERGE_ROWS, "SPLITS": MAX_SPLITS}
    return Configuration(merge, dtype, constants)


def for_grad_logits(dtype: torch.dtype, aligned: bool, entropy: bool, squares: bool) -> Configuration:
    constants = {"ENTROPY": entropy, "SQUARES": squares, "ALIGNED": aligned, "BLOCK": GRAD_BLOCK}
    return Configuration(grad_logits, dtype, constants)


def configurations() -> Iterator[Configuration]:
    """All that can ever be launched."""
    for dtype, entropy, squares in itertools.product(DTYPES, (False, True), (False, True)):
        yield for_merge(dtype, entropy, squares)
        for aligned in (False, True):
            yield for_partial_sums(dtype, aligned, entropy, squares)
            yield for_grad_logits(dtype, aligned, entropy, squares)


def is_aligned(logits: Tensor) -> bool:
    """Whether every row starts on 16 bytes and holds whole multiples of them, so that a thread can read 16 at once."""
    return logits.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in (logits.shape[2], *logits.stride()[:2]))


def choose_splits(rows: int, vocab: int, block: int, device: torch.device) -> int:
    """Slices per row: one where the rows fill the device four times over, else as many as do, of two blocks or more."""
    if device.type != "cuda":
        return 1
    resident = torch.cuda.get_device_properties(device).multi_processor_count * (2048 // THREADS)
    splits: int = max(1, min(triton.cdiv(4 * resident, rows), vocab // (2 * block), MAX_SPLITS))
    return splits


def forward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    results: Sequence[Tensor],
    entropy: bool,
    squares: bool,
    splits: int | None = None,
) -> None:
    """As `_torch.forward`, with each row in ``splits`` slices; by default as many as suit the device."""
    outer, inner, vocab = logits.shape
    rows = outer * inner
    if rows == 0:
        return
    partial = for_partial_sums(logits.dtype, is_aligned(logits), entropy, squares)
    block = partial.constants["LANES"] * partial.constants["WIDTH"]
    splits = splits or choose_splits(rows, vocab, block, logits.device)
    slice_size = triton.cdiv(triton.cdiv(vocab, splits), block) * block
    splits = triton.cdiv(vocab, slice_size)
    sums = torch.empty(rows, splits, 4, device=logits.device, dtype=torch.float32)
    layout = (vocab, inner, logits.stride(0), logits.stride(1), temperature.dim(), ignore_index, splits)
    launch(partial, rows * splits, logits, labels, temperature, sums, *layout, slice_size)
    merged = for_merge(logits.dtype, entropy, squares)
    launch(merged, triton.cdiv(rows, MERGE_ROWS), logits, labels, temperature, sums, *results, rows, *layout)


def backward(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor,
    ignore_index: int,
    results: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    out: Tensor | None = None,
) -> Tensor:
    """As `_torch.backward`; in place too, as each program reads its logits before it writes there."""
    outer, inner, vocab = logits.shape
    gradient = torch.empty(logits.shape, device=logits.device, dtype=logits.dtype) if out is None else out
    if gradient.numel() == 0:
        return gradient
    zero = torch.zeros(1, device=logits.device, dtype=torch.float32).expand(outer * inner)
    given = [zero if g is None else g for g in gradients]
    squares = gradients[2] is not None or gradients[3] is not None
    configuration = for_grad_logits(logits.dtype, is_aligned(logits), entropy=gradients[1] is not None, squares=squares)
    programs = outer * inner * triton.cdiv(vocab, GRAD_BLOCK)
    layout = (vocab, inner, logits.stride(0), logits.stride(1), temperature.dim())
    strides = [g.stride(0) for g in given]
    arguments = (logits, labels, temperature, *results, *given, gradient, *layout, *strides, ignore_index)
    launch(configuration, programs, *arguments)
    return gradient
