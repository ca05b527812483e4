"""The Triton kernels of `linear_grad_norms`, and every configuration they are launched in.

`gram`: a program per pair of tiles of tokens, in the lower triangle of a sequence, multiplies both Gram matrices there
in registers. `direct`: a program per tile of the weight gradient of a sequence. Each leaves one float32, and those of a
sequence are added up afterwards in a fixed order: no atomics. Which programs a sequence gets is known on the host, and
worked out again on the device: no program starts for nothing, and nobody waits.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from snr_kernels._triton import DTYPES, Configuration, Programs, aligned, launch, programs_of
from snr_kernels.linear_grad_norms._torch import longest_by_gram
from snr_kernels.segments import Segments, segment_sums

TOGETHER = 3  # gradients in one launch of `gram`: query, key, value
SHORT = 256  # tokens of the longest sequence, up to which small tiles waste less beside the diagonal than they cost
SIZES = [  # not compiled in: one compilation serves all
    "stride_activations", "d_in", "stride_0", "stride_1", "stride_2", "d_out_0", "d_out_1", "d_out_2", "count",
    "stride", "d_out", "bias",
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- gram
@triton.jit
def add_inner_products(total, x, i, j, inside_i, inside_j, stride, width, BLOCK: tl.constexpr):
    """``total + X_i X_j^T`` of the rows ``i`` and ``j``."""
    stride, width = 16 * stride.to(tl.int64), 16 * width  # in units of 16 until here: the compiler knows what divides
    column = tl.arange(0, BLOCK)
    x_i = x + i[:, None] * stride + column[None, :]
    x_j = x + j[:, None] * stride + column[None, :]
    for start in range(0, width, BLOCK):
        inside = (start + column < width)[None, :]
        left = tl.load(x_i + start, mask=inside_i[:, None] & inside, other=0.0)
        right = tl.load(x_j + start, mask=inside_j[:, None] & inside, other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision="ieee")  # of float32, as torch does by default
    return total


@triton.jit(do_not_specialize=SIZES)
def gram(
    activations,
    gradient_0,
    gradient_1,
    gradient_2,
    cu_seqlens,
    cu_programs,
    sequences,
    partial,
    stride_activations: tl.int64,
    d_in: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    d_out_0: tl.int32,
    d_out_1: tl.int32,
    d_out_2: tl.int32,
    count: tl.int32,
    bias: tl.int32,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sum (A A^T + bias) * (G G^T)`` over one tile of the lower triangle, twice where it stands for two."""
    program = tl.program_id(0)
    sequence = tl.load(sequences + program)
    begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    pair = (program - tl.load(cu_programs + sequence)).to(tl.int32)
    row = ((tl.sqrt(8.0 * pair + 1) - 1) * 0.5).to(tl.int32)  # row (row + 1) / 2 <= pair, but for rounding
    row += tl.where((row + 1) * (row + 2) // 2 <= pair, 1, 0)
    row -= tl.where(row * (row + 1) // 2 > pair, 1, 0)
    column = pair - row * (row + 1) // 2
    i = begin + row * TILE + tl.arange(0, TILE)
    j = begin + column * TILE + tl.arange(0, TILE)
    inside_i, inside_j = i < end, j < end

    nothing = tl.zeros([TILE, TILE], tl.float32)
    of_a = add_inner_products(nothing, activations, i, j, inside_i, inside_j, stride_activations, d_in, BLOCK)
    of_g = nothing
    for k in range(count):
        g = tl.where(k == 0, gradient_0, tl.where(k == 1, gradient_1, gradient_2))
        stride = tl.where(k == 0, stride_0, tl.where(k == 1, stride_1, stride_2))
        d_out = tl.where(k == 0, d_out_0, tl.where(k == 1, d_out_1, d_out_2))
        g = tl.multiple_of(g, 16)
        of_g = add_inner_products(of_g, g, i, j, inside_i, inside_j, stride, d_out, BLOCK)
    total = tl.sum((of_a + bias) * of_g)
    tl.store(partial + program, tl.where(row == column, total, 2 * total))


# ----------------------------------------------------------------------------------------------------------- direct
@triton.jit(do_not_specialize=SIZES)
def direct(
    activations,
    gradient,
    cu_seqlens,
    cu_programs,
    sequences,
    partial,
    stride_activations: tl.int64,
    d_in: tl.int32,
    stride: tl.int64,
    d_out: tl.int32,
    bias: tl.int32,
    TILE_IN: tl.constexpr,
    TILE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``||A^T G||^2`` over one tile of the product; those that begin its columns add ``||sum_t G_t||^2``."""
    program = tl.program_id(0)
    sequence = tl.load(sequences + program)
    begin, end = tl.load(cu_seqlens + sequence), tl.load(cu_seqlens + sequence + 1)
    tile = (program - tl.load(cu_programs + sequence)).to(tl.int32)
    stride_activations, stride = 16 * stride_activations.to(tl.int64), 16 * stride.to(tl.int64)
    d_in, d_out = 16 * d_in, 16 * d_out
    across = tl.cdiv(d_out, TILE_OUT)
    i = tile // across * TILE_IN + tl.arange(0, TILE_IN)
    j = tile % across * TILE_OUT + tl.arange(0, TILE_OUT)
    inside_i, inside_j = (i < d_in)[None, :], (j < d_out)[None, :]
    row = tl.arange(0, BLOCK)
    length = (end - begin).to(tl.int32)
    a = activations + (begin + row)[:, None] * stride_activations + i[None, :]
    g = gradient + (begin + row)[:, None] * stride + j[None, :]

    product = tl.zeros([TILE_IN, TILE_OUT], tl.float32)
    for start in range(0, length, BLOCK):
        inside = (start + row < length)[:, None]
        left = tl.load(a, mask=inside & inside_i, other=0.0)
        right = tl.load(g, mask=inside & inside_j, other=0.0)
        product = tl.dot(tl.trans(left), right, product, input_precision="ieee")
        a += BLOCK * stride_activations
        g += BLOCK * stride
    total = tl.sum(product * product)
    if (tile < across) & (bias != 0):
        sums = tl.zeros([TILE_OUT], tl.float32)
        g = gradient + (begin + row)[:, None] * stride + j[None, :]
        for start in range(0, length, BLOCK):
            inside = (start + row < length)[:, None]
            sums += tl.sum(tl.load(g, mask=inside & inside_j, other=0.0).to(tl.float32), axis=0)
            g += BLOCK * stride
        total += tl.sum(sums * sums)
    tl.store(partial + program, total)


# --------------------------------------------------------------------------------------------------------- launches
def for_gram(dtype: torch.dtype, small: bool) -> Configuration:
    """Two accumulators of 128 x 128 take half the registers of 256 threads; float32 operands do not fit beside them."""
    wide = dtype != torch.float32
    tile = 128 if wide and not small else 64
    return Configuration(gram, dtype, {"TILE": tile, "BLOCK": 64 if wide else 32}, threads=2 * tile)


def for_direct(dtype: torch.dtype) -> Configuration:
    wide = dtype != torch.float32
    constants = {"TILE_IN": 128, "TILE_OUT": 256 if wide else 128, "BLOCK": 32}
    return Configuration(direct, dtype, constants, stages=4 if wide else 3)


def configurations() -> Iterator[Configuration]:
    """All that can ever be launched."""
    for dtype in DTYPES:
        yield for_gram(dtype, small=True)
        yield for_direct(dtype)
        if dtype != torch.float32:
            yield for_gram(dtype, small=False)


@functools.lru_cache(maxsize=16)  # layers of the same shape, one after another, share the segments of their batch
def tile_pairs(segments: Segments, tile: int, longest: int) -> Programs:
    def count(length: Any) -> Any:
        tiles = (length + tile - 1) // tile
        return (length <= longest) * (tiles * (tiles + 1) // 2)

    return programs_of(segments, count)


@functools.lru_cache(maxsize=16)
def tiles_of_product(segments: Segments, tiles: int, longest: int) -> Programs:
    return programs_of(segments, lambda length: (length > longest) * tiles)


def forward(activations: Tensor, gradients: Sequence[Tensor], segments: Segments, method: str, bias: bool) -> Tensor:
    """As `linear_grad_norms`, of checked arguments."""
    norms = activations.new_zeros(len(segments), dtype=torch.float32)
    if not segments.rows:
        return norms
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in (activations, *gradients)))
    d_in, d_out = activations.shape[1], sum(g.shape[1] for g in gradients)
    a, gs = aligned(activations, dtype), [aligned(g, dtype) for g in gradients]

    by_gram = for_gram(dtype, small=segments.max_length <= SHORT)
    tile = by_gram.constants["TILE"]
    longest = longest_by_gram(d_in, d_out, tile, method)
    pairs = tile_pairs(segments, tile, longest)
    if pairs.segments.rows:
        for first in range(0, len(gs), TOGETHER):
            norms += run_gram(by_gram, a, gs[first : first + TOGETHER], segments, pairs, bias)

    by_product = for_direct(dtype)
    for g in gs if segments.max_length > longest else ():
        norms += run_direct(by_product, a, g, segments, longest, bias)
    return norms


def run_gram(
    configuration: Configuration, a: Tensor, gs: Sequence[Tensor], segments: Segments, pairs: Programs, bias: bool
) -> Tensor:
    partial = a.new_empty(pairs.segments.rows, dtype=torch.float32)
    three = [*gs, *[gs[0]] * (TOGETHER - len(gs))]
    sizes = [g.stride(0) // 16 for g in three] + [g.shape[1] // 16 for g in three]
    where = (segments.cu_seqlens, pairs.segments.cu_seqlens, pairs.sequences, partial)
    layout = (a.stride(0) // 16, a.shape[1] // 16, *sizes, len(gs), int(bias))
    launch(configuration, len(partial), a, *three, *where, *layout)
    return segment_sums(partial, pairs.segments)


def run_direct(
    configuration: Configuration, a: Tensor, g: Tensor, segments: Segments, longest: int, bias: bool
) -> Tensor:
    height, width = configuration.constants["TILE_IN"], configuration.constants["TILE_OUT"]
    tiles = tiles_of_product(segments, triton.cdiv(a.shape[1], height) * triton.cdiv(g.shape[1], width), longest)
    partial = a.new_empty(tiles.segments.rows, dtype=torch.float32)
    where = (segments.cu_seqlens, tiles.segments.cu_seqlens, tiles.sequences, partial)
    layout = (a.stride(0) // 16, a.shape[1] // 16, g.stride(0) // 16, g.shape[1] // 16, int(bias))
    launch(configuration, len(partial), a, g, *where, *layout)
    return segment_sums(partial, tiles.segments)
