"""Hooks of others on the parameters that are measured: whatever is added to ``.grad`` counts, or the batch does not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from snr_optim import AccumulationSource, GradientMoments, SNRAdaptiveLR
from snr_optim.noise.hooks import GradientHook, PostAccumulateGuard

INPUTS = (0.5, 3.0, 0.8, 2.0)


class Parts(nn.Module):
    """Two parameters with the gradients ``x`` and ``-2 x``; which of them comes first is not said."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(2))

    def forward(self, x):
        return self.a * x - 2 * self.b * x


def run(source, model, inputs=INPUTS):
    for x in inputs:
        model(x).backward()
    moments = source.moments()
    model.zero_grad()
    return moments


def of(*columns):
    """Moments of gradients whose entries are these columns, one number for each sub-batch, times their number."""
    rows = torch.tensor(columns, dtype=torch.float64).T * len(columns[0])
    return GradientMoments.from_gradients(list(rows))


def assert_equal(moments, expected):
    assert float(moments.sq_norm_of_mean) == pytest.approx(expected.sq_norm_of_mean, rel=1e-6)  # norms of float32
    assert float(moments.mean_of_sq_norms) == pytest.approx(expected.mean_of_sq_norms, rel=1e-6)


def clip(gradient):
    return gradient.clamp(-1.0, 1.0)


def spike_guard(gradient):
    return torch.zeros_like(gradient) if gradient.abs().max() > 2.5 else gradient


@pytest.mark.parametrize("hook", [clip, spike_guard])
@pytest.mark.parametrize("when", ["before", "after", "between batches", "twice"])
def test_what_tensor_hooks_leave_is_measured_whenever_they_were_registered(hook, when):
    model = Parts()
    parameters = list(model.parameters())
    if when == "before":
        for p in parameters:
            p.register_hook(hook)
    source = AccumulationSource(model)
    if when == "between batches":
        run(source, model)
    if when != "before":
        for p in parameters:
            p.register_hook(hook)
    if when == "twice":
        run(source, model)
        for p in parameters:
            p.register_hook(lambda gradient: -0.5 * gradient)

    def left(gradient):
        gradient = hook(torch.tensor([gradient], dtype=torch.float64)).item()
        return -0.5 * gradient if when == "twice" else gradient

    with warnings.catch_warnings():  # the first gradient to arrive is seen before new hooks are: it may not count
        warnings.simplefilter("ignore")
        run(source, model)
    moments = run(source, model)
    assert_equal(moments, of([left(x) for x in INPUTS], [left(-2 * x) for x in INPUTS]))


def test_the_first_gradient_after_a_new_hook_is_compared_with_grad_or_not_counted():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)
    ones = torch.ones(1, 1)
    model.weight.register_hook(clip)
    model(3 * ones).sum().backward()  # changed at once, which .grad shows
    with pytest.warns(UserWarning, match="counts as invalid"):
        assert torch.as_tensor(source.moments().mean_of_sq_norms).isnan()
    model.zero_grad()
    (0.5 * model(ones)).sum().backward()
    model.weight.register_hook(lambda gradient: gradient / 2)
    model(ones).sum().backward()  # a later sub-batch, for which .grad shows nothing
    assert torch.as_tensor(source.moments().mean_of_sq_norms).isnan()
    model.zero_grad()
    for x in (ones, 3 * ones):
        model(x).sum().backward()
    assert float(source.moments().mean_of_sq_norms) == 2 * (0.5**2 + 0.5**2)


def look(p):
    p.grad.norm()


def write_the_same(p):
    """As ``clip_grad_norm_`` does where nothing is to be clipped."""
    p.grad.mul_(1.0)


@pytest.mark.parametrize("attached_first", [True, False])
def test_hooks_that_only_look_are_welcome(attached_first):
    model, seen = Parts(), []
    source = AccumulationSource(model) if attached_first else None
    for p in model.parameters():
        p.register_hook(lambda gradient: seen.append(gradient.norm()))
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
        p.register_post_accumulate_grad_hook(write_the_same)
    source = source or AccumulationSource(model)
    for _ in range(2):
        assert_equal(run(source, model), of(INPUTS, [-2 * x for x in INPUTS]))
    assert seen


@pytest.mark.parametrize("change", [lambda g: g.clamp_(-2, 2), lambda g: g.data.clamp_(-2, 2), lambda g: g.zero_()])
@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("after_batches", [0, 1])
def test_post_accumulate_hooks_that_change_grad_make_a_batch_invalid(change, attached_first, after_batches):
    model = Parts()
    source = AccumulationSource(model) if attached_first else None

    def hook(p):
        change(p.grad)

    handles = []
    if not after_batches:
        handles = [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    source = source or AccumulationSource(model)
    for _ in range(after_batches):
        assert_equal(run(source, model), of(INPUTS, [-2 * x for x in INPUTS]))
    handles = handles or [p.register_post_accumulate_grad_hook(hook) for p in model.parameters()]
    with pytest.warns(UserWarning, match="counts as invalid"):
        assert torch.as_tensor(run(source, model).mean_of_sq_norms).isnan()
    for handle in handles:
        handle.remove()
    assert_equal(run(source, model), of(INPUTS, [-2 * x for x in INPUTS]))


@pytest.mark.parametrize("which", ["first", "last", "all"])
def test_gradients_that_are_freed_while_backward_runs_make_a_batch_invalid(which):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer)
    scheduler.attach(model)
    for p in {"first": model[0], "last": model[2], "all": model}[which].parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    for _ in range(3):
        model(torch.randn(3, 4)).square().mean().backward()
    with pytest.warns(UserWarning, match="gone"):
        optimizer.step()
    assert scheduler.metrics()["skipped_invalid"] == 1
    assert scheduler.factor == 1.0


def test_two_sources_on_one_model_do_not_disturb_each_other():
    model = Parts()
    sources = [AccumulationSource(model), AccumulationSource(model)]
    model.a.register_post_accumulate_grad_hook(look)
    model.a.register_hook(clip)
    for _ in range(3):
        for x in INPUTS:
            model(x).backward()
        found = [source.moments() for source in sources]
        model.zero_grad()
    for moments in found:
        assert_equal(moments, of([min(x, 1.0) for x in INPUTS], [-2 * x for x in INPUTS]))


def test_removed_sources_leave_nothing_on_the_parameters():
    model = Parts()
    source = AccumulationSource(model)
    theirs = model.a.register_post_accumulate_grad_hook(lambda p: None)
    run(source, model)
    hooks = model.a._post_accumulate_grad_hooks.values()
    assert sum(isinstance(getattr(hook, "__self__", None), PostAccumulateGuard) for hook in hooks) == 2
    source.remove()
    assert list(model.a._post_accumulate_grad_hooks) == [theirs.id]
    assert not any(isinstance(hook, GradientHook) for hook in model.a._backward_hooks.values())
