"""`head_grad_norms` against autograd, one log-prob after another, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.harness import peak_memory
from snr_kernels.lm_head import HeadGradNorms, head_grad_norms, head_grad_norms_reference, linear_logprob_stats
from snr_kernels.segments import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 0, 1, 7, 0]
ROWS = sum(LENGTHS)


def random_sequences(dtype=torch.float64, vocab=1500, bias=False):
    hidden = torch.randn(ROWS, 8, device=DEVICE, dtype=dtype)
    weight = torch.randn(vocab, 8, device=DEVICE, dtype=dtype)
    b = torch.randn(vocab, device=DEVICE, dtype=dtype) if bias else None
    labels = torch.randint(vocab, (ROWS,), device=DEVICE)
    return hidden, weight, labels, torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0), b


def assert_close(got, true, tolerance):
    for a, b in zip(got, true, strict=True):
        assert ((a.double() - b).abs() <= tolerance * b).all(), (a, b)


@pytest.mark.parametrize("method", ["gram", "direct", "auto"])
@pytest.mark.parametrize(("softcap", "scale", "bias"), [(None, 1.0, False), (None, 0.3, True), (4.0, 1.7, True)])
def test_equals_autograd(method, softcap, scale, bias):
    hidden, weight, labels, cu_seqlens, b = random_sequences(bias=bias)
    temperature = torch.rand(ROWS, device=DEVICE, dtype=torch.float64) + 0.5
    options = {"softcap": softcap, "scale": scale}
    true = head_grad_norms_reference(hidden, weight, labels, cu_seqlens, temperature, b, **options)
    for slab_bytes in (2 * ROWS * 8 * 64 * (1 + bool(softcap)), 1 << 24):  # 128 columns, and all
        got = head_grad_norms(
            hidden, weight, labels, cu_seqlens, temperature, b, method=method, slab_bytes=slab_bytes, **options
        )
        assert_close(got, true, 1e-9)
        assert all((x[[1, 4]] == 0).all() for x in got)


def test_float32_and_bfloat16():
    hidden, weight, labels, cu_seqlens, _ = random_sequences()
    true = head_grad_norms_reference(hidden, weight, labels, cu_seqlens)
    assert_close(head_grad_norms(hidden.float(), weight.float(), labels, cu_seqlens), true, 1e-5)
    low = hidden.bfloat16(), weight.bfloat16()
    true = head_grad_norms_reference(*low, labels, cu_seqlens)
    assert_close(head_grad_norms(*low, labels, cu_seqlens, logits_dtype=torch.float32), true, 2e-2)


def test_the_sum_over_tokens_is_the_stand_in_of_the_weights():
    hidden, weight, labels, cu_seqlens, _ = random_sequences()
    w = linear_logprob_stats(hidden, weight, labels).grad_norm_squared
    by_hand = [x.sum() for x in (w * hidden.square().sum(-1)).split(LENGTHS)]
    torch.testing.assert_close(head_grad_norms(hidden, weight, labels, cu_seqlens).head_per_token, torch.stack(by_hand))


def test_outputs_and_segments():
    hidden, weight, labels, cu_seqlens, _ = random_sequences()
    whole = head_grad_norms(hidden, weight, labels, Segments.of(cu_seqlens))
    for name in HeadGradNorms._fields:
        some = head_grad_norms(hidden, weight, labels, cu_seqlens, outputs=[name])
        assert [x is not None for x in some] == [other == name for other in HeadGradNorms._fields]
        assert torch.equal(getattr(some, name), getattr(whole, name))


def test_tokens_left_out_and_tokens_without_an_answer():
    hidden, weight, labels, cu_seqlens, _ = random_sequences()
    labels[0] = -100  # of sequence 0
    labels[3] = 1500  # the only one of sequence 2
    got = head_grad_norms(hidden, weight, labels, cu_seqlens)
    true = head_grad_norms_reference(hidden[1:3], weight, labels[1:3], torch.tensor([0, 2]))
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a[:1], b)
        assert a[2].isnan()
        assert a[[1, 3, 4]].isfinite().all()


def test_no_logits_and_no_weight_gradients():
    rows, width, vocab, slab = 512, 32, 32_768, 1 << 23
    hidden, weight = torch.randn(rows, width, device=DEVICE), torch.randn(vocab, width, device=DEVICE)
    labels, cu_seqlens = torch.randint(vocab, (rows,), device=DEVICE), 128 * torch.arange(5, device=DEVICE)
    call = lambda: head_grad_norms(hidden, weight, labels, cu_seqlens, slab_bytes=slab)  # noqa: E731
    call()
    peaks = [peak_memory(call, torch.device(DEVICE)) for _ in range(4)]
    if None in peaks:
        pytest.skip("the system does not tell")
    assert min(peaks) < rows * vocab * 4 / 2  # 8 MB are the slab, 8 of `logprob_stats_torch`


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"cu_seqlens": torch.tensor([0, 3])}, ValueError, "hidden: expected .* with N = 3, the end of cu_seqlens"),
        ({"hidden": torch.zeros(2, 1, 4)}, ValueError, r"hidden: expected \[N, d\]"),
        ({"slab_bytes": 100}, ValueError, "slab_bytes: expected 40 or more|slab_bytes: expected 512 or more"),
        ({"outputs": ["norm"]}, ValueError, "outputs: expected some of"),
        ({"method": "fast"}, ValueError, "method: expected"),
        ({"temperature": math.inf}, ValueError, "temperature: expected"),
    ],
)
def test_bad_input_is_named(change, error, names):
    arguments = {
        "hidden": torch.zeros(2, 4), "weight": torch.zeros(90, 4), "labels": torch.zeros(2, dtype=torch.long),
        "cu_seqlens": torch.tensor([0, 2]),
    }  # fmt: skip
    with pytest.raises(error, match=names):
        head_grad_norms(**(arguments | change))
