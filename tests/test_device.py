"""The same answers on an accelerator as on the CPU; left out where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snr_optim import AccumulationSource, GradientMoments, GradWeightedBaseline, SNRAdaptiveLR, logit_grad_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_baseline_and_norms_equal_the_cpu():
    rewards, weights, ids = torch.rand(64), torch.rand(64), torch.randint(9, (64,))
    logits, labels = torch.randn(64, 101), torch.randint(101, (64,))
    baseline = GradWeightedBaseline("shrink")
    expected, norms = baseline(rewards, weights, ids), logit_grad_norms(logits, labels)
    assert torch.allclose(baseline(rewards.cuda(), weights.cuda(), ids.cuda()).cpu(), expected)
    assert torch.allclose(logit_grad_norms(logits.cuda(), labels.cuda()).cpu(), norms, rtol=1e-5)


def test_observing_with_a_tensor_lr_waits_for_nothing():
    model = nn.Linear(8, 1).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1.0, device="cuda"), capturable=True)
    scheduler, source = SNRAdaptiveLR(optimizer, smoothing=0.0), AccumulationSource(model)
    scheduler.observe(GradientMoments(torch.ones((), device="cuda"), torch.ones((), device="cuda"), 2))
    for _ in range(2):
        with source.sub_batch(share=0.5):
            model(torch.randn(4, 8, device="cuda")).mean().mul(0.5).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scheduler.observe(source.moments())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(scheduler.factor)
