"""Both ops against their float64 references: torch on any machine, Triton where it can run.

Without a GPU the Triton half runs in `test_interpreter`.
"""

from __future__ import annotations

import pytest
import sequences
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snr_kernels.dispatch import has_triton, interprets
from snr_kernels.norm_embedding_grad_norms import (
    embedding_grad_norms,
    embedding_grad_norms_reference,
    normalization_grad_norms,
    normalization_grad_norms_reference,
)
from snr_kernels.segments import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interprets()), reason="Triton wants a GPU or TRITON_INTERPRET=1"
)
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs_triton)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
norms = pytest.mark.parametrize(("center", "bias"), [(False, False), (False, True), (True, True)])

# Sums of n random float32 numbers are off by about sqrt(n) 2^-24 of their size, and rsqrt by 2^-23.
TOLERANCE = 1e-5
LENGTHS = [0, 1, 31, 32, 33, 0, 64, 65, 300, 0]


def packed(lengths):
    return sequences.packed(lengths, DEVICE)


def random_rows(rows, width, dtype=torch.float32):
    return torch.randn(rows, width, device=DEVICE).to(dtype)


def assert_close(got, true, tolerance=TOLERANCE):
    sequences.assert_close(got, true, tolerance)


# ------------------------------------------------------------------------------------------------------------- norms
@both
@norms
@dtypes
def test_the_norm_of_a_norm_equals_the_reference(impl, center, bias, dtype):
    x, g = 2 * random_rows(sum(LENGTHS), 64, dtype) + 1, random_rows(sum(LENGTHS), 64, dtype)
    got = normalization_grad_norms(x, g, packed(LENGTHS), 1e-6, center=center, bias=bias, impl=impl)
    assert got.dtype == torch.float32
    assert_close(got, normalization_grad_norms_reference(x, g, packed(LENGTHS), 1e-6, center=center, bias=bias))
    assert (got[[0, 5, 9]] == 0).all()


@both
@pytest.mark.parametrize(("width", "lengths"), [(1, [3]), (7, [2, 5]), (128, [1100, 3]), (257, [5]), (1000, [130, 1]),
                                                (2050, [33, 2]), (8192, [5]), (8208, [3])])  # fmt: skip
def test_any_width_of_norms(impl, width, lengths):
    x, g = random_rows(sum(lengths), width), random_rows(sum(lengths), width)
    got = normalization_grad_norms(x, g, packed(lengths), 0.1, bias=True, impl=impl)
    assert_close(got, normalization_grad_norms_reference(x, g, packed(lengths), 0.1, bias=True))


@both
def test_norms_without_eps_and_of_mixed_dtypes(impl):
    x, g = random_rows(40, 20), random_rows(40, 20, torch.bfloat16)
    assert_close(
        normalization_grad_norms(x, g, packed([37, 3]), 0.0, impl=impl),
        normalization_grad_norms_reference(x, g, packed([37, 3]), 0.0),
    )


@both
def test_a_nan_under_a_norm_stays_within_its_sequence(impl):
    x, g = random_rows(40, 20), random_rows(40, 20)
    healthy = normalization_grad_norms(x, g, packed([7, 26, 7]), 1e-6, bias=True, impl=impl)
    x[8, 2] = float("nan")
    got = normalization_grad_norms(x, g, packed([7, 26, 7]), 1e-6, bias=True, impl=impl)
    assert got.isnan().tolist() == [False, True, False]
    assert torch.equal(got[::2], healthy[::2])


VIEWS = {
    "some columns": lambda x: x[:, 3:20],
    "heads of a fused projection": lambda x: x[:, 16:32],
    "every other row": lambda x: x[::2],
    "columns first": lambda x: x.T.contiguous().T,
    "repeated": lambda x: x[:1].expand(40, -1),
}


@both
@pytest.mark.parametrize("name", VIEWS)
def test_strides_do_not_matter(impl, name):
    x, g = (VIEWS[name](random_rows(80, 48)) for _ in range(2))
    cu_seqlens = packed([len(x) - 9, 9])
    assert_close(
        normalization_grad_norms(x, g, cu_seqlens, 1e-6, impl=impl),
        normalization_grad_norms_reference(x, g, cu_seqlens, 1e-6),
    )
    ids = torch.randint(5, (2 * len(x),), device=DEVICE)[::2]
    assert_close(
        embedding_grad_norms(ids, g, cu_seqlens, impl=impl), embedding_grad_norms_reference(ids, g, cu_seqlens)
    )


@both
def test_offsets_beyond_two_to_the_31(impl):
    """Two rows 2^31 numbers apart, in memory that is asked for but hardly touched."""
    far = 2**31 + 16
    memory = torch.empty(far + 16, dtype=torch.float16, device=DEVICE)
    x, near, cu_seqlens = memory.as_strided((2, 16), (far, 1)), random_rows(2, 16, torch.float16), packed([2])
    x.copy_(near)
    ids = torch.tensor([3, 3], device=DEVICE)
    true = normalization_grad_norms_reference(near, near, cu_seqlens, 1e-6)
    for a, b in ((x, near), (near, x)):
        assert_close(normalization_grad_norms(a, b, cu_seqlens, 1e-6, impl=impl), true)
    got = embedding_grad_norms(ids, x, cu_seqlens, impl=impl)
    assert_close(got, embedding_grad_norms_reference(ids, near, cu_seqlens))


# --------------------------------------------------------------------------------------------------------- embedding
@both
@dtypes
@pytest.mark.parametrize("vocabulary", [1, 3, 200])
def test_the_norm_of_an_embedding_equals_the_reference(impl, dtype, vocabulary):
    """Ids that come once, and ids that come 64 and 65 times, and 300."""
    ids, g = torch.randint(vocabulary, (sum(LENGTHS),), device=DEVICE), random_rows(sum(LENGTHS), 37, dtype)
    got = embedding_grad_norms(ids, g, packed(LENGTHS), impl=impl)
    assert got.dtype == torch.float32
    assert_close(got, embedding_grad_norms_reference(ids, g, packed(LENGTHS)))
    assert (got[[0, 5, 9]] == 0).all()


@both
@pytest.mark.parametrize("padding", [0, 4, 77])
def test_padding_contributes_nothing(impl, padding):
    ids, g = torch.randint(5, (400,), device=DEVICE), random_rows(400, 20)
    ids[100:270] = padding
    g[ids == padding] = float("nan")
    cu_seqlens = packed([90, 20, 150, 0, 140])
    got = embedding_grad_norms(ids, g, cu_seqlens, padding_idx=padding, impl=impl)
    assert_close(got, embedding_grad_norms_reference(ids, g, cu_seqlens, padding_idx=padding))
    assert got.isfinite().all()


@both
@pytest.mark.parametrize("counts", [[65, 65, 65], [63, 65, 1, 200], [129, 1, 128], [1, 64, 64, 64, 66], [128, 128]])
def test_ids_of_many_positions_in_any_order(impl, counts):
    """Pieces of 64 positions: where one id ends and another begins, both in the same 64."""
    ids = torch.arange(len(counts), device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    ids = ids[torch.randperm(len(ids), device=DEVICE)]
    g, cu_seqlens = random_rows(len(ids), 1100 if counts == [129, 1, 128] else 8), packed([len(ids) - 60, 60])
    assert_close(
        embedding_grad_norms(ids, g, cu_seqlens, impl=impl), embedding_grad_norms_reference(ids, g, cu_seqlens)
    )


@both
def test_a_nan_of_an_embedding_stays_within_its_sequence(impl):
    ids, g, cu_seqlens = torch.randint(3, (300,), device=DEVICE), random_rows(300, 20), packed([100, 101, 99])
    healthy = embedding_grad_norms(ids, g, cu_seqlens, impl=impl)
    g[150] = float("nan")
    got = embedding_grad_norms(ids, g, cu_seqlens, impl=impl)
    assert got.isnan().tolist() == [False, True, False]
    any_order = impl == "torch" and DEVICE == "cuda"  # of index_add_ there
    assert (torch.allclose if any_order else torch.equal)(got[::2], healthy[::2])


# -------------------------------------------------------------------------------------------------------------- both
@both
def test_runs_are_bit_equal(impl):
    x, g, ids = random_rows(300, 40), random_rows(300, 40), torch.randint(3, (300,), device=DEVICE)
    for call in (
        lambda: normalization_grad_norms(x, g, packed([200, 100]), 1e-6, bias=True, impl=impl),
        lambda: embedding_grad_norms(ids, g, packed([200, 100]), impl=impl),
    ):
        if impl == "torch" and DEVICE == "cuda":
            continue  # index_add_ adds in any order there
        assert torch.equal(call(), call())


@both
def test_the_default_dtype_does_not_matter(impl):
    x, ids, cu_seqlens = random_rows(40, 20), torch.randint(5, (40,), device=DEVICE), packed([37, 3])
    torch.set_default_dtype(torch.float64)
    try:
        got = (
            normalization_grad_norms(x, x, cu_seqlens, 1e-6, impl=impl),
            embedding_grad_norms(ids, x, cu_seqlens, impl=impl),
        )
    finally:
        torch.set_default_dtype(torch.float32)
    assert [each.dtype for each in got] == [torch.float32] * 2
    assert_close(got[0], normalization_grad_norms_reference(x, x, cu_seqlens, 1e-6))
    assert_close(got[1], embedding_grad_norms_reference(ids, x, cu_seqlens))


@both
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(impl, lengths):
    x, ids, zeros = random_rows(0, 5), torch.empty(0, dtype=torch.long, device=DEVICE), torch.zeros(len(lengths))
    assert torch.equal(normalization_grad_norms(x, x, packed(lengths), 1e-6, bias=True, impl=impl).cpu(), zeros)
    assert torch.equal(embedding_grad_norms(ids, x, packed(lengths), padding_idx=0, impl=impl).cpu(), zeros)


def test_float64_is_exact():
    x, g, ids = random_rows(300, 40).double(), random_rows(300, 40).double(), torch.randint(9, (300,), device=DEVICE)
    cu_seqlens = packed([100, 0, 200])
    got = normalization_grad_norms(x, g, cu_seqlens, 1e-6, center=True, bias=True)
    assert_close(got, normalization_grad_norms_reference(x, g, cu_seqlens, 1e-6, center=True, bias=True), 1e-12)
    got = embedding_grad_norms(ids, g, cu_seqlens, padding_idx=3)
    assert_close(got, embedding_grad_norms_reference(ids, g, cu_seqlens, padding_idx=3), 1e-12)
    assert got.dtype == torch.float64


@pytest.mark.parametrize("layer", [nn.RMSNorm(7, eps=1e-3), nn.LayerNorm(7), nn.LayerNorm(7, bias=False)])
def test_it_is_the_norm_of_what_autograd_finds(layer):
    layer, x = layer.double(), torch.randn(9, 7, dtype=torch.float64)
    y = layer(x)
    [g] = torch.autograd.grad(y.sin().sum(), y)
    center = isinstance(layer, nn.LayerNorm)
    bias = center and layer.bias is not None
    norms = normalization_grad_norms(x, g, torch.tensor([0, 5, 9]), layer.eps, center=center, bias=bias)
    for norm, rows in zip(norms, x.split([5, 4]), strict=True):
        found = torch.autograd.grad(layer(rows).sin().sum(), layer.parameters())
        assert norm.item() == pytest.approx(sum(each.square().sum().item() for each in found), rel=1e-12)


def test_it_is_the_norm_of_what_autograd_finds_in_an_embedding():
    layer, ids = nn.Embedding(6, 4, padding_idx=2).double(), torch.randint(6, (20,))
    y = layer(ids)
    [g] = torch.autograd.grad(y.cos().sum(), y)
    norms = embedding_grad_norms(ids, g, torch.tensor([0, 12, 20]), padding_idx=2)
    for norm, some in zip(norms, ids.split([12, 8]), strict=True):
        [found] = torch.autograd.grad(layer(some).cos().sum(), layer.parameters())
        assert norm.item() == pytest.approx(found.square().sum().item(), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    vocabulary=st.integers(1, 5),
    padding=st.none() | st.integers(0, 4),
    seed=st.integers(0, 2**31),
)
def test_invariances(lengths, vocabulary, padding, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, num = sum(lengths), len(lengths)
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    x, g = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for _ in range(2))

    def of(ids, x, g, lengths, eps=1e-6):
        segments = Segments.of(torch.tensor([0, *lengths]).cumsum(0))
        embedding = embedding_grad_norms(ids, g, segments, padding_idx=padding)
        return torch.stack([embedding, normalization_grad_norms(x, g, segments, eps, bias=True)])

    whole = of(ids, x, g, lengths)
    order = torch.randperm(num, generator=generator).tolist()
    parts = list(zip(ids.split(lengths), x.split(lengths), g.split(lengths), strict=True))
    moved = of(*map(torch.cat, zip(*(parts[s] for s in order), strict=True)), [lengths[s] for s in order])
    assert torch.allclose(moved, whole[:, order], rtol=1e-9)
    assert torch.allclose(of(ids, 5 * x, 2 * g, lengths, 25e-6), 4 * whole, rtol=1e-9)
    within = torch.cat([torch.randperm(n, generator=generator) + sum(lengths[:s]) for s, n in enumerate(lengths)])
    assert torch.allclose(of(ids[within], x[within], g[within], lengths), whole, rtol=1e-9)
    names = torch.randperm(5, generator=generator) + 10 if padding is None else torch.arange(5)
    assert torch.allclose(of(names[ids], x, g, lengths), whole, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"inputs": torch.ones(3, 2, dtype=torch.long)}, TypeError, "inputs"),
        ({"inputs": torch.ones(3, 4)}, ValueError, "inputs"),
        ({"grad_outputs": torch.ones(3, 2, dtype=torch.long)}, TypeError, "grad_outputs"),
        ({"grad_outputs": torch.ones(3, 2, device="meta")}, ValueError, "grad_outputs.*device"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "N = 4"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens"),
        ({"impl": "cuda"}, ValueError, "impl"),
        ({"impl": "triton", "inputs": torch.ones(3, 2, dtype=torch.float64)}, ValueError, "impl.*triton"),
    ],
)
def test_bad_input_of_norms_is_named(change, error, names):
    arguments = {
        "inputs": torch.ones(3, 2), "grad_outputs": torch.ones(3, 2), "cu_seqlens": torch.tensor([0, 3]), "eps": 0.0,
        **change,
    }  # fmt: skip
    with pytest.raises(error, match=names):
        normalization_grad_norms(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"ids": torch.ones(3)}, TypeError, "ids"),
        ({"ids": torch.ones(4, dtype=torch.long)}, ValueError, "ids"),
        ({"ids": torch.ones(3, dtype=torch.long, device="meta")}, ValueError, "ids.*device"),
        ({"grad_outputs": torch.ones(3, 2, dtype=torch.long)}, TypeError, "grad_outputs"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "N = 4"),
        ({"impl": "cuda"}, ValueError, "impl"),
        ({"impl": "triton", "grad_outputs": torch.ones(3, 2, dtype=torch.float64)}, ValueError, "impl.*triton"),
    ],
)
def test_bad_input_of_embeddings_is_named(change, error, names):
    arguments = {
        "ids": torch.zeros(3, dtype=torch.long), "grad_outputs": torch.ones(3, 2), "cu_seqlens": torch.tensor([0, 3]),
        **change,
    }  # fmt: skip
    with pytest.raises(error, match=names):
        embedding_grad_norms(**arguments)
