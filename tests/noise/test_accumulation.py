"""Moments caught by hooks against moments of explicit gradients in float64."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from gradients import Blocks, OutOfMemory, explicit_gradients, is_invalid, tied_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snr_optim import AccumulationSource, GradientMoments
from snr_optim.noise import AdamNorm

EXACT = 1e-12  # the same float64 sums in another order


def assert_equal(moments, expected, rel=EXACT):
    assert float(moments.sq_norm_of_mean) == pytest.approx(float(expected.sq_norm_of_mean), rel=rel)
    assert float(moments.mean_of_sq_norms) == pytest.approx(float(expected.mean_of_sq_norms), rel=rel)
    assert moments.num_sub_batches == expected.num_sub_batches


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), unit=st.sampled_from([1.0, 1 / 7]), clip=st.booleans()
)
def test_moments_are_those_of_the_raw_gradients(sizes, unit, clip):
    model, total = tied_model(), sum(sizes)
    parts = torch.randint(7, (total, 4)).split(sizes)
    means = [lambda part=part: model(part).square().sum() / len(part) for part in parts]
    expected = GradientMoments.from_gradients(explicit_gradients(model, means), shares=sizes)
    source = AccumulationSource(model)
    for part in parts:
        with source.sub_batch(size=len(part) * unit):  # in any unit
            (model(part).square().sum() / total).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # after the last backward: must not matter
    assert_equal(source.moments(), expected)


@pytest.mark.parametrize("scale", [1.0, 1 / 4, 1e6])
def test_equal_sub_batches_need_no_word_and_the_factor_no_scale(scale):
    model = tied_model()
    losses = [lambda k=k: model(torch.tensor([[k, k + 1]])).square().sum() for k in range(4)]
    expected = GradientMoments.from_gradients(explicit_gradients(model, losses))
    source = AccumulationSource(model)
    for loss in losses:
        (scale * loss()).backward()
    moments = source.moments()
    assert float(moments.lr_factor) == pytest.approx(expected.lr_factor, rel=EXACT)
    assert float(moments.signal) == pytest.approx(16 * scale**2 * expected.signal, rel=1e-9)  # a sum, not a mean


def test_groups_add_up():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)).double()
    inputs = torch.randn(3, 2).double().unbind()
    whole, parts = AccumulationSource(model), AccumulationSource(model, [layer.parameters() for layer in model])
    for one in inputs:
        model(one).square().sum().backward()
    first, second = parts.parameter_group_moments()
    assert_equal(GradientMoments.of_parts([first, second]), whole.moments())
    assert float(first.sq_norm_of_mean) > 0
    assert float(second.sq_norm_of_mean) > 0


def test_bfloat16_gradients_are_measured_in_float32():
    model = nn.Linear(300, 1, bias=False).bfloat16()
    source = AccumulationSource(model)
    for _ in range(2):
        model(torch.ones(1, 300, dtype=torch.bfloat16)).sum().mul(0.5).backward()
    assert float(source.moments().mean_of_sq_norms) == pytest.approx(300.0, rel=1e-6)


def test_unused_parameters_and_disjoint_micro_batches():
    """A mixture of experts: every micro-batch uses other parameters, and each is a sub-batch all the same."""
    experts = nn.ModuleList(nn.Linear(2, 1).double() for _ in range(3))
    losses = [lambda k=k: experts[k](torch.ones(2).double()).square().sum() for k in (0, 1, 0)]
    expected = GradientMoments.from_gradients(explicit_gradients(experts, losses))
    source = AccumulationSource(experts)
    for loss in losses:
        (loss() / 3).backward()
    assert_equal(source.moments(), expected)


def test_sparse_gradients_are_measured():
    embedding = nn.Embedding(5, 3, sparse=True)
    source = AccumulationSource(embedding)
    for tokens in ([0, 0, 1], [2, 3, 3]):  # a repeated index is summed before it is squared
        (embedding(torch.tensor(tokens)).sum() / 2).backward()
    moments = source.moments()
    assert (float(moments.sq_norm_of_mean), float(moments.mean_of_sq_norms)) == pytest.approx((7.5, 15.0))


@pytest.mark.parametrize("frozen", [(), ("head",), ("first",), ("first", "head")])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_both_kinds(use_reentrant, frozen):
    """A reentrant checkpoint runs backward passes of its own inside backward(); together they are one sub-batch."""
    inputs = torch.randn(4, 5, 3).double()
    plain = Blocks(None, frozen)
    losses = [lambda x=x: plain(x).square().mean() for x in inputs]
    expected = GradientMoments.from_gradients(explicit_gradients(plain, losses))
    model = Blocks(use_reentrant, frozen)
    source = AccumulationSource(model)
    for _ in range(2):
        for x in inputs:
            (model(x).square().mean() / 4).backward()
        assert_equal(source.moments(), expected)
        model.zero_grad()


def test_a_parameter_whose_gradient_comes_in_pieces_is_not_measured():
    model = Blocks(True)
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)  # one module, three reentrant checkpoints
    source = AccumulationSource(model)
    for _ in range(2):
        model(torch.randn(2, 3).double()).sum().backward()
    with pytest.warns(UserWarning, match="pieces"):
        assert is_invalid(source.moments())
    with pytest.raises(RuntimeError, match="twice"), source.sub_batch(1):
        model(torch.randn(2, 3).double()).sum().backward()


class OwnCheckpoint(torch.autograd.Function):
    """A reentrant checkpoint as training frameworks write their own."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, gradient)
        return None, x.grad


@pytest.mark.parametrize("frozen", [(), ("first", "head")])
def test_checkpoints_of_others_are_recognised(frozen):
    inputs = torch.randn(4, 5, 3).double()
    plain = Blocks(None, frozen)
    losses = [lambda x=x: plain(x).square().mean() for x in inputs]
    expected = GradientMoments.from_gradients(explicit_gradients(plain, losses))
    model = Blocks(None, frozen)
    source = AccumulationSource(model)
    for x in inputs:
        y = model.first(x).requires_grad_()
        for block in model.blocks:
            y = OwnCheckpoint.apply(block, y)
        (model.head(y).square().mean() / 4).backward()
    assert_equal(source.moments(), expected)


@pytest.mark.parametrize("how", ["after accumulation", "data between", "zeroed data"])
def test_a_gradient_that_others_change_is_not_measured(how):
    model = nn.Linear(3, 2)
    source = AccumulationSource(model)
    if how == "after accumulation":
        model.weight.register_post_accumulate_grad_hook(lambda p: nn.utils.clip_grad_value_(p, 1e-3))
    for k in range(3):
        model(torch.ones(3)).square().sum().backward()
        if how == "data between" and k == 0:
            model.weight.grad.data.clamp_(-1e-3, 1e-3)  # bumps no version
        if how == "zeroed data" and k == 0:
            model.weight.grad.data.zero_()
            model.bias.grad.data.zero_()
    with pytest.warns(UserWarning, match="changed"):
        assert is_invalid(source.moments())


def test_losses_of_different_parts_are_not_two_sub_batches():
    actor, critic = nn.Linear(2, 1), nn.Linear(2, 1)
    source = AccumulationSource(nn.ModuleList([actor, critic]))
    for part in (actor, critic):
        part(torch.ones(2)).sum().backward()
    with pytest.warns(UserWarning, match="different parts"):
        assert is_invalid(source.moments())
    for part in (actor, critic):
        part.zero_grad()
    for _ in range(2):
        with source.sub_batch(1):
            for part in (actor, critic):
                part(torch.ones(2)).sum().backward()
    moments = source.moments()
    assert moments.num_sub_batches == 2
    assert float(moments.noise) == pytest.approx(0.0, abs=1e-6)


def test_a_skipped_micro_batch_is_a_sub_batch_without_gradient():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)
    for x in (4.0, None):
        with source.sub_batch(1):
            if x is not None:
                (model(torch.full((1, 1), x)).sum() / 2).backward()
    moments = source.moments()
    assert (moments.sq_norm_of_mean.item(), moments.mean_of_sq_norms.item(), moments.num_sub_batches) == (4.0, 8.0, 2)


def test_autograd_grad_is_no_sub_batch():
    model = nn.Linear(2, 1)
    source = AccumulationSource(model)
    for _ in range(2):
        model(torch.ones(2)).sum().backward()
        torch.autograd.grad(model(torch.ones(2)).sum(), list(model.parameters()))
    assert source.moments().num_sub_batches == 2
    assert source.dropped == 0


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_batch_that_is_cleared_is_dropped_and_counted(set_to_none):
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)
    for _ in range(2):
        model(torch.full((1, 1), 100.0)).sum().backward()
    model.zero_grad(set_to_none)  # a step that a GradScaler skipped
    for x in (3.0, 1.0):
        (model(torch.full((1, 1), x)).sum() / 2).backward()
    assert source.moments() == GradientMoments(torch.tensor(4.0).double(), torch.tensor(5.0).double(), 2)
    assert source.dropped == 1


def test_what_was_in_grad_before_is_noticed():
    model = nn.Linear(1, 1, bias=False)
    source = AccumulationSource(model)

    def batch():
        for x in (3.0, 1.0):
            (model(torch.full((1, 1), x)).sum() / 2).backward()
        return source.moments()

    batch()
    with pytest.warns(UserWarning, match="zero_grad"):
        assert is_invalid(batch())
    model.zero_grad(set_to_none=False)
    assert float(batch().mean_of_sq_norms) == 5.0
    model.zero_grad()
    model(torch.ones(1, 1)).sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)  # between two backward passes
    assert is_invalid(batch())


def test_a_backward_pass_that_fails_does_not_spoil_the_next_batch():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    source = AccumulationSource(model)
    with pytest.raises(MemoryError):
        model[1](OutOfMemory.apply(model[0](torch.ones(1, 1)))).sum().backward()
    model.zero_grad()
    for _ in range(2):
        model(torch.ones(1, 1)).sum().backward()
    moments = source.moments()
    assert moments.num_sub_batches == 2
    assert float(moments.noise) == pytest.approx(0.0, abs=1e-6)
    model.zero_grad()
    with pytest.raises(MemoryError):
        model[1](OutOfMemory.apply(model[0](torch.ones(1, 1)))).sum().backward()
    with pytest.warns(UserWarning, match="half-way"):  # caught by the user, and stepped all the same
        assert math.isnan(source.moments().mean_of_sq_norms)


def test_nothing_recorded_is_one_unknown_sub_batch():
    moments = AccumulationSource(nn.Linear(1, 1)).moments()
    assert moments.num_sub_batches == 1
    assert math.isnan(moments.mean_of_sq_norms)


def test_sizes_are_stated_for_all_or_for_none():
    model = nn.Linear(1, 1)
    source = AccumulationSource(model)
    model(torch.ones(1, 1)).sum().backward()
    with source.sub_batch(2.0):
        model(torch.ones(1, 1)).sum().backward()
    with pytest.warns(UserWarning, match="stated"):
        assert is_invalid(source.moments())


def test_misuse_of_sub_batch_is_an_error_that_says_so():
    model = nn.Linear(1, 1)
    source = AccumulationSource(model)
    for size in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="size"), source.sub_batch(size):
            pass
    with pytest.raises(RuntimeError, match="open"), source.sub_batch(1), source.sub_batch(1):
        pass

    def backward_twice():
        for _ in range(2):
            model(torch.ones(1, 1)).sum().backward()

    with pytest.raises(RuntimeError, match="twice"), source.sub_batch(1):
        backward_twice()
    source.remove()
    with pytest.raises(RuntimeError, match="removed"), source.sub_batch(1):
        pass


def test_what_cannot_be_measured_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="requires_grad"):
        AccumulationSource(nn.Linear(1, 1).requires_grad_(False))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="2 processes"):
        AccumulationSource(nn.Linear(1, 1))


def test_a_source_that_was_removed_goes_without_the_garbage_collector():
    """As it holds the parameters, which may be most of the memory of a device."""
    source = AccumulationSource(nn.Linear(2, 2))
    parameter = weakref.ref(source._gradients.parameters[0])
    source._gradients.model(torch.ones(1, 2)).sum().backward()
    source.remove()
    gc.disable()
    try:
        del source
        assert parameter() is None
    finally:
        gc.enable()


def test_no_gradient_is_kept():
    model = nn.Linear(1000, 1000)
    source = AccumulationSource(model)
    for _ in range(2):
        model(torch.ones(1, 1000)).sum().backward()
    gradient = model.weight.grad
    import weakref

    alive = weakref.ref(gradient)
    del gradient
    model.zero_grad()
    assert alive() is None
    assert source.moments().num_sub_batches == 2


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_norm_of_adam(kind, amsgrad):
    """Against the definition, sum g^2 / (sqrt(v / (1 - beta2^t)) + eps), and over more than one chunk."""
    if amsgrad and kind in (torch.optim.NAdam, torch.optim.RAdam):
        pytest.skip("has no amsgrad")
    model = nn.Linear(1100, 1000, bias=False).double()
    options = {"amsgrad": True} if amsgrad else {}
    optimizer = kind(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-6, **options)
    norm = AdamNorm(optimizer)
    assert norm(model.weight, torch.randn(1000, 1100)).isnan()
    assert AdamNorm.suits(optimizer)
    for _ in range(3):
        model.weight.grad = torch.randn(1000, 1100).double()
        optimizer.step()
    state, g = optimizer.state[model.weight], torch.randn(1000, 1100).double()
    v = state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"] / (1 - 0.99**3)
    expected = (g.square() / (v.sqrt() + 1e-6)).sum().sqrt()
    assert float(norm(model.weight, g)) == pytest.approx(float(expected), rel=1e-12)
    assert not AdamNorm.suits(torch.optim.SGD(model.parameters(), lr=1.0))
    changed = optimizer.state_dict()
    changed["param_groups"][0]["eps"] = 1e-2
    optimizer.load_state_dict(changed)  # which replaces the dicts of parameter groups
    expected = (g.square() / (v.sqrt() + 1e-2)).sum().sqrt()
    assert float(norm(model.weight, g)) == pytest.approx(float(expected), rel=1e-12)


def test_the_norm_of_adam_for_sparse_gradients_and_for_optimizers_that_are_no_adam():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = torch.optim.SparseAdam(embedding.parameters(), lr=1e-3)
    norm = AdamNorm(optimizer)
    embedding(torch.tensor([0, 0, 2])).sum().backward()
    optimizer.step()
    v = optimizer.state[embedding.weight]["exp_avg_sq"][[0, 2]] / (1 - 0.999)
    expected = (torch.tensor([[2.0], [1.0]]).square() / (v.sqrt() + 1e-8)).sum().sqrt()
    assert float(norm(embedding.weight, embedding.weight.grad)) == pytest.approx(float(expected), rel=1e-5)

    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adamax(model.parameters())
    norm = AdamNorm(optimizer)
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="Adamax"):
        assert float(norm(model.weight, torch.tensor([[3.0, 4.0]]))) == 5.0
