"""`linear_grad_norms` against its float64 reference: torch anywhere, the Triton kernels on a GPU or interpreted.

Without a GPU the Triton half runs in `test_interpreter`.
"""

from __future__ import annotations

import json
import sys

import pytest
import sequences
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks import linear_grad_norms as bench
from benchmarks.roofline import linear_grad_norms_cost
from snr_kernels.dispatch import has_triton, interprets
from snr_kernels.linear_grad_norms import _torch as linear_grad_norms_torch
from snr_kernels.linear_grad_norms import (
    linear_grad_norms,
    linear_grad_norms_reference,
)
from snr_kernels.segments import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interprets()), reason="Triton wants a GPU or TRITON_INTERPRET=1"
)
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs_triton)])
methods = pytest.mark.parametrize("method", ["gram", "direct"])

# Sums of n random float32 products are off by about sqrt(n) 2^-24 of their size: 1e-6 here, where nothing cancels.
# Products of bfloat16 and float16 numbers are exact in float32, so their bound is the same. Tensor cores cut off where
# they add, up to 2^-23 each time.
TOLERANCE = 1e-5
LENGTHS = [0, 1, 63, 64, 65, 0, 127, 128, 129, 300, 0]  # around both sizes of tiles


def packed(lengths):
    return sequences.packed(lengths, DEVICE)


def random_layer(lengths, d_in, *d_out, dtype=torch.float32):
    rows = sum(lengths)
    activations, *gradients = (torch.randn(rows, width, device=DEVICE).to(dtype) for width in (d_in, *d_out))
    return activations, gradients if len(gradients) > 1 else gradients[0], packed(lengths)


def reference(activations, gradients, cu_seqlens, bias=False):
    gradients = [gradients] if isinstance(gradients, torch.Tensor) else gradients
    return sum(linear_grad_norms_reference(activations, g, cu_seqlens, bias=bias) for g in gradients)


def assert_close(got, true, tolerance=TOLERANCE):
    sequences.assert_close(got, true, tolerance)


@both
@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_reference(impl, method, dtype, bias):
    a, g, cu_seqlens = random_layer(LENGTHS, 37, 19, dtype=dtype)
    got = linear_grad_norms(a, g, cu_seqlens, method, bias=bias, impl=impl)
    assert got.dtype == torch.float32
    assert_close(got, reference(a, g, cu_seqlens, bias))
    assert (got[[0, 5, 10]] == 0).all()


@both
@methods
@pytest.mark.parametrize(("d_in", "d_out"), [(1, 1), (16, 300), (130, 8), (257, 131)])
def test_any_width(impl, method, d_in, d_out):
    a, g, cu_seqlens = random_layer([5, 33], d_in, d_out)
    assert_close(
        linear_grad_norms(a, g, cu_seqlens, method, bias=True, impl=impl), reference(a, g, cu_seqlens, bias=True)
    )


@both
def test_each_sequence_by_its_cheaper_side(impl):
    """24 tokens at most by Gram matrices here, 2 * 40 * 400 / 440 less a tile of 64, or of fewer rows, in torch."""
    lengths = [5, 200, 0, 8, 9, 70, 3]
    a, g, cu_seqlens = random_layer(lengths, 40, 400, dtype=torch.bfloat16)
    assert_close(linear_grad_norms(a, g, cu_seqlens, bias=True, impl=impl), reference(a, g, cu_seqlens, bias=True))
    for length in (0, 1, 7, 8, 9, 100):
        longest = linear_grad_norms_torch.longest_by_gram(40, 400, 64, "auto")
        gram, direct = length * (length + 64) * 440, 2 * length * 40 * 400
        assert (length <= longest) == (gram <= direct)


@both
@methods
@pytest.mark.parametrize("num", [3, 4])
def test_gradients_that_share_activations_add_up(impl, method, num):
    a, gs, cu_seqlens = random_layer([0, 40, 5], 20, *range(3, 3 + 9 * num, 9))
    got = linear_grad_norms(a, gs, cu_seqlens, method, bias=True, impl=impl)
    assert_close(got, reference(a, gs, cu_seqlens, bias=True))
    assert_close(got, reference(a, torch.cat(gs, 1), cu_seqlens, bias=True))


@both
@methods
def test_dtypes_may_differ(impl, method):
    a, gs, cu_seqlens = random_layer([30, 5], 20, 16, 7)
    gs = [gs[0].bfloat16(), gs[1].half()]
    assert_close(linear_grad_norms(a, gs, cu_seqlens, method, impl=impl), reference(a, gs, cu_seqlens))


@both
@methods
def test_the_default_dtype_does_not_matter(impl, method):
    a, g, cu_seqlens = random_layer([30, 5], 20, 16)
    torch.set_default_dtype(torch.float64)
    try:
        got = linear_grad_norms(a, g, cu_seqlens, method, impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, linear_grad_norms(a, g, cu_seqlens, method, impl=impl))
    assert got.dtype == torch.float32


@both
@methods
def test_activations_that_share_a_direction(impl, method):
    """Nearly all of ``A A^T`` cancels in the sum: with Gram matrices kept in bfloat16 22 % are wrong."""
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(256, 64, generator=generator) for _ in range(2))
    a, g = (a + 30).bfloat16().to(DEVICE), (g - g.mean(0)).bfloat16().to(DEVICE)
    cu_seqlens = packed([256])
    true = reference(a, g, cu_seqlens)
    in_bfloat16 = ((a.float() @ a.float().T).bfloat16() * (g.float() @ g.float().T).bfloat16()).float().sum()
    assert abs(in_bfloat16 / true - 1) > 0.1
    assert_close(linear_grad_norms(a, g, cu_seqlens, method, impl=impl), true, tolerance=1e-3)


@both
@methods
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_within_their_sequence(impl, method, bad):
    a, gs, cu_seqlens = random_layer([70, 3, 0, 66, 1], 20, 18, 5)
    healthy = linear_grad_norms(a, gs, cu_seqlens, method, bias=True, impl=impl)
    a[71, 3] = bad
    gs[1][138, 2] = bad
    got = linear_grad_norms(a, gs, cu_seqlens, method, bias=True, impl=impl)
    assert got.isfinite().tolist() == [True, False, True, False, True]
    assert torch.equal(got[[0, 2, 4]], healthy[[0, 2, 4]])


VIEWS = {
    "some columns": lambda x: x[:, 3:20],
    "every other row": lambda x: x[::2],
    "every other column": lambda x: x[:, ::2],
    "columns first": lambda x: x.T.contiguous().T,
    "repeated": lambda x: x[:1].expand(40, -1),
    "whole 16 but a start": lambda x: x.flatten()[1 : 1 + 40 * 32].view(40, 32),
}


@both
@methods
@pytest.mark.parametrize("name", VIEWS)
def test_strides_do_not_matter(impl, method, name):
    a, g = (VIEWS[name](torch.randn(80, 32, device=DEVICE)) for _ in range(2))
    cu_seqlens = packed([len(a) - 7, 7])
    assert_close(linear_grad_norms(a, g, cu_seqlens, method, impl=impl), reference(a, g, cu_seqlens))


@both
@methods
def test_offsets_beyond_two_to_the_31(impl, method):
    """Two rows 2^31 numbers apart, in memory that is asked for but hardly touched."""
    far = 2**31 + 16
    memory = torch.empty(far + 16, dtype=torch.float16, device=DEVICE)
    a = memory.as_strided((2, 16), (far, 1))
    near, g, cu_seqlens = random_layer([2], 16, 16, dtype=torch.float16)
    a.copy_(near)
    for left, right in ((a, g), (g, a)):
        assert_close(linear_grad_norms(left, right, cu_seqlens, method, impl=impl), reference(near, g, cu_seqlens))


@both
@methods
def test_runs_are_bit_equal(impl, method):
    a, g, cu_seqlens = random_layer([100, 3, 64], 40, 300, dtype=torch.bfloat16)
    first, second = (linear_grad_norms(a, g, cu_seqlens, method, bias=True, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


@both
@methods
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(impl, method, lengths):
    a, gs, cu_seqlens = random_layer(lengths, 5, 3, 2)
    got = linear_grad_norms(a, gs, cu_seqlens, method, bias=True, impl=impl)
    assert torch.equal(got, torch.zeros(len(lengths), device=DEVICE))


@both
@methods
def test_no_columns(impl, method):
    a, g, cu_seqlens = random_layer([3, 1], 0, 5)
    assert (linear_grad_norms(a, g, cu_seqlens, method, impl=impl) == 0).all()
    assert_close(linear_grad_norms(a, g, cu_seqlens, method, bias=True, impl=impl), reference(a, g, cu_seqlens, True))
    assert (linear_grad_norms(g, a, cu_seqlens, method, bias=True, impl=impl) == 0).all()


@both
def test_segments_instead_of_cu_seqlens(impl):
    a, g, cu_seqlens = random_layer([4, 4, 4], 5, 3)
    for segments in (Segments.of(cu_seqlens), Segments.uniform(3, 4, cu_seqlens.device)):
        assert_close(linear_grad_norms(a, g, segments, impl=impl), reference(a, g, cu_seqlens))
    assert_close(linear_grad_norms(a, g, cu_seqlens.int(), impl=impl), reference(a, g, cu_seqlens))


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_programs_are_counted_alike_on_the_host_and_on_the_device():
    from snr_kernels.linear_grad_norms import _triton as kernels

    segments = Segments.of(packed([0, 1, 64, 65, 300, 129, 0]))
    pairs, tiles = kernels.tile_pairs(segments, 64, longest=129), kernels.tiles_of_product(segments, 10, longest=129)
    assert pairs.segments.bounds == (0, 0, 1, 2, 5, 5, 11, 11)
    assert tiles.segments.bounds == (0, 0, 0, 0, 0, 10, 10, 10)
    for programs in (pairs, tiles):
        assert programs.segments.cu_seqlens.tolist() == list(programs.segments.bounds)
        assert programs.sequences.bincount(minlength=7).tolist() == programs.segments.cu_seqlens.diff().tolist()
    assert kernels.tile_pairs(segments, 64, longest=129) is pairs  # the next layer does not count again


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_only_rows_that_threads_cannot_read_whole_are_copied():
    from snr_kernels.linear_grad_norms import _triton as kernels

    x = torch.randn(8, 64)
    assert kernels.aligned(x[::2, 16:48], x.dtype).data_ptr() == x[:, 16:].data_ptr()
    for view in (x[:, :15], x[:, 1:17], x[:, ::2], x.T[:, :3], x.flatten()[:120].view(5, 24)[:, :16]):
        copy = kernels.aligned(view, view.dtype)
        assert copy.shape[1] % 16 == copy.stride(0) % 16 == copy.data_ptr() % 16 == 0
        assert torch.equal(copy[:, : view.shape[1]], view)
        assert (copy[:, view.shape[1] :] == 0).all()


# --------------------------------------------------------------------------------------------------- the torch path
@methods
def test_float64_is_exact(method):
    a, g, cu_seqlens = random_layer(LENGTHS, 37, 19)
    a, g = a.double(), g.double()
    got = linear_grad_norms(a, g, cu_seqlens, method, bias=True)
    assert got.dtype == torch.float64
    assert_close(got, reference(a, g, cu_seqlens, bias=True), tolerance=1e-12)


def test_it_is_the_norm_of_what_autograd_finds():
    layer, x = torch.nn.Linear(7, 5).double(), torch.randn(3, 4, 7, dtype=torch.float64)
    y = layer(x)
    [g] = torch.autograd.grad(y.sin().sum(), y)
    norms = linear_grad_norms(x.flatten(0, 1), g.flatten(0, 1), torch.tensor([0, 4, 8, 12]), bias=True)
    for norm, sequence in zip(norms, x, strict=True):
        found = torch.autograd.grad(layer(sequence).sin().sum(), layer.parameters())
        assert norm.item() == pytest.approx(sum(each.square().sum().item() for each in found), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    method=st.sampled_from(["auto", "gram", "direct"]),
    block=st.integers(1, 5),
    budget=st.integers(1, 200),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_invariances(lengths, d_in, d_out, method, block, budget, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, num = sum(lengths), len(lengths)
    a = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    g = torch.randn(rows, d_out, generator=generator, dtype=torch.float64)

    def norms(a, g, lengths):
        return linear_grad_norms(a, g, torch.tensor([0, *lengths]).cumsum(0), method, bias=bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_grad_norms_torch, "BLOCK", block)
        patch.setattr(linear_grad_norms_torch, "BUDGET", budget)
        whole = norms(a, g, lengths)

        order = torch.randperm(num, generator=generator).tolist()
        parts = list(zip(a.split(lengths), g.split(lengths), strict=True))
        moved = norms(*map(torch.cat, zip(*(parts[s] for s in order), strict=True)), [lengths[s] for s in order])
        cut = seed % (num + 1)
        row = sum(lengths[:cut])
        halves = norms(a[:row], g[:row], lengths[:cut]), norms(a[row:], g[row:], lengths[cut:])
        scaled = norms(a, 2 * g, lengths)
        columns = norms(a, [g[:, : d_out // 2], g[:, d_out // 2 :]], lengths)
    assert torch.allclose(moved, whole[order], rtol=1e-9)
    assert torch.allclose(torch.cat(halves), whole, rtol=1e-9)
    assert torch.allclose(scaled, 4 * whole, rtol=1e-9)
    assert torch.allclose(columns, whole, rtol=1e-9)
    assert (whole >= -1e-12).all()


def test_the_cost_is_the_cheaper_side():
    sides = [linear_grad_norms_cost([100, 5000], 256, 1024, torch.bfloat16, m) for m in ("auto", "gram", "direct")]
    assert len({side.bytes for side in sides}) == 1
    assert sides[0].bytes == 5100 * 1280 * 2 + 8
    assert sides[0].flops == 100 * 101 * 1280 + 2 * 5000 * 256 * 1024 < min(sides[1].flops, sides[2].flops)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"activations": torch.ones(3, 2, dtype=torch.long)}, TypeError, "activations"),
        ({"activations": torch.ones(4, 2)}, ValueError, "activations.*N = 3"),
        ({"activations": torch.ones(3)}, ValueError, "activations"),
        ({"grad_outputs": torch.ones(3, 2, dtype=torch.bool)}, TypeError, "grad_outputs"),
        ({"grad_outputs": [torch.ones(3, 2), torch.ones(2, 2)]}, ValueError, "grad_outputs"),
        ({"grad_outputs": []}, ValueError, "grad_outputs"),
        ({"grad_outputs": torch.ones(3, 2, device="meta")}, ValueError, "grad_outputs.*device"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([])}, TypeError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([1, 3])}, ValueError, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 4, 3])}, ValueError, "cu_seqlens"),
        ({"method": "ghost"}, ValueError, "method"),
        ({"impl": "cuda"}, ValueError, "impl"),
        ({"impl": "triton", "activations": torch.ones(3, 2, dtype=torch.float64)}, ValueError, "impl.*triton"),
    ],
)
def test_bad_input_is_named(change, error, names):
    arguments = {
        "activations": torch.ones(3, 2), "grad_outputs": torch.ones(3, 2), "cu_seqlens": torch.tensor([0, 3]), **change
    }  # fmt: skip
    with pytest.raises(error, match=names):
        linear_grad_norms(**arguments)


def test_the_bench_agrees_with_the_peers_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_limits", lambda *_: harness.Limits(1e9, 1e12))
    monkeypatch.setattr(harness, "LAST_LEVEL_CACHE", 1 << 12)
    options = ["--device", "cpu", "--batches", "2x9", "--layers", "8x12", "12x8", "--methods", "gram", "direct"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--seconds", "0", "--out", str(tmp_path)])
    bench.main()
    result = json.loads((tmp_path / "linear_grad_norms.json").read_text())
    assert "--batches 2x9" in result["command"]
    names = {row["implementation"] for row in result["rows"]}
    assert len(result["rows"]) == 2 * len(names) >= 6
    assert all(row["worst_error"] < 1e-4 for row in result["rows"])
    for row in result["rows"]:
        limit = max(row["bytes"] / 1e9, row["flops"] / 1e12)
        assert row["of_limit"] == pytest.approx(limit / (row["ms"] / 1e3))
    assert "snr-optim gram" in capsys.readouterr().out


@pytest.mark.parametrize("offset", [30.0, 1000.0])
def test_terms_that_cancel(offset):
    """Activations with a common direction, gradients that add up to nothing: Gram matrices lose their digits."""
    torch.manual_seed(0)
    a, g = offset + torch.randn(40 * 16, 64), torch.randn(40, 16, 64)
    g = (g - g.mean(1, keepdim=True)).flatten(0, 1)
    cu_seqlens = torch.arange(0, 40 * 16 + 1, 16)
    true = linear_grad_norms_reference(a, g, cu_seqlens)
    assert torch.allclose(linear_grad_norms(a, g, cu_seqlens).double(), true, rtol=1e-3)
    by_gram = linear_grad_norms(a, g, cu_seqlens, "gram")
    assert by_gram.min() >= 0
    assert offset < 100 or not torch.allclose(by_gram.double(), true, rtol=1e-2)
