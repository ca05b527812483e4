"""The same answers on an accelerator as on the CPU; left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snr_optim import GradientMoments, GradWeightedBaseline, SNRAdaptiveLR, logit_grad_norms

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


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_an_attached_step_with_a_tensor_lr_waits_for_nothing(metric):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).cuda()
    lr = torch.tensor(1e-3, device="cuda")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, capturable=True)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, metric=metric)
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
    assert handle.moments.num == 4
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
