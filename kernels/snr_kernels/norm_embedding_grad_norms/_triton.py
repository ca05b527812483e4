"""The Triton kernels of both ops, and every configuration they are launched in.

`scale_gradients`: a program per block of rows of a sequence leaves the part of these rows in the gradient of the scale,
and of the bias. `sum_pieces`: a program per piece, up to 64 neighbours of one id in the order of sequences and ids; its
sum is squared there if it is the whole id's. `join_pieces`: sums of the other ids, from their pieces. All memory bound:
inputs are read once.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from snr_kernels._triton import DTYPES, Configuration, Programs, aligned, launch, programs_of
from snr_kernels.norm_embedding_grad_norms import _torch
from snr_kernels.norm_embedding_grad_norms._torch import sort_by_sequence_and_id
from snr_kernels.segments import Segments, segment_sums

WIDTHS = (128, 256, 1024, 4096, 8192)  # columns of a tile of `scale_gradients`: of heads, and of models
NUMBERS = 4096  # in a tile, or one row: 16 a thread, of input, gradient and two sums each
STEPS = 32  # tiles of a program: what it writes is then a tenth of what it reads, or less
PIECE = tl.constexpr(64)
SIZES = [  # not compiled in: one compilation serves all
    "stride_inputs", "stride_gradients", "width", "columns", "eps", "center", "planes", "stride", "rows",
]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- norm
@triton.jit(do_not_specialize=SIZES)
def scale_gradients(
    inputs,
    gradients,
    cu_seqlens,
    cu_programs,
    sequences,
    partial,  # float32 [programs, planes, 16 columns]
    stride_inputs: tl.int64,
    stride_gradients: tl.int64,
    width: tl.int32,
    columns: tl.int32,
    eps: tl.float32,
    center: tl.float32,
    planes: tl.int32,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``sum_t G_t * x^_t`` over some rows of a sequence; with a second plane ``sum_t G_t``."""
    program = tl.program_id(0).to(tl.int64)
    sequence = tl.load(sequences + program)
    begin = tl.load(cu_seqlens + sequence) + (program - tl.load(cu_programs + sequence)) * (ROWS * STEPS)
    rows = tl.minimum(tl.load(cu_seqlens + sequence + 1) - begin, ROWS * STEPS).to(tl.int32)
    stride_inputs, stride_gradients = 16 * stride_inputs.to(tl.int64), 16 * stride_gradients.to(tl.int64)
    columns = 16 * columns
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    there = (column < columns)[None, :]
    inputs += begin * stride_inputs
    gradients += begin * stride_gradients
    of_scale = tl.zeros([ROWS, WIDTH], tl.float32)
    of_bias = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, rows, ROWS):
        here = first + row < rows
        inside = here[:, None] & there
        x = tl.load(inputs + row[:, None] * stride_inputs + column[None, :], mask=inside, other=0.0)
        g = tl.load(gradients + row[:, None] * stride_gradients + column[None, :], mask=inside, other=0.0)
        x, g = x.to(tl.float32), g.to(tl.float32)
        x = tl.where((column < width)[None, :], x - center * (tl.sum(x, axis=1) / width)[:, None], 0.0)
        variance = tl.where(here, tl.sum(x * x, axis=1) / width + eps, 1.0)  # eps may be 0
        of_scale += g * (x * tl.rsqrt(variance)[:, None])
        of_bias += g
        inputs += ROWS * stride_inputs
        gradients += ROWS * stride_gradients
    partial += program * planes * columns + column
    tl.store(partial, tl.sum(of_scale, axis=0), mask=column < columns)
    if planes == 2:
        tl.store(partial + columns, tl.sum(of_bias, axis=0), mask=column < columns)


# --------------------------------------------------------------------------------------------------------- embedding
@triton.jit(do_not_specialize=SIZES)
def sum_pieces(
    gradients,
    order,  # the row of each position, sorted by sequence and id
    first,  # the first position of the same sequence and id
    last,  # the position after its last
    squares,  # float32 [positions], zeros
    sums,  # float32 [pieces of ids with several, 16 columns]
    stride: tl.int64,
    columns: tl.int32,
    BLOCK: tl.constexpr,
):
    """Sum the piece that begins at this position, if one does."""
    position = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first + position), tl.load(last + position)
    if (position - begin) % PIECE != 0:
        return
    stride, columns = 16 * stride.to(tl.int64), 16 * columns
    whole = end - begin <= PIECE
    sums += slot_of(position, begin) * columns
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        piece = tl.zeros([BLOCK], tl.float32)
        for k in range(position, tl.minimum(position + PIECE, end)):
            row = tl.load(order + k)
            piece += tl.load(gradients + row * stride + column, mask=column < columns, other=0.0).to(tl.float32)
        if whole:
            total += tl.sum(piece * piece)
        else:
            tl.store(sums + column, piece, mask=column < columns)
    if whole:
        tl.store(squares + position, total)


@triton.jit
def slot_of(position, begin):
    """Where the sum of a piece is kept: in 64 positions at most one id with several begins, and one goes on."""
    return position // PIECE * 2 + tl.where(position == begin, 1, 0)


@triton.jit(do_not_specialize=SIZES)
def join_pieces(
    first,
    last,
    squares,
    sums,
    rows: tl.int64,
    columns: tl.int32,
    BLOCK: tl.constexpr,
):
    """The square of the id with several pieces that begins in these 64 positions, if one does."""
    columns = 16 * columns
    position = tl.program_id(0).to(tl.int64) * PIECE + tl.arange(0, PIECE)
    here = position < rows
    start_of, end_of = tl.load(first + position, mask=here, other=-1), tl.load(last + position, mask=here, other=-1)
    begins = (start_of == position) & (end_of - start_of > PIECE)
    begin = tl.max(tl.where(begins, position, -1), axis=0)
    if begin < 0:
        return
    end = tl.load(last + begin)
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        whole = tl.zeros([BLOCK], tl.float32)
        for k in range(begin, end, PIECE):
            whole += tl.load(sums + slot_of(k, begin) * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(whole * whole)
    tl.store(squares + begin, total)


# ---------------------------------------------------------------------------------------------------------- launches
def for_scale_gradients(dtype: torch.dtype, width: int) -> Configuration:
    constants = {"ROWS": max(1, NUMBERS // width), "WIDTH": width, "STEPS": STEPS}
    return Configuration(scale_gradients, dtype, constants, threads=max(NUMBERS, width) // 16)


def for_sum_pieces(dtype: torch.dtype) -> Configuration:
    return Configuration(sum_pieces, dtype, {"BLOCK": 1024}, threads=128)


def for_join_pieces() -> Configuration:
    return Configuration(join_pieces, torch.float32, {"BLOCK": 1024}, threads=128)


def configurations() -> Iterator[Configuration]:
    """All that can ever be launched."""
    yield for_join_pieces()
    for dtype in DTYPES:
        yield for_sum_pieces(dtype)
        for width in WIDTHS:
            yield for_scale_gradients(dtype, width)


@functools.lru_cache(maxsize=16)
def row_blocks(segments: Segments, rows: int) -> Programs:
    return programs_of(segments, lambda length: (length + rows - 1) // rows)


def norm(inputs: Tensor, grad_outputs: Tensor, segments: Segments, eps: float, center: bool, bias: bool) -> Tensor:
    """As `normalization_grad_norms`, of checked arguments."""
    rows, width = inputs.shape
    full = 16 * triton.cdiv(width, 16)
    if full > WIDTHS[-1]:  # a row no longer fits the registers
        return _torch.norm(inputs, grad_outputs, segments, eps, center, bias)
    if not rows:
        return inputs.new_zeros(len(segments), dtype=torch.float32)
    dtype = torch.promote_types(inputs.dtype, grad_outputs.dtype)
    x, g = aligned(inputs, dtype), aligned(grad_outputs, dtype)
    configuration = for_scale_gradients(dtype, next(size for size in WIDTHS if size >= full))
    blocks = row_blocks(segments, STEPS * configuration.constants["ROWS"])
    partial = x.new_empty(blocks.segments.rows, 1 + bias, x.shape[1], dtype=torch.float32)
    where = (segments.cu_seqlens, blocks.segments.cu_seqlens, blocks.sequences, partial)
    layout = (x.stride(0) // 16, g.stride(0) // 16, width, x.shape[1] // 16, eps, float(center), 1 + bias)
    launch(configuration, len(partial), x, g, *where, *layout)
    return segment_sums(partial, blocks.segments).square().sum((1, 2))


def embedding(ids: Tensor, grad_outputs: Tensor, segments: Segments, padding_idx: int | None) -> Tensor:
    """As `embedding_grad_norms`, of checked arguments."""
    rows, windows = len(ids), triton.cdiv(len(ids), PIECE.value)
    if not rows:
        return grad_outputs.new_zeros(len(segments), dtype=torch.float32)
    order, number = sort_by_sequence_and_id(ids, segments)
    first, last = (torch.searchsorted(number, number, right=right) for right in (False, True))
    if padding_idx is not None:
        last = torch.where(ids[order] == padding_idx, first, last)  # as if there were none
    g = aligned(grad_outputs, grad_outputs.dtype)
    squares = g.new_zeros(rows, dtype=torch.float32)
    sums = g.new_empty(2 * windows, g.shape[1], dtype=torch.float32)
    columns = g.shape[1] // 16
    launch(for_sum_pieces(grad_outputs.dtype), rows, g, order, first, last, squares, sums, g.stride(0) // 16, columns)
    launch(for_join_pieces(), windows, first, last, squares, sums, rows, columns)
    return segment_sums(squares, segments)
