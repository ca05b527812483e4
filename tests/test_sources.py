"""Moments caught by hooks against moments of explicit gradients in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from snr_optim import AccumulationSource, GradientMoments


def tied_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 7, bias=False))
    model[4].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    return model.double()


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2, 6]])
@pytest.mark.parametrize("clip", [False, True])
def test_moments_are_those_of_the_raw_gradients(sizes, clip):
    model, total = tied_model(), sum(sizes)
    tokens = torch.randint(7, (total, 4))
    explicit = []
    for part in tokens.split(sizes):
        model.zero_grad()
        (model(part).square().sum() / len(part)).backward()
        explicit.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    expected = GradientMoments.from_gradients(explicit, shares=sizes)

    model.zero_grad()
    source = AccumulationSource(model)
    for part in tokens.split(sizes):
        with source.sub_batch(share=len(part) / total):
            (model(part).square().sum() / total).backward()
    moments = source.moments()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # after: must not matter
    # The same float64 sums in another order.
    assert float(moments.sq_norm_of_mean) == pytest.approx(expected.sq_norm_of_mean, rel=1e-12)
    assert float(moments.mean_of_sq_norms) == pytest.approx(expected.mean_of_sq_norms, rel=1e-12)
    assert moments.num == len(sizes)


def test_bfloat16_gradients_are_measured_in_float32():
    model = nn.Linear(300, 1, bias=False).bfloat16()
    source = AccumulationSource(model)
    for _ in range(2):
        with source.sub_batch(share=0.5):
            model(torch.ones(1, 300, dtype=torch.bfloat16)).sum().mul(0.5).backward()
    assert source.moments().mean_of_sq_norms.item() == pytest.approx(300.0, rel=1e-6)


def test_a_failed_sub_batch_and_a_dropped_batch_leave_the_source_usable():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)
    with pytest.raises(RuntimeError, match="shape"), source.sub_batch(share=1.0):
        model(torch.ones(1, 1)).sum().backward(torch.ones(2))
    with pytest.raises(RuntimeError, match="no gradient"), source.sub_batch(share=1.0):
        pass
    with pytest.raises(RuntimeError, match="no sub-batch"):
        source.moments()
    with source.sub_batch(share=0.5):
        model(torch.ones(1, 1)).sum().backward()
    with pytest.raises(RuntimeError, match=r"sum to 0\.5"):
        source.moments()
    model.zero_grad()
    with source.sub_batch(share=1.0):
        model(torch.ones(1, 1)).sum().backward()
    assert source.moments() == GradientMoments(torch.tensor(1.0), torch.tensor(1.0), 1)
    source.remove()
    model.zero_grad()
    with pytest.raises(RuntimeError, match="no gradient"), source.sub_batch(share=1.0):
        model(torch.ones(1, 1)).sum().backward()


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_bad_shares_are_named(share):
    with pytest.raises(ValueError, match="share"), AccumulationSource(nn.Linear(1, 1)).sub_batch(share):
        pass


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="requires_grad"):
        AccumulationSource(nn.Linear(1, 1).requires_grad_(False))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="several"):
        AccumulationSource(nn.Linear(1, 1))


def test_a_gradient_that_others_changed_is_noticed():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)

    def backward(share):
        with source.sub_batch(share):
            (share * model(torch.ones(1, 1))).sum().backward()

    backward(1.0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.raises(RuntimeError, match="clipping"):
        source.moments()
    with pytest.raises(RuntimeError, match="zero_grad"):
        backward(1.0)
    model.zero_grad(set_to_none=False)
    backward(0.5)
    model(torch.ones(1, 1)).sum().backward()
    with pytest.raises(RuntimeError, match="outside"):
        backward(0.5)
    model.zero_grad()
    backward(1.0)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="zero_grad"):
        source.moments()
    backward(1.0)
    assert source.moments().num == 1


def test_two_backward_passes_in_one_sub_batch_are_refused():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)

    def backward_twice():
        for _ in range(2):
            model(torch.ones(1, 1)).sum().backward()

    with pytest.raises(RuntimeError, match="twice"), source.sub_batch(share=1.0):
        backward_twice()
