"""The same answers on an accelerator as on the CPU; left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snr_kernels.linear_grad_norms import linear_grad_norms, linear_grad_norms_reference
from snr_kernels.lm_head import (
    head_grad_norms,
    head_grad_norms_reference,
    linear_logprob_stats,
    linear_logprob_stats_reference,
)
from snr_kernels.norm_embedding_grad_norms import (
    embedding_grad_norms,
    embedding_grad_norms_reference,
    normalization_grad_norms,
    normalization_grad_norms_reference,
)
from snr_kernels.segments import Segments
from snr_optim import (
    GradientMoments,
    GradWeightedBaseline,
    PerSampleGradNorms,
    SNRAdaptiveLR,
    logit_grad_norms,
    model_logprob_stats,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_baseline_and_norms_equal_the_cpu():
    rewards, weights, ids = torch.rand(64), torch.rand(64), torch.randint(9, (64,))
    logits, labels = torch.randn(64, 101), torch.randint(101, (64,))
    baseline = GradWeightedBaseline("shrink")
    expected, norms = baseline(rewards, weights, ids), logit_grad_norms(logits, labels)
    assert torch.allclose(baseline(rewards.cuda(), weights.cuda(), ids.cuda()).cpu(), expected)
    assert torch.allclose(logit_grad_norms(logits.cuda(), labels.cuda()).cpu(), norms, rtol=1e-5)


def test_a_baseline_learns_the_same_and_follows_its_batches():
    on_cpu, moving = GradWeightedBaseline(), GradWeightedBaseline()
    ids = torch.arange(16).repeat_interleave(4)
    for device in ("cpu", "cuda", "cuda", "cpu"):
        rewards, weights = torch.rand(64).round(), torch.rand(64)
        expected = on_cpu.advantages(rewards, weights, prompts=ids, update=True)
        got = moving.advantages(rewards.to(device), weights.to(device), prompts=ids, update=True)  # ids stay on the CPU
        assert torch.allclose(got.cpu(), expected, atol=1e-6)
    assert moving.metrics() == pytest.approx(on_cpu.metrics(), nan_ok=True)
    to_go, cumulative = torch.rand(64, 300), torch.rand(64, 300)
    for scope in ("group", "batch", "shrink"):
        baseline = GradWeightedBaseline(scope)
        assert torch.allclose(baseline(to_go.cuda(), cumulative.cuda(), 4).cpu(), baseline(to_go, cumulative, 4))


@pytest.mark.parametrize("norm", ["euclidean", "adam"])
def test_an_attached_step_with_a_tensor_lr_waits_for_nothing(norm):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).cuda()
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=True)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, norm=norm)
    handle = scheduler.attach(model)

    def step():
        for _ in range(4):
            model(torch.randn(4, 8, device="cuda")).mean().mul(0.25).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    for _ in range(2):
        step()  # states are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert handle.moments.num_sub_batches == 4
    assert lr.item() == pytest.approx(1e-3 * scheduler.factor)


def test_moments_on_the_device_equal_those_on_the_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs, moments = torch.randn(4, 5, 8), []
    for device in ("cpu", "cuda"):
        model.to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with SNRAdaptiveLR(optimizer).attach(model) as handle:
            for x in inputs.to(device):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        moments.append(handle.moments)
    assert isinstance(moments[0], GradientMoments)
    assert float(moments[1].sq_norm_of_mean) == pytest.approx(float(moments[0].sq_norm_of_mean), rel=1e-4)
    assert float(moments[1].mean_of_sq_norms) == pytest.approx(float(moments[0].mean_of_sq_norms), rel=1e-4)


def packed_on_the_device(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["gram", "direct", "auto"])
def test_linear_norms_of_real_sizes_equal_the_reference(dtype, method):
    """Few and many tiles, Qwen3-4B's key and down projections, an odd layer, LoRA; 10^4 products on tensor cores."""
    cu_seqlens = packed_on_the_device([1000, 0, 1, 4000, 129, 257])
    for d_in, d_out in ((2560, 1024), (9728, 2560), (999, 1001), (4096, 8)):
        a, g = (torch.randn(5387, width, device="cuda").to(dtype) for width in (d_in, d_out))
        got = linear_grad_norms(a, g, cu_seqlens, method, bias=True)
        assert torch.equal(got, linear_grad_norms(a, g, cu_seqlens, method, bias=True))
        true = linear_grad_norms_reference(a, g, cu_seqlens, bias=True)
        assert ((got.double() - true).abs() <= 1e-4 * true).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 128, 2560, 4096, 8192])
def test_norms_of_norms_of_real_sizes_equal_the_reference(dtype, width):
    cu_seqlens = packed_on_the_device([1000, 0, 1, 4000, 129])
    x, g = (torch.randn(5130, width, device="cuda").to(dtype) for _ in range(2))
    got = normalization_grad_norms(x, g, cu_seqlens, 1e-6, center=True, bias=True)
    true = normalization_grad_norms_reference(x, g, cu_seqlens, 1e-6, center=True, bias=True)
    assert ((got.double() - true).abs() <= 1e-4 * true).all()


@pytest.mark.parametrize("vocabulary", [3, 500, 151_936])
def test_embedding_norms_of_real_sizes_equal_the_reference(vocabulary):
    cu_seqlens = packed_on_the_device([1000, 0, 1, 4000, 129])
    ids, g = torch.randint(vocabulary, (5130,), device="cuda"), torch.randn(5130, 2560, device="cuda").bfloat16()
    got = embedding_grad_norms(ids, g, cu_seqlens, padding_idx=0)
    assert torch.equal(got, embedding_grad_norms(ids, g, cu_seqlens, padding_idx=0))
    true = embedding_grad_norms_reference(ids, g, cu_seqlens, padding_idx=0)
    assert ((got.double() - true).abs() <= 1e-4 * true).all()


def test_norms_of_known_segments_wait_for_nothing():
    segments = Segments.of(packed_on_the_device([100, 0, 3, 500]))
    x, g = (torch.randn(603, 64, device="cuda").bfloat16() for _ in range(2))
    ids = torch.randint(9, (603,), device="cuda")

    def norms():
        yield linear_grad_norms(x, [g, x], segments, "gram", bias=True)
        yield linear_grad_norms(x, [g, x], segments, "direct", bias=True)
        yield normalization_grad_norms(x, g, segments, 1e-6, bias=True)
        yield embedding_grad_norms(ids, g, segments, padding_idx=0)

    expected = list(norms())  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(norms())
        fresh = linear_grad_norms(x, g, Segments(segments.bounds, segments.cu_seqlens))  # its programs are counted anew
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert fresh.shape == (4,)


def test_linear_norms_keep_no_matrix_of_tokens_and_no_gradient():
    a, g = (torch.randn(16_384, 1024, device="cuda").bfloat16() for _ in range(2))
    segments = Segments.of(packed_on_the_device([16_384]))
    for method in ("gram", "direct"):
        linear_grad_norms(a, g, segments, method)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_grad_norms(a, g, segments, method)
        assert torch.cuda.max_memory_allocated() - before < 4 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_norms_of_a_language_model(dtype, method):
    from language_models import language_model, log_prob_sum, padded_batch

    batch = padded_batch((7, 3, 6, 4, 9))
    on_cpu = PerSampleGradNorms(language_model("qwen3").to(dtype).double())
    with on_cpu.sequences(batch_size=5):
        log_prob_sum(on_cpu._model, batch).backward()
    model = language_model("qwen3").to("cuda", dtype)
    norms = PerSampleGradNorms(model, method, check="never")  # short sequences: sketches are exact
    there = {name: value.cuda() for name, value in batch.items()}

    def run():
        loss = log_prob_sum(model, there)
        torch.cuda.set_sync_debug_mode("error")  # nothing between the gradients and the norms waits
        try:
            with norms.sequences(batch_size=5):
                loss.backward()
            return norms._result[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    run()
    rtol = 1e-3 if dtype == torch.float32 else 0.1
    assert torch.allclose(run().cpu().double(), on_cpu.squared(), rtol=rtol)


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_head_statistics_of_real_sizes_equal_the_reference(logits_dtype):
    """Qwen3's vocabulary in bfloat16: rounded logits as a model has them, or not; gradients are bfloat16."""
    hidden = torch.randn(600, 1024, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(151_936, 1024, device="cuda") / 16).bfloat16().requires_grad_()
    labels, factors = torch.randint(151_936, (600,), device="cuda"), torch.randn(4, 600, device="cuda")
    stats = linear_logprob_stats(hidden, weight, labels, 0.7, slab_bytes=1 << 24, logits_dtype=logits_dtype)
    found = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, stats, strict=True)), (hidden, weight))
    true = linear_logprob_stats_reference(hidden, weight, labels, 0.7)
    expected = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, true, strict=True)), (hidden, weight))
    tolerance = 1e-4 if logits_dtype == torch.float32 else 2e-2
    for a, b in zip(stats, true, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 2e-2 * b.double().norm()


def test_head_statistics_keep_to_the_slab_and_wait_for_nothing():
    hidden = torch.randn(4096, 512, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(100_000, 512, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(100_000, (4096,), device="cuda")
    slab = 64 << 20  # logits: 819 MB

    def step():
        stats = linear_logprob_stats(hidden, weight, labels, slab_bytes=slab)
        sum(x.sum() for x in stats).backward()
        hidden.grad = weight.grad = None

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # gradients, those of the hidden states in float32 and once more as a product
    most = slab + weight.nbytes + 5 * hidden.nbytes + (8 << 20)
    assert torch.cuda.max_memory_allocated() - before < most


def test_head_norms_on_the_device_equal_the_reference():
    hidden, weight = torch.randn(300, 64, device="cuda"), torch.randn(20_000, 64, device="cuda")
    labels, cu_seqlens = torch.randint(20_000, (300,), device="cuda"), packed_on_the_device([100, 0, 1, 199])
    got = head_grad_norms(hidden, weight, labels, cu_seqlens, slab_bytes=1 << 20)
    true = head_grad_norms_reference(hidden.cpu(), weight.cpu(), labels.cpu(), cu_seqlens.cpu())
    for a, b in zip(got, true, strict=True):
        assert torch.allclose(a.cpu().double(), b, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_a_language_model_without_its_logits(name):
    from language_models import language_model, padded_batch

    batch = padded_batch((7, 3, 6))
    model = language_model(name)
    expected = model_logprob_stats(model, labels=batch["input_ids"], **batch)
    there = {key: value.cuda() for key, value in batch.items()}
    got = model_logprob_stats(model.cuda(), labels=there["input_ids"], **there)
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-3, atol=1e-4)
