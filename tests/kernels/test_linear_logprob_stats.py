"""`linear_logprob_stats` against `logprob_stats` of the whole logits and against its float64 reference.

On torch anywhere, on Triton on a GPU or interpreted (`test_interpreter`). What is asked of the statistics of one slab
is asked in `test_logprob_stats`; here it is asked that slabs make no difference, nor ranks, whose cases are among
`tests/helpers/distributed_cases.py`.
"""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import peak_memory
from benchmarks.roofline import linear_logprob_stats_cost
from snr_kernels.dispatch import has_triton, interprets
from snr_kernels.lm_head import (
    _merge,
    linear_logprob_stats,
    linear_logprob_stats_reference,
)
from snr_kernels.lm_head._merge import PartialSoftmax
from snr_kernels.lm_head._tiles import Head, Tile, prepare
from snr_kernels.logprob_stats import LogprobStats, logprob_stats
from snr_kernels.logprob_stats import _torch as logprob_stats_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interprets()), reason="Triton wants a GPU or TRITON_INTERPRET=1"
)
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs_triton)])
NAMES = LogprobStats._fields
ROWS, VOCAB = 7, 1101
LITTLE = ROWS * 4 * 1024  # two slabs, of 576 and 525 columns of all float32 rows

# Logits differ by the order of their sums, sqrt(d) 2^-24 of their size: here 2e-7 of 20, which is the relative error
# of every p. The entropy of a row that another token leads is right to a few 2^-24 only, as in `test_logprob_stats`.
TOLERANCE = 2e-5
FLOOR = {"log_prob": 1e-14, "entropy": 1e-6, "sum_p_squared": 0.0, "grad_norm_squared": 0.0}


def random_head(rows=ROWS, width=16, vocab=VOCAB, dtype=torch.float32, bias=False, spread=4.0):
    """Hidden states, weights, bias and labels; logits of deviation ``spread``, one row sure of its label."""
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.float64)
    weight = spread * torch.randn(vocab, width, device=DEVICE, dtype=torch.float64) / math.sqrt(width)
    labels = torch.randint(vocab, (rows,), device=DEVICE)
    if rows:
        own = weight[labels[0]]
        hidden[0] = own * (30 / own.square().sum())  # its logit is 30
    b = torch.randn(vocab, device=DEVICE, dtype=dtype) if bias else None
    return hidden.to(dtype), weight.to(dtype), b, labels


def assert_close(got, true, tolerance=TOLERANCE, floor=FLOOR):
    for name, a, b in zip(NAMES, got, true, strict=True):
        error = (a.double() - b.double()).abs()
        assert (error <= tolerance * b.abs() + floor[name]).all(), (name, (error / b.abs()).max(), error.max())


def differentiate(call, tensors, factors):
    """Of ``sum_k factors_k . stats_k`` with respect to the tensors that are there."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in tensors]
    stats = call(*leaves)
    loss = sum((f * s).sum() for f, s in zip(factors, stats, strict=True) if f is not None)
    return torch.autograd.grad(loss, [x for x in leaves if x is not None])


def assert_gradients_close(got, true, tolerance):
    for a, b in zip(got, true, strict=True):
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


# ----------------------------------------------------------------------------------- the same as of the whole logits
@both
@pytest.mark.parametrize("slab_bytes", [1, LITTLE, 1 << 30])  # rows and columns divided, columns divided, whole
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_logprob_stats_of_the_logits(impl, slab_bytes, dtype):
    impl = "auto" if dtype == torch.float64 else impl  # which Triton does not have
    hidden, weight, _, labels = random_head(dtype=dtype)
    labels[3] = -100
    temperature = torch.rand(ROWS, device=DEVICE) + 0.5
    factors = torch.randn(4, ROWS, device=DEVICE)

    def ours(h, w):
        return linear_logprob_stats(h, w, labels, temperature, slab_bytes=slab_bytes, impl=impl)

    def whole(h, w):
        return logprob_stats(h @ w.t(), labels, temperature)

    got, true = ours(hidden, weight), whole(hidden, weight)
    assert all(x.dtype == dtype and x.shape == labels.shape for x in got)
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-12
    assert_close(got, true, tolerance)
    assert all((x[3] == 0).all() for x in got)
    got = differentiate(ours, (hidden, weight), factors)
    assert_gradients_close(got, differentiate(whole, (hidden, weight), factors), tolerance)
    assert (got[0][3] == 0).all()


@both
@pytest.mark.parametrize("which", [*range(4), "all"])
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (None, 0.3, True), (8.0, 1.7, True)])
def test_gradients_of_each_statistic(impl, which, softcap, scale, bias):
    hidden, weight, b, labels = random_head(bias=bias)
    factors = [torch.randn(ROWS, device=DEVICE) if which in (k, "all") else None for k in range(4)]
    options = {"softcap": softcap, "scale": scale}

    def ours(h, w, b=None):
        return linear_logprob_stats(h, w, labels, 0.8, b, slab_bytes=LITTLE, impl=impl, **options)

    def true(h, w, b=None):
        return linear_logprob_stats_reference(h, w, labels, 0.8, b, **options)

    tensors = (hidden, weight, b) if bias else (hidden, weight)
    assert_close(ours(*tensors), true(*tensors))
    # Of the same relative error as every p. Where another token than the label leads, gradients of all but log_prob
    # are differences of near numbers: their error is 1e-6 in most draws, and 9e-6 in the worst of 2,250.
    assert_gradients_close(differentiate(ours, tensors, factors), differentiate(true, tensors, factors), TOLERANCE)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1023, 1024, 1025, 2 * 192, 2 * 192 + 1])
@pytest.mark.parametrize("rows", [1, 7])
def test_odd_shapes(rows, vocab):
    hidden, weight, b, labels = random_head(rows, 7, vocab, torch.float64, bias=True)
    reference = linear_logprob_stats_reference(hidden, weight, labels, 1.0, b)
    for slab_bytes in (1, 2 * rows * 64 * 8, 1 << 30):
        got = linear_logprob_stats(hidden, weight, labels, 1.0, b, slab_bytes=slab_bytes)
        assert_close(got, reference, 1e-9, dict.fromkeys(NAMES, 1e-13))


def test_leading_dimensions_and_strides():
    hidden, weight, _, labels = random_head(34, vocab=3001, dtype=torch.float64)
    flat = linear_logprob_stats(hidden, weight, labels)
    batched = hidden.view(2, 17, 16)
    for same in (batched, batched.transpose(0, 1).contiguous().transpose(0, 1), batched.mT.contiguous().mT):
        for weights in (weight, weight.t().contiguous().t()):
            ones = torch.ones(2, 17, dtype=torch.float64, device=DEVICE)
            got = linear_logprob_stats(same, weights, labels.view(2, 17).int(), ones)
            assert_close([x.flatten() for x in got], flat, 1e-10)


def test_labels_on_both_sides_of_every_boundary():
    hidden, weight, _, _ = random_head(dtype=torch.float64)
    for boundary in (576, VOCAB - 1):
        labels = torch.arange(ROWS, device=DEVICE) % 3 + boundary - 2
        got = linear_logprob_stats(hidden, weight, labels, slab_bytes=2 * LITTLE)  # float64
        assert_close(got, linear_logprob_stats_reference(hidden, weight, labels), 1e-10)


def test_gradcheck():
    hidden, weight, b, labels = random_head(5, 4, 300, torch.float64, bias=True, spread=1.0)
    leaves = [x.requires_grad_() for x in (hidden, weight, b)]
    for slab_bytes in (1, 5 * 8 * 128, 1 << 20):
        for softcap in (None, 2.0):

            def call(h, w, b, slab_bytes=slab_bytes, softcap=softcap):
                return tuple(linear_logprob_stats(h, w, labels, 0.7, b, softcap=softcap, slab_bytes=slab_bytes))

            assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@both
def test_bfloat16_is_no_worse_than_twice_torch(impl):
    """Against float64 of the same bfloat16 numbers; a float32 slab leaves the rounding of nothing but gradients."""
    hidden, weight, _, labels = random_head(dtype=torch.bfloat16)
    factors = torch.randn(4, ROWS, device=DEVICE)
    true = linear_logprob_stats_reference(hidden, weight, labels)
    gradients = differentiate(lambda h, w: linear_logprob_stats_reference(h, w, labels), (hidden, weight), factors)

    def rounded(h, w):
        logits = (h @ w.t()).double()
        return logprob_stats(logits, labels)

    def errors(call):
        stats = [((a - b).double().norm() / b.norm()).item() for a, b in zip(call(hidden, weight), true, strict=True)]
        found = differentiate(call, (hidden, weight), factors)
        return stats + [
            ((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(found, gradients, strict=True)
        ]

    peer = errors(rounded)
    for logits_dtype in (None, torch.float32):

        def ours(h, w, logits_dtype=logits_dtype):
            return linear_logprob_stats(h, w, labels, slab_bytes=LITTLE, logits_dtype=logits_dtype, impl=impl)

        got = errors(ours)
        assert all(a <= 2 * b + 2**-8 for a, b in zip(got, peer, strict=True)), (got, peer)
    assert max(got[:4]) < 1e-5


def test_autocast_rounds_the_products_and_not_the_gradients():
    hidden, weight, b, labels = random_head(bias=True, spread=1.0)
    factors = torch.randn(4, ROWS, device=DEVICE)
    low = [x.bfloat16() for x in (hidden, weight)]

    def ours(h, w, b):
        with torch.autocast(DEVICE, torch.bfloat16):
            return linear_logprob_stats(h, w, labels, 1.0, b, slab_bytes=LITTLE, logits_dtype=torch.float32)

    assert_close(ours(hidden, weight, b), linear_logprob_stats_reference(*low, labels, 1.0, b))
    got = differentiate(ours, (hidden, weight, b), factors)
    assert [g.dtype for g in got] == [torch.float32] * 3
    true = differentiate(lambda *x: linear_logprob_stats_reference(x[0], x[1], labels, 1.0, x[2]), (*low, b), factors)
    assert_gradients_close(got, true, 2**-7)
    nothing = linear_logprob_stats(hidden, weight, labels, 1.0, b)  # nothing stays switched on
    assert_close(nothing, linear_logprob_stats_reference(hidden, weight, labels, 1.0, b))


# --------------------------------------------------------------------------------------------------- joined softmaxes
@settings(max_examples=60)
@given(
    cuts=st.lists(st.integers(1, 49), max_size=5),
    spread=st.sampled_from([0.1, 3.0, 40.0]),
    masked=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_any_cut_of_the_vocabulary_joins_to_the_whole(cuts, spread, masked, seed):
    """Parts of nothing but ``-inf``, and the label in any part."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(4, 50, generator=generator, dtype=torch.float64)
    logits[:, torch.randperm(50, generator=generator)[:masked]] = -math.inf
    logits[0, :] = -math.inf  # no token can be
    logits[1, 7] = 0.0
    labels = torch.randint(50, (4,), generator=generator)
    edges = sorted({0, *cuts, 50})
    parts = []
    for start, end in pairwise(edges):
        owned = (labels >= start) & (labels < end)
        local = torch.where(owned, labels - start, 0)
        results = torch.ops.snr_kernels.logprob_stats(
            logits[:, start:end], local, torch.tensor(0.5, dtype=torch.float64), -100, True, True, "torch"
        )
        parts.append(PartialSoftmax.of(results, owned, 1.0))
    temperature, nobody = torch.tensor(0.5, dtype=torch.float64), torch.zeros(4, dtype=torch.bool)
    by_two = parts[0]
    for part in parts[1:]:
        by_two = _merge.join(PartialSoftmax(*map(torch.stack, zip(by_two, part, strict=True))), temperature)
    at_once = _merge.join(PartialSoftmax(*map(torch.stack, zip(*parts, strict=True))), temperature)
    true = logprob_stats(logits, labels, 0.5)
    for joined in (by_two, at_once):
        got = joined.finish(nobody, 1.0)[:4]
        assert all(x[0].isnan() for x in got)
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a[1:], b[1:], rtol=1e-11, atol=1e-13)


@both
@pytest.mark.parametrize("missing", [1e-1, 1e-3, 1e-5, 1e-7])
def test_nothing_cancels_on_confident_rows(impl, missing):
    """Logits exact in float32 (one hidden state, its weights the logits), the label's slab joined with the others."""
    logits = torch.randn(1, 2053, device=DEVICE)
    logits[0, 7] = -math.inf
    logits[0, 7] = logits[0].logsumexp(-1) + math.log((1 - missing) / missing)
    hidden, weight, labels = torch.ones(1, 1, device=DEVICE), logits.t().contiguous(), torch.tensor([7], device=DEVICE)
    got = linear_logprob_stats(hidden, weight, labels, slab_bytes=4096, impl=impl)
    true = linear_logprob_stats_reference(hidden, weight, labels)
    assert_close(got, true, 1e-5, dict.fromkeys(NAMES, 0.0))


# -------------------------------------------------------------------------------------------------------- hostile rows
@both
def test_a_token_without_an_answer_is_nan_and_alone(impl):
    hidden, weight, _, labels = random_head(6, 4)
    hidden[1] = math.nan
    labels[2], labels[3], labels[4] = VOCAB, -1, -100
    temperature = torch.ones(6, device=DEVICE)
    temperature[5] = 0.0
    hidden.requires_grad_()
    got = linear_logprob_stats(hidden, weight, labels, temperature, slab_bytes=1, impl=impl)
    for x in got:
        assert x[[1, 2, 3, 5]].isnan().all()
        assert x[4] == 0
    alone = linear_logprob_stats(hidden[:1], weight, labels[:1], impl=impl)
    assert_close([x[:1] for x in got], alone)
    sum(x.nansum() for x in got).backward()
    assert hidden.grad[[0, 4]].isfinite().all()
    assert (hidden.grad[4] == 0).all()


@both
def test_words_that_cannot_be_have_no_part(impl):
    """A vocabulary padded to a round number, by a bias of ``-inf``; whole slabs of it."""
    hidden, weight, b, labels = random_head(3, 4, 3200, bias=True)
    labels %= 1100
    b[1100:] = -math.inf
    got = linear_logprob_stats(hidden, weight, labels, 1.0, b, slab_bytes=1, impl=impl)
    assert_close(got, linear_logprob_stats_reference(hidden, weight[:1100], labels, 1.0, b[:1100]))
    call = lambda h, w: linear_logprob_stats(h, w, labels, 1.0, b, slab_bytes=1, impl=impl)  # noqa: E731
    of_hidden, of_weight = differentiate(call, (hidden, weight), [1.0] * 4)
    assert of_hidden.isfinite().all()
    assert (of_weight[1100:] == 0).all()


def test_ignore_index_may_be_a_word():
    hidden, weight, _, labels = random_head(6, 4, 1500, torch.float64)
    labels[2] = 0
    got = linear_logprob_stats(hidden, weight, labels, ignore_index=0, slab_bytes=1)
    true = linear_logprob_stats_reference(hidden, weight, labels)
    assert_close(got, [x.masked_fill(labels == 0, 0.0) for x in true], 1e-10)


def test_no_tokens():
    hidden, weight, b, labels = random_head(0, 4, 1500, bias=True)
    got = linear_logprob_stats(hidden.view(0, 3, 4), weight, labels.view(0, 3), 1.0, b)
    assert all(x.shape == (0, 3) for x in got)
    call = lambda h, w, b: linear_logprob_stats(h, w, labels, 1.0, b)  # noqa: E731
    assert all((g == 0).all() for g in differentiate(call, (hidden, weight, b), [1.0] * 4))


# ------------------------------------------------------------------------------------------------------------ autograd
def test_what_is_not_asked_for_is_none_and_changes_nothing():
    hidden, weight, _, labels = random_head()
    whole = linear_logprob_stats(hidden, weight, labels, slab_bytes=LITTLE)
    for name in NAMES:
        some = linear_logprob_stats(hidden, weight, labels, slab_bytes=LITTLE, outputs=[name])
        assert [x is not None for x in some] == [other == name for other in NAMES]
        assert torch.equal(getattr(some, name), getattr(whole, name))


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_graph_can_be_differentiated_again(softcap):
    """The gradient is written over the kept slab; a second pass multiplies it anew."""
    hidden, weight, _, labels = random_head()
    for slab_bytes in (LITTLE, 1 << 30):
        leaf = hidden.clone().requires_grad_()
        stats = linear_logprob_stats(leaf, weight, labels, softcap=softcap, slab_bytes=slab_bytes)
        first, *again = (torch.autograd.grad(sum(x.sum() for x in stats), leaf, retain_graph=True)[0] for _ in range(3))
        assert all(torch.equal(first, other) for other in again)


def test_runs_are_bit_equal():
    hidden, weight, _, labels = random_head()
    call = lambda h, w: linear_logprob_stats(h, w, labels, slab_bytes=LITTLE)  # noqa: E731
    runs = [(*call(hidden, weight), *differentiate(call, (hidden, weight), [1.0] * 4)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_lies_in_the_kept_slab_is_not_multiplied_again(monkeypatch):
    hidden, weight, _, labels = random_head()
    filled, fill = [], Head.fill
    monkeypatch.setattr(Head, "fill", lambda self, buffer, tile: filled.append(tile) or fill(self, buffer, tile))
    stats = linear_logprob_stats(hidden.requires_grad_(), weight, labels, slab_bytes=LITTLE)
    tiles = list(filled)
    assert len(tiles) == 2
    for expected in (tiles[:1], tiles[::-1]):
        filled.clear()
        stats.log_prob.sum().backward(retain_graph=True)
        assert filled == expected


def test_a_loss_of_one_statistic_costs_no_terms_of_the_others(monkeypatch):
    hidden, weight, _, labels = random_head()
    given = []
    path = logprob_stats_torch.backward
    monkeypatch.setattr(logprob_stats_torch, "backward", lambda *a, **k: given.append(a[5]) or path(*a, **k))
    linear_logprob_stats(hidden.requires_grad_(), weight, labels, impl="torch").entropy.sum().backward()
    assert [[g is not None for g in each] for each in given] == [[False, True, False, False]]


def test_a_backward_pass_within_autocast():
    hidden, weight, _, labels = random_head()
    call = lambda h, w: linear_logprob_stats(h, w, labels, slab_bytes=LITTLE)  # noqa: E731
    true = differentiate(call, (hidden, weight), [1.0] * 4)
    stats = call(hidden.requires_grad_(), weight.requires_grad_())
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(sum(x.sum() for x in stats), (hidden, weight))
    assert all(map(torch.equal, got, true))


@pytest.mark.parametrize("frozen", [False, True])
def test_outputs_can_be_changed_in_place(frozen):
    hidden, weight, _, labels = random_head()
    stats = linear_logprob_stats(hidden if frozen else hidden.requires_grad_(), weight, labels)
    factor = torch.ones(ROWS, device=DEVICE, requires_grad=True)
    kept = stats.entropy * 1
    kept[labels > 3] = 0
    if frozen:
        stats.log_prob.mul_(2).add_(factor)
        stats.log_prob.sum().backward()
        assert (factor.grad == 1).all()


def test_a_bias_of_another_dtype():
    hidden, weight, b, labels = random_head(bias=True)
    low = b.bfloat16().requires_grad_()
    got = linear_logprob_stats(hidden, weight, labels, 1.0, low)
    assert_close(got, linear_logprob_stats_reference(hidden, weight, labels, 1.0, low.detach()))
    got.entropy.sum().backward()
    assert low.grad.dtype == torch.bfloat16


def test_frozen_tensors_get_no_gradient():
    hidden, weight, b, labels = random_head(bias=True)
    full = differentiate(lambda h, w, b: linear_logprob_stats(h, w, labels, 1.0, b), (hidden, weight, b), [1.0] * 4)
    for k in range(3):
        tensors = [hidden, weight, b]
        tensors[k] = tensors[k].clone().requires_grad_()
        stats = linear_logprob_stats(tensors[0], tensors[1], labels, 1.0, tensors[2], slab_bytes=LITTLE)
        sum(x.sum() for x in stats).backward()
        assert_gradients_close([tensors[k].grad], [full[k]], 1e-5)
        assert [x.grad is None for x in tensors].count(False) == 1
    assert not any(x.requires_grad for x in linear_logprob_stats(hidden, weight, labels))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant):
    hidden, weight, _, labels = random_head()
    hidden.requires_grad_(), weight.requires_grad_()

    def call(h, w):
        return tuple(linear_logprob_stats(h, w, labels, slab_bytes=LITTLE))

    sum(x.sum() for x in checkpoint(call, hidden, weight, use_reentrant=reentrant)).backward()
    true = differentiate(call, (hidden, weight), [1.0] * 4)
    assert torch.equal(hidden.grad, true[0])
    assert torch.equal(weight.grad, true[1])


def test_saved_tensors_can_be_offloaded():
    hidden, weight, _, labels = random_head()
    call = lambda h, w: linear_logprob_stats(h, w, labels, slab_bytes=LITTLE)  # noqa: E731

    def offloaded(h, w):
        with torch.autograd.graph.save_on_cpu():
            return call(h, w)

    got = differentiate(offloaded, (hidden, weight), [1.0] * 4)
    assert all(map(torch.equal, got, differentiate(call, (hidden, weight), [1.0] * 4)))


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    hidden, weight, _, labels = random_head()
    stats = linear_logprob_stats(hidden.requires_grad_(), weight, labels)
    weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stats.log_prob.sum().backward()


def test_nothing_outlives_the_graph():
    hidden, weight, _, labels = random_head()
    stats = linear_logprob_stats(hidden.clone().requires_grad_(), weight, labels)
    [[node, _]] = stats.log_prob.grad_fn.next_functions
    saved = [weakref.ref(x) for x in node.saved_tensors if x is not None and x.numel() > ROWS * 16]
    assert saved
    del stats, node
    gc.collect()
    assert all(ref() is None or ref() is weight for ref in saved)


def test_a_compiled_function_breaks_its_graph_there():
    hidden, weight, _, labels = random_head()

    def call(h, w):
        return linear_logprob_stats(2 * h, w, labels, slab_bytes=LITTLE).log_prob * 3

    compiled = torch.compile(call, backend="eager")
    torch.testing.assert_close(compiled(hidden, weight), call(hidden, weight))
    torch.compiler.reset()
    with pytest.raises(Exception, match="linear_logprob_stats"):
        torch.compile(call, backend="eager", fullgraph=True)(hidden, weight)


# -------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("softcap", [None, 10.0])
def test_logits_are_never_whole(softcap):
    """Peak memory beyond the gradients, measured: the slab and some of what a slab is computed with."""
    rows, width, vocab, slab = 512, 32, 32_768, 1 << 23
    hidden, weight, _, labels = random_head(rows, width, vocab)
    hidden.requires_grad_(), weight.requires_grad_()

    def step(slab_bytes):
        stats = linear_logprob_stats(hidden, weight, labels, softcap=softcap, slab_bytes=slab_bytes)
        sum(x.sum() for x in stats).backward()
        hidden.grad = weight.grad = None

    device = torch.device(DEVICE)
    step(slab)  # the first call fills caches
    peaks = [peak_memory(lambda: step(slab), device) for _ in range(4)]
    if None in peaks:
        pytest.skip("the system does not tell")
    logits = rows * vocab * 4  # 64 MB; 8 MB are taken by `logprob_stats_torch`, and the allocator keeps some
    assert min(peaks) < weight.nbytes + logits / 2
    assert peak_memory(lambda: step(1 << 30), device) > 0.9 * (weight.nbytes + logits)  # it would be seen


@pytest.mark.parametrize("rows", [1, 33, 5000])
@pytest.mark.parametrize("slab_bytes", [1, 4096, 1 << 20, 1 << 26])
@pytest.mark.parametrize(("softcap", "logits_dtype"), [(None, None), (3.0, None), (None, torch.float32)])
def test_tiles_cover_all_and_keep_to_the_slab(rows, slab_bytes, softcap, logits_dtype):
    hidden, weight = torch.empty(rows, 2, dtype=torch.bfloat16), torch.empty(3001, 2, dtype=torch.bfloat16)
    labels = torch.zeros(rows, dtype=torch.long)
    divisor, options = prepare(
        hidden, weight, labels, 1.0, None, softcap=softcap, scale=1.0, ignore_index=-100, slab_bytes=slab_bytes,
        logits_dtype=logits_dtype, process_group=None, first_label=None, impl="auto",
    )  # fmt: skip
    tiles = Head.of(hidden, weight, None, labels, divisor, options).tiles()
    seen = torch.zeros(rows, 3001, dtype=torch.int8)
    for tile in tiles:
        seen[tile.rows, tile.columns] += 1
        assert isinstance(tile, Tile)
        size = {(None, None): 2, (3.0, None): 10, (None, torch.float32): 6}[softcap, logits_dtype]
        assert size * tile.height * tile.width <= slab_bytes or (tile.height == 1 and tile.width <= 1024)
    assert (seen == 1).all()


def test_cost_counts_products():
    forward = linear_logprob_stats_cost(8, 3, 5, torch.bfloat16)
    assert forward == ((8 + 5) * 3 * 2, 2 * 8 * 3 * 5)
    assert linear_logprob_stats_cost(8, 3, 5, torch.bfloat16, backward=True).flops == 3 * forward.flops
    assert linear_logprob_stats_cost(8, 3, 5, torch.bfloat16, backward=True, recomputed=0).flops == 2 * forward.flops


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"hidden": torch.zeros(2, 4, dtype=torch.long)}, TypeError, "hidden: expected float64, float32"),
        ({"weight": torch.zeros(5, 4, dtype=torch.float64)}, TypeError, "weight: expected the dtype of hidden"),
        ({"weight": torch.zeros(5, 3)}, ValueError, r"weight: expected \[V, d\] with d = 4, got \[5, 3\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "weight: expected"),
        ({"labels": torch.zeros(2)}, TypeError, "labels: expected integers"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, "hidden, labels: expected"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: expected \[V\] with V = 5"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature: expected a number or the shape of labels"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive"),
        ({"scale": -1.0}, ValueError, "scale: expected a positive"),
        ({"scale": math.nan}, ValueError, "scale: expected a positive"),
        ({"slab_bytes": 0}, ValueError, "slab_bytes: expected a positive"),
        ({"slab_bytes": 1e6}, ValueError, "slab_bytes: expected a positive integer"),
        ({"ignore_index": None}, TypeError, "ignore_index: expected an integer"),
        ({"temperature": torch.ones(2, dtype=torch.long)}, TypeError, "temperature: expected .* floating"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype: expected torch.float32"),
        ({"outputs": "entropy"}, ValueError, "outputs: expected a list"),
        ({"outputs": ["logits"]}, ValueError, "outputs: expected some of"),
        ({"impl": "cuda"}, ValueError, "impl: expected 'auto'"),
        ({"hidden": torch.zeros(2, 4, device="meta")}, ValueError, "expected the device of hidden, meta"),
    ],
)
def test_bad_input_is_named(change, error, names):
    arguments = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(error, match=names):
        linear_logprob_stats(**(arguments | change))


def test_differentiated_twice_it_says_so():
    hidden, weight, _, labels = random_head(3, 4, 50)
    stats = linear_logprob_stats(hidden.requires_grad_(), weight, labels)
    [gradient] = torch.autograd.grad(stats.log_prob.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob_stats: differentiable once"):
        gradient.sum().backward()
    stats = linear_logprob_stats(hidden.detach(), weight.requires_grad_(), labels)
    [gradient] = torch.autograd.grad(stats.log_prob.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprob_stats: differentiable once"):
        gradient.sum().backward()


def test_torch_func_is_refused():
    hidden, weight, _, labels = random_head(3, 4, 50)
    with pytest.raises(RuntimeError, match="use linear_logprob_stats_reference"):
        torch.func.grad(lambda h: linear_logprob_stats(h, weight, labels).log_prob.sum())(hidden)


def test_as_a_layer_of_a_trained_model():
    """Ten steps of SGD through the op and through the logits end at the same weights."""
    torch.manual_seed(0)
    ids = torch.randint(300, (4, 9), device=DEVICE)

    def train(fused):
        torch.manual_seed(1)
        embed, head = nn.Embedding(300, 8).to(DEVICE), nn.Linear(8, 300).to(DEVICE)
        optimizer = torch.optim.SGD([*embed.parameters(), *head.parameters()], lr=0.1)
        for _ in range(10):
            hidden, labels = embed(ids[:, :-1]), ids[:, 1:]
            if fused:
                stats = linear_logprob_stats(hidden, head.weight, labels, 1.0, head.bias, slab_bytes=1 << 14)
            else:
                stats = logprob_stats(head(hidden), labels)
            optimizer.zero_grad()
            (-stats.log_prob - 0.1 * stats.entropy).mean().backward()
            optimizer.step()
        return head.weight.detach()

    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-6)
