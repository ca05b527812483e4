"""`logprob_stats` against its float64 reference: the torch path anywhere, the Triton kernels on a GPU or interpreted.

Every property is asked of both paths. Without a GPU the Triton half runs in `test_interpreter`.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import logprob_stats_cost
from snr_kernels.dispatch import has_triton, interprets
from snr_kernels.logprob_stats import LogprobStats, logprob_stats, logprob_stats_reference
from snr_kernels.logprob_stats import _torch as logprob_stats_torch
from snr_kernels.logprob_stats.op import as_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interprets()), reason="Triton wants a GPU or TRITON_INTERPRET=1"
)
both = pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=runs_triton)])
NAMES = LogprobStats._fields

# float32 arithmetic: exp of a difference of logits is off by the rounding of that difference, |difference| * 2^-24;
# for differences up to 60 (the data here) that is 4e-6, and sums of positive terms do not make it worse. The entropy
# of a row where another token than the label has nearly all the mass is log(1 + little): right to a few 2^-24 only,
# and so are the gradients of entropy and sum p^2 there. The reference itself is right to 1e-14.
TOLERANCE = 1e-5
# Where another token than the label leads, the gradients of all but log_prob are differences of near numbers up to 1.
GRADIENT_TOLERANCE, GRADIENT_FLOOR = 1e-5, 3e-6
FLOOR = {"log_prob": 1e-14, "entropy": 5e-7, "sum_p_squared": 0.0, "grad_norm_squared": 0.0}


def random_rows(*shape, dtype=torch.float32, spread=4.0):
    logits = (spread * torch.randn(*shape, device=DEVICE)).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], device=DEVICE)


def relative_error(got, true):
    return ((got.double() - true).abs() / true.abs().clamp_min(1e-300)).max().item()


def assert_close(got, true):
    for name, a, b in zip(NAMES, got, true, strict=True):
        error = (a.double() - b).abs()
        assert (error <= TOLERANCE * b.abs() + FLOOR[name]).all(), (name, error.max())


def assert_gradient_close(got, true, tolerance=GRADIENT_TOLERANCE):
    error, size = (got.double() - true).norm(dim=-1), true.norm(dim=-1)
    assert (error <= tolerance * size + GRADIENT_FLOOR).all(), error.max()


def gradients(function, logits, labels, temperature, factors):
    """Of ``sum_k factors_k . stats_k``; no factor, no part in the loss."""
    leaf = logits.detach().clone().requires_grad_()
    stats = function(leaf, labels, temperature)
    sum((f * s).sum() for f, s in zip(factors, stats, strict=True) if f is not None).backward()
    return leaf.grad


@both
@pytest.mark.parametrize("vocab", [1, 2, 1003, 1024, 2053, 4112, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(impl, vocab, dtype):
    logits, labels = random_rows(*((1, 2) if vocab > 9999 else (2, 3)), vocab, dtype=dtype)
    for temperature in (0.7, torch.rand(labels.shape, device=DEVICE) + 0.5):
        got = logprob_stats(logits, labels, temperature, impl=impl)
        if vocab == 1:
            assert [value.abs().max().item() for value in got] == [0, 0, 1, 0]
            continue
        assert all(value.dtype == torch.float32 and value.shape == labels.shape for value in got)
        assert_close(got, logprob_stats_reference(logits, labels, temperature))


@both
@pytest.mark.parametrize("which", [*range(4), "all"])
@pytest.mark.parametrize(("vocab", "dtype"), [(1003, torch.float32), (4112, torch.float32), (2053, torch.bfloat16)])
def test_gradients_equal_the_reference(impl, which, vocab, dtype):
    logits, labels = random_rows(2, 3, vocab, dtype=dtype)
    logits[0, 0, labels[0, 0]] = 30.0  # one confident row
    temperature = torch.rand(2, 3, device=DEVICE) + 0.5
    factors = [torch.randn(2, 3, device=DEVICE) if which in (k, "all") else None for k in range(4)]
    got = gradients(lambda *a: logprob_stats(*a, impl=impl), logits, labels, temperature, factors)
    true = gradients(logprob_stats_reference, logits.double(), labels, temperature, factors)
    assert got.dtype == dtype
    # bfloat16 has 8 bits; the interpreter cuts off where hardware rounds
    assert_gradient_close(got, true, GRADIENT_TOLERANCE if dtype == torch.float32 else 2**-7)


@both
@pytest.mark.parametrize("missing", [1.0, 0.5, 1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("vocab", [1003, 151_936])
def test_nothing_cancels_on_confident_rows(impl, missing, vocab):
    """``1 - p_y`` spread over all others; ``1 - 2 p + sum p^2`` in float32 is all rounding from 1e-4 down."""
    logits = torch.randn(1, vocab, device=DEVICE)
    logits[0, 7] = -math.inf
    logits[0, 7] = logits[0].logsumexp(-1) + math.log((1 - missing) / missing) if missing < 1 else -30.0
    labels = torch.tensor([7], device=DEVICE)
    got, true = logprob_stats(logits, labels, impl=impl), logprob_stats_reference(logits, labels)
    assert all(relative_error(a, b) < TOLERANCE for a, b in zip(got, true, strict=True))  # the entropy too
    for k in range(4):
        factors = [1.0 if which == k else None for which in range(4)]
        gradient = gradients(lambda *a: logprob_stats(*a, impl=impl), logits, labels, 1.0, factors)
        true = gradients(logprob_stats_reference, logits.double(), labels, 1.0, factors)
        assert (gradient.double() - true).norm() < TOLERANCE * true.norm()


@both
def test_tokens_that_cannot_be_have_no_part(impl):
    logits, labels = random_rows(4, 2053)
    logits[:, 1000:] = -math.inf
    labels[:3] %= 1000
    labels[3] = 1500  # a label that cannot be
    got = logprob_stats(logits, labels, impl=impl)
    assert_close([value[:3] for value in got], logprob_stats_reference(logits[:3, :1000], labels[:3]))
    assert got.log_prob[3] == -math.inf
    assert got.grad_norm_squared[3].item() == pytest.approx(1 + got.sum_p_squared[3].item(), rel=1e-6)
    gradient = gradients(lambda *a: logprob_stats(*a, impl=impl), logits[:3], labels[:3], 1.0, [1.0] * 4)
    assert gradient.isfinite().all()
    assert (gradient[:, 1000:] == 0).all()


@both
def test_masks_of_the_lowest_number_do_as_minus_infinity_does(impl):
    lowest = torch.finfo(torch.float32).min
    logits, labels = random_rows(3, 1003)
    logits[1, 500:] = lowest
    labels[1] = 3
    logits[2] = lowest  # a row of nothing else is uniform
    assert_close(logprob_stats(logits, labels, impl=impl), logprob_stats_reference(logits, labels))
    nothing = torch.full((1, 5), -math.inf, device=DEVICE)
    assert all(value.isnan().all() for value in logprob_stats(nothing, labels[:1] * 0, impl=impl))


@both
def test_autocast_changes_nothing(impl):
    logits, labels = random_rows(4, 1003)
    expected = logprob_stats(logits, labels, impl=impl)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = logprob_stats(logits, labels, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@both
def test_the_entropy_is_never_negative_and_outputs_can_be_written(impl):
    logits, labels = random_rows(50, 1003, spread=100.0)
    stats = logprob_stats(logits.requires_grad_(), labels, impl=impl)
    assert (stats.entropy >= 0).all()
    assert stats.log_prob.mul_(2).shape == (50,)


@both
def test_a_row_without_an_answer_is_nan_and_alone(impl):
    logits, labels = random_rows(9, 1003)
    healthy = [0, 8]
    logits[1] = -math.inf
    logits[2, 5] = math.nan
    logits[3, 5] = math.inf
    logits[4, labels[4]] = math.nan
    logits[5, labels[5]] = math.inf
    labels[6], labels[7] = 1003, -1
    got = logprob_stats(logits, labels, impl=impl)
    alone = logprob_stats(logits[healthy], labels[healthy], impl=impl)
    gradient = gradients(lambda *a: logprob_stats(*a, impl=impl), logits, labels, 1.0, [1.0] * 4)
    for value, expected in zip(got, alone, strict=True):
        assert torch.equal(value[healthy], expected)
        assert value[1:8].isnan().all()
    assert gradient[healthy].isfinite().all()
    assert gradient[1:8].isnan().all()
    for name in NAMES:
        leaf = logits.clone().requires_grad_()
        getattr(logprob_stats(leaf, labels, outputs=[name], impl=impl), name).sum().backward()
        assert leaf.grad[1:8].isnan().all()


@both
@pytest.mark.parametrize(("scale", "temperature"), [(1e4, 1.0), (1.0, 1e-4), (1e-3, 1e-7), (1e8, 1e8)])
def test_neither_large_logits_nor_low_temperatures_cost_the_gradient_digits(impl, scale, temperature):
    logits, labels = random_rows(20, 64, spread=2.0)
    logits *= scale
    logits[:, 1] = logits[:, 0] + 0.3 * temperature  # so that some rows are not all one token
    logits[:10, :2] += 20 * scale
    factors = [torch.ones(20, device=DEVICE), None, None, None]  # log p itself has seven digits, whatever its size
    true = gradients(logprob_stats_reference, logits.double(), labels, temperature, factors)
    got = gradients(lambda *a: logprob_stats(*a, impl=impl), logits, labels, temperature, factors)
    assert_gradient_close(temperature * got, temperature * true)


@both
def test_a_bad_temperature_of_one_token_is_nan_and_alone(impl):
    logits, labels = random_rows(6, 1003)
    temperature = torch.tensor([1.0, 0.0, -1.0, math.nan, math.inf, 2.0], device=DEVICE)
    for value in logprob_stats(logits, labels, temperature, impl=impl):
        assert value.isfinite().tolist() == [True, False, False, False, False, True]


@both
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_ignored_rows_are_not_read(impl, ignore_index):
    logits, labels = random_rows(2, 3, 1003)
    labels[labels == ignore_index] = 6
    labels[0, 1] = labels[1] = ignore_index
    logits[labels == ignore_index] = math.nan
    got = logprob_stats(logits, labels, ignore_index=ignore_index, impl=impl)
    leaf = logits.clone().requires_grad_()
    sum(logprob_stats(leaf, labels, ignore_index=ignore_index, impl=impl)).sum().backward()
    assert all(((value == 0) == (labels == ignore_index)).all() for value in got)
    assert ((leaf.grad == 0).all(-1) == (labels == ignore_index)).all()


VIEWS = {
    "slice of time": lambda x: x[:, :-1],
    "slice of the vocabulary": lambda x: x[..., 3:1030],
    "time first": lambda x: x.transpose(0, 1),
    "every other": lambda x: x[::2, ::2],
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "repeated": lambda x: x[:1].expand(3, 5, 1040),
    "one row": lambda x: x[0, 0],
    "no two strides": lambda x: x.view(3, 5, 2, 520).transpose(0, 2),
}


@both
@pytest.mark.parametrize("name", VIEWS)
def test_strides_do_not_matter(impl, name):
    whole, view = random_rows(3, 5, 1040)[0], VIEWS[name]
    labels = torch.randint(view(whole).shape[-1], view(whole).shape[:-1], device=DEVICE)
    temperature = torch.rand(labels.shape, device=DEVICE) + 0.5
    factors = torch.randn(4, *labels.shape, device=DEVICE).unbind()
    got = logprob_stats(view(whole), labels, temperature, impl=impl)
    assert_close(got, logprob_stats_reference(view(whole), labels, temperature))
    gradient = gradients(lambda x, *a: logprob_stats(view(x), *a, impl=impl), whole, labels, temperature, factors)
    true = gradients(lambda x, *a: logprob_stats_reference(view(x), *a), whole.double(), labels, temperature, factors)
    assert_gradient_close(gradient, true)


@both
def test_strides_of_labels_temperature_and_gradient_do_not_matter(impl):
    logits, labels = random_rows(10, 1003)
    labels[:] = labels[0]
    temperature, factors = torch.rand(20, device=DEVICE) + 0.5, torch.randn(4, 20, device=DEVICE)
    for index, t, f in (
        (labels[:1].expand(10), temperature[:1].expand(10), factors[:, :1].expand(4, 10)),
        (labels.repeat_interleave(2)[::2], temperature[::2], factors[:, ::2]),
    ):
        got = logprob_stats(logits, index, t, impl=impl)
        assert_close(got, logprob_stats_reference(logits, index, t))
        gradient = gradients(lambda *a: logprob_stats(*a, impl=impl), logits, index, t, f)
        assert_gradient_close(gradient, gradients(logprob_stats_reference, logits.double(), index, t, f))


def test_only_strides_that_allow_no_view_are_copied():
    x = torch.randn(3, 5, 7, 16)
    for view in (x, x[:, 0], x[:, :-1, 0], x[..., :9], x[0, 0, 0]):
        rows = as_rows(view)
        assert rows.data_ptr() == view.data_ptr()
        assert rows.shape == (*rows.shape[:2], view.shape[-1])
        assert torch.equal(rows.flatten(), view.flatten())
    for view in (x[:, ::2, :-1], x.transpose(-1, -2)):
        assert as_rows(view).data_ptr() != view.data_ptr()


@both
def test_offsets_beyond_two_to_the_31(impl):
    """Two rows 2^31 logits apart, in memory that is asked for but hardly touched."""
    vocab, far = 1003, 2**31 + 16
    memory = torch.empty(far + vocab, dtype=torch.bfloat16, device=DEVICE)
    logits = memory.as_strided((2, vocab), (far, 1))
    near, labels = random_rows(2, vocab, dtype=torch.bfloat16)
    logits.copy_(near)
    got, expected = logprob_stats(logits, labels, impl=impl), logprob_stats(near, labels, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@both
def test_what_is_not_asked_for_is_none_and_changes_nothing(impl):
    logits, labels = random_rows(2, 3, 1003)
    everything = logprob_stats(logits, labels, impl=impl)
    for names in ([], ["log_prob"], ["entropy"], ["sum_p_squared"], ("log_prob", "grad_norm_squared"), set(NAMES)):
        some = logprob_stats(logits, labels, outputs=names, impl=impl)
        assert {name for name in NAMES if getattr(some, name) is not None} == set(names)
        assert all(torch.equal(getattr(some, name), getattr(everything, name)) for name in names)
    leaf = logits.clone().requires_grad_()
    logprob_stats(leaf, labels, outputs=["grad_norm_squared"], impl=impl).grad_norm_squared.sum().backward()
    true = gradients(logprob_stats_reference, logits.double(), labels, 1.0, [None, None, None, 1.0])
    assert_gradient_close(leaf.grad, true)


@both
def test_runs_are_bit_equal(impl):
    logits, labels = random_rows(3, 4112, dtype=torch.bfloat16)
    first, second = (logprob_stats(logits, labels, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@both
@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7)])
def test_no_rows(impl, shape):
    logits = torch.empty(shape, device=DEVICE, requires_grad=True)
    stats = logprob_stats(logits, torch.empty(shape[:-1], dtype=torch.long, device=DEVICE), impl=impl)
    assert all(value.shape == shape[:-1] for value in stats)
    sum(stats).sum().backward()
    assert logits.grad.shape == shape


@runs_triton
@pytest.mark.parametrize("splits", [2, 3, 5, 64])
def test_slices_of_the_vocabulary_merge_to_the_whole(splits):
    from snr_kernels.logprob_stats import _triton as logprob_stats_triton

    logits, labels = random_rows(1, 3, 151_936 // 4)
    logits[0, 0, labels[0, 0]] = 25.0
    logits[0, 1, :20_000] = -math.inf  # slices with nothing in them
    labels[0, 1] = 20_001
    got = torch.empty(7, 3, device=DEVICE)
    arguments = (logits, labels[0], torch.ones((), device=DEVICE), -100, got, True, True)
    logprob_stats_triton.forward(*arguments, splits=splits)
    assert_close(got[:4], [value[0] for value in logprob_stats_reference(logits, labels)])


@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
def test_nothing_waits_for_the_gpu_and_a_graph_can_be_captured():
    logits, labels = random_rows(64, 4112, dtype=torch.bfloat16)
    labels[::3] = -100
    leaf = logits.clone().requires_grad_()

    def step():
        leaf.grad = None
        loss(logprob_stats(leaf, labels, 0.7)).backward()

    step()
    expected = leaf.grad.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
def test_what_a_launch_is_chosen_by(monkeypatch):
    from snr_kernels.logprob_stats import _triton as kernels

    x = torch.empty(4, 8, 64, dtype=torch.bfloat16)
    assert kernels.is_aligned(x)
    assert kernels.is_aligned(x[:, :-1])
    assert not any(
        map(kernels.is_aligned, (x[..., 1:], x[..., :63], torch.empty(1, 2, 63), x.view(1, 32, 64)[..., 3:51]))
    )

    class H200:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H200)
    splits = [kernels.choose_splits(rows, 151_936, 2048, torch.device("cuda")) for rows in (1, 64, 1000, 4224, 8192)]
    assert splits == [37, 37, 5, 1, 1]  # no slice under two blocks; one where the rows are enough
    assert kernels.choose_splits(1, 1000, 2048, torch.device("cuda")) == 1


# ------------------------------------------------------------------------- the torch path, and what torch makes of ops
@settings(max_examples=60, deadline=None)
@given(
    vocab=st.integers(2, 40),
    rows=st.integers(1, 9),
    chunk=st.integers(1, 200),
    spread=st.sampled_from([0.1, 3.0, 30.0]),
    shift=st.floats(-50, 50),
    seed=st.integers(0, 2**31),
)
def test_invariances(vocab, rows, chunk, spread, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprob_stats_torch, "CHUNK", chunk)
        stats = logprob_stats(logits, labels)
    order = torch.randperm(vocab, generator=generator)
    moved = logprob_stats(logits[:, order] + shift, order.argsort()[labels])
    for name, a, b in zip(NAMES, stats, moved, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name
    log_p, entropy, s2, w = stats
    assert (log_p <= 0).all()
    assert ((entropy >= -1e-12) & (entropy <= math.log(vocab) + 1e-9)).all()
    assert ((s2 > 0) & (s2 <= 1 + 1e-12)).all()
    assert ((w >= 0) & (w <= 2 + 1e-12)).all()
    assert torch.allclose(w, 1 - 2 * log_p.exp() + s2, atol=1e-10)


def test_gradcheck():
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (2, 3))
    temperature = torch.rand(2, 3, dtype=torch.float64) + 0.5
    assert torch.autograd.gradcheck(lambda x: tuple(logprob_stats(x, labels, temperature)), logits)
    assert torch.autograd.gradgradcheck(lambda x: tuple(logprob_stats_reference(x, labels, temperature)), logits)


def test_the_reference_is_the_gradient_norm():
    logits, labels = torch.randn(5, 11, dtype=torch.float64), torch.randint(11, (5,))
    rows = torch.func.vmap(torch.func.grad(lambda x, y: x.log_softmax(-1).gather(-1, y[None]).sum()))(logits, labels)
    norms = logprob_stats_reference(logits, labels).grad_norm_squared
    assert torch.allclose(rows.square().sum(-1), norms, rtol=1e-12)


class Largest(TorchDispatchMode):
    """The most float32 elements of any tensor made: two buffers of a chunk, made together."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.elements = max(self.elements, out.numel())
        return out


def test_many_short_slices_are_one_chunk():
    logits = torch.randn(32, 6, 15)[:, :-1]
    [(where, some)] = logprob_stats_torch.row_chunks(logits)
    assert where == slice(0, 160)
    assert some.shape == logits.shape


@pytest.mark.parametrize("chunk", [1, 14, 15, 31, 60, 200])
def test_chunks_cover_every_row_once(chunk, monkeypatch):
    monkeypatch.setattr(logprob_stats_torch, "CHUNK", chunk)
    logits = torch.randn(5, 5, 15)[:, :-1]
    found = list(logprob_stats_torch.row_chunks(logits))
    assert torch.equal(torch.cat([some.flatten(0, 1) for _, some in found]), logits.flatten(0, 1))
    assert [row for where, _ in found for row in range(where.start, where.stop)] == list(range(20))


@pytest.mark.parametrize("rows", [16, 64])
def test_no_float32_copy_of_the_logits(rows):
    vocab = 151_936
    logits, labels = torch.randn(rows, vocab).bfloat16(), torch.randint(vocab, (rows,))
    arguments = (logits[None], labels, torch.ones(()), -100)
    results = torch.empty(7, rows)
    with Largest() as seen:
        logprob_stats_torch.forward(*arguments, results, True, True)
        logprob_stats_torch.backward(*arguments, results, (torch.ones(rows),) * 4)
    assert vocab <= seen.elements <= 2 * logprob_stats_torch.CHUNK < logits.numel() * (1 + (rows < 20))


def test_opcheck():
    logits, labels = torch.randn(2, 3, 11, requires_grad=True), torch.randint(11, (2, 3))
    temperature, op = torch.rand(2, 3) + 0.5, torch.ops.snr_kernels.logprob_stats.default
    for entropy, squares in ((True, True), (False, False), (True, False)):
        torch.library.opcheck(op, (logits, labels, temperature, -100, entropy, squares, "auto"))
    results = [x.detach() for x in op(logits, labels, temperature, -100, True, True, "auto")]
    gradient, op = torch.randn(2, 3), torch.ops.snr_kernels.logprob_stats_backward.default
    arguments = (logits.detach(), labels, temperature, -100, results, [gradient, None, gradient, None], "auto")
    torch.library.opcheck(op, arguments)


def loss(stats):
    return (stats.log_prob + 0.3 * stats.entropy - 0.2 * stats.sum_p_squared + 0.1 * stats.grad_norm_squared).sum()


def test_torch_compile_in_one_graph():
    logits, labels = random_rows(2, 3, 101)
    compiled = torch.compile(lambda x, y, t: loss(logprob_stats(x, y, t)), fullgraph=True)
    for temperature in (1.0, 0.7, torch.rand(2, 3, device=DEVICE) + 0.5):
        leaf = logits.clone().requires_grad_()
        value = compiled(leaf, labels, temperature)
        value.backward()
        true = gradients(logprob_stats_reference, logits.double(), labels, temperature, [1.0, 0.3, -0.2, 0.1])
        assert value.item() == pytest.approx(loss(logprob_stats_reference(logits, labels, temperature)).item(), 1e-5)
        assert torch.allclose(leaf.grad.double(), true, rtol=1e-4, atol=1e-7)


def test_torch_func():
    logits, labels = torch.randn(4, 3, 11, dtype=torch.float64), torch.randint(11, (4, 3))
    temperature = torch.rand(4, dtype=torch.float64) + 0.5

    def ours(x, y, t):
        return loss(logprob_stats(x, y, t))

    def true(x, y, t):
        return loss(logprob_stats_reference(x, y, t))

    func = torch.func
    for transform in (
        lambda f: func.grad(f)(logits, labels, 0.7),
        lambda f: func.vmap(f)(logits, labels, temperature),
        lambda f: func.vmap(f, in_dims=(1, None, None))(logits.transpose(0, 1), labels[0], temperature[0]),
        lambda f: func.vmap(f, in_dims=(None, 0, None))(logits[0], labels, temperature[0]),
        lambda f: func.vmap(func.grad(f))(logits, labels, temperature),
        lambda f: func.grad(lambda x: func.vmap(f)(x, labels, temperature).square().sum())(logits),
        lambda f: func.jacrev(lambda x: func.vmap(f)(x, labels, temperature))(logits),
    ):
        assert torch.allclose(transform(ours), transform(true), rtol=1e-9)


def test_differentiated_twice_it_says_so():
    logits = torch.randn(3, 5, requires_grad=True)
    first = torch.autograd.grad(logprob_stats(logits, torch.zeros(3).long()).entropy.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="logprob_stats_reference"):
        first[0].sum().backward()


def test_cost_counts_every_logit_once():
    one, two = (logprob_stats_cost(rows, 1000, torch.bfloat16) for rows in (1, 2))
    assert two.bytes == 2 * one.bytes
    assert 0 <= one.bytes - 2 * 1000 <= 64
    assert 0 <= logprob_stats_cost(1, 1000, torch.float32, backward=True).bytes - 8 * 1000 <= 64
    assert logprob_stats_cost(1, 1000, torch.bfloat16, outputs=["log_prob"]).flops < one.flops


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"logits": torch.ones(2, 3, dtype=torch.long)}, TypeError, "logits"),
        ({"labels": torch.zeros(2)}, TypeError, "labels"),
        ({"labels": torch.zeros(2, dtype=torch.bool)}, TypeError, "labels"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, r"\[2, 3\] and \[3\]"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "labels.*device"),
        ({"logits": torch.ones(2, 0)}, ValueError, "logits"),
        ({"logits": torch.ones(()), "labels": torch.tensor(0)}, ValueError, "logits"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"temperature": 1e-46}, ValueError, "temperature"),
        ({"temperature": 1e39}, ValueError, "temperature"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature"),
        ({"temperature": torch.ones(2, device="meta")}, ValueError, "temperature.*device"),
        ({"temperature": torch.ones(2, requires_grad=True)}, ValueError, "temperature.*gradient"),
        ({"outputs": ["log_probs"]}, ValueError, "outputs.*log_probs"),
        ({"outputs": "log_prob"}, ValueError, "outputs"),
        ({"impl": "cuda"}, ValueError, "impl"),
        ({"impl": "triton", "logits": torch.ones(2, 3, dtype=torch.float64)}, ValueError, "impl.*triton"),
    ],
)
def test_bad_input_is_named(change, error, names):
    arguments = {"logits": torch.ones(2, 3), "labels": torch.zeros(2, dtype=torch.long), **change}
    with pytest.raises(error, match=names):
        logprob_stats(**arguments)
