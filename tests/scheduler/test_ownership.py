"""Whose lr it is: copies, pickles, checkpoints that are filled in place, tensors that several groups share."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LambdaLR, LinearLR, OneCycleLR, SequentialLR
from torch.optim.optimizer import register_optimizer_step_pre_hook

from snr_optim import GradientMoments, SNRAdaptiveLR

HALF = GradientMoments(2.0, 5.0, 4)  # S / (S + V) = 1 / 2
TENTH = GradientMoments(10.0, 37.0, 4)


def through_pickle(x):
    return pickle.loads(pickle.dumps(x))


def through_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def lr_of(kind, lr=0.1):
    return torch.tensor(lr, dtype=torch.float64) if kind == "tensor" else lr


def build(kind="float", groups=1, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    parts = [model.parameters()] if groups == 1 else [model[0].parameters(), model[2].parameters()]
    optimizer = torch.optim.SGD([{"params": list(part)} for part in parts], lr=lr_of(kind), momentum=0.9, foreach=False)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.5, min_factor=0.0, **options)
    scheduler.attach(model)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps, seed, call_step=False):
    generator, used = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        for _ in range(4):
            x = torch.randn(3, 4, generator=generator, dtype=torch.float64) + 1
            (model(x).square().mean() / 4).backward()
        optimizer.step()
        used.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.zero_grad()
        if call_step:
            scheduler.step()
    return used


# ------------------------------------------------------------------------------------------------- copies and pickles
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("twin", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("call_step", [False, True])
def test_a_copy_that_is_attached_goes_on_as_the_original(kind, twin, per_group, call_step):
    original = build(kind, groups=2, per_group=per_group)
    train(*original, steps=3, seed=0, call_step=call_step)
    model, optimizer, scheduler = twin(original)
    scheduler.attach(model)
    expected = train(*original, steps=3, seed=1, call_step=call_step)
    assert train(model, optimizer, scheduler, 3, 1, call_step) == expected
    assert scheduler.metrics() == original[2].metrics()


@pytest.mark.parametrize("twin", [copy.deepcopy, through_pickle])
def test_a_copy_leaves_the_lr_to_the_scheduler_that_was_in_charge(twin):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    both = SequentialLR(optimizer, [scheduler, ExponentialLR(optimizer, 0.5)], milestones=[1])
    scheduler.observe(GradientMoments(2.0, 2.0, 4))  # factor 1: the next child writes an equal lr
    optimizer.step()
    both.step()
    optimizer, scheduler, both = twin((optimizer, scheduler, both))
    scheduler.observe(TENTH)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_a_copy_that_nobody_attached_says_so():
    original = build()
    train(*original, steps=2, seed=0)
    _, optimizer, scheduler = copy.deepcopy(original)
    optimizer.step()
    with pytest.warns(UserWarning, match="for a copy too"):
        scheduler.step()


# ---------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_nobody_else_holds_the_tensors_of_a_state(kind):
    _, _, scheduler = run = build(kind, groups=2, per_group=True)
    train(*run, steps=3, seed=0)
    before, metrics = scheduler.state_dict(), scheduler.metrics()

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            yield from tensors(each)

    storages = [tensor.data_ptr() for tensor in tensors(before)]
    assert len(set(storages)) == len(storages)
    given = scheduler.state_dict()
    for tensor in tensors(given):
        tensor.fill_(7.0)  # the one that was handed out
    assert scheduler.metrics() == metrics
    scheduler.load_state_dict(before)
    for tensor in tensors(before):
        tensor.fill_(7.0)  # the one that was loaded
    assert scheduler.metrics() == metrics


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("per_group", [False, True])
def test_distributed_checkpoints_which_fill_a_state_in_place_resume_bit_exactly(tmp_path, kind, per_group):
    saved = build(kind, groups=2, per_group=per_group)
    train(*saved, steps=4, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one process
        dcp.save({"scheduler": saved[2]}, checkpoint_id=tmp_path)
        loaded = build(kind, groups=2, per_group=per_group)
        loaded[0].load_state_dict(saved[0].state_dict())
        loaded[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
        dcp.load({"scheduler": loaded[2]}, checkpoint_id=tmp_path)
    assert loaded[2].metrics() == saved[2].metrics()
    assert train(*loaded, steps=3, seed=1) == train(*saved, steps=3, seed=1)


def test_a_group_that_was_just_added_is_in_the_state():
    _, optimizer, scheduler = run = build()
    train(*run, steps=2, seed=0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3})
    state = scheduler.state_dict()
    assert len(state["base_lrs"]) == len(scheduler.get_last_lr()) == 2
    _, other, resumed = build(groups=2)
    other.param_groups[1]["lr"] = 0.3
    resumed.load_state_dict(state)
    assert resumed.factor == scheduler.factor


# -------------------------------------------------------------------------------------- a tensor that groups share
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_groups_have_lrs_of_their_own_whatever_they_were_given(kind):
    model, optimizer, scheduler = build(kind, groups=2, per_group=True)
    alone = build("float", groups=2, per_group=True)
    assert train(model, optimizer, scheduler, 4, 0) == train(*alone, steps=4, seed=0)


def test_the_first_group_keeps_the_very_tensor():
    lr = lr_of("tensor")
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=lr, foreach=False)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler.observe(HALF)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == optimizer.param_groups[1]["lr"].item() == 0.05
    assert optimizer.defaults["lr"].item() == 0.1


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_group_added_without_an_lr_has_the_default_one_as_its_ceiling(kind, number):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr_of(kind), foreach=False)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, per_group=False)
    scheduler.observe(HALF)
    for _ in range(number):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for moments, factor in ((TENTH, 0.1), (HALF, 0.5)):
        scheduler.observe(moments)
        assert [float(group["lr"]) for group in optimizer.param_groups] == [0.1 * factor] * (1 + number)


def test_a_checkpoint_with_one_tensor_for_all_groups_is_taken_apart():
    plain = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=lr_of("tensor"), foreach=False
    )
    optimizer = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=lr_of("tensor"), foreach=False
    )
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, per_group=True, min_factor=0.0)
    optimizer.load_state_dict(plain.state_dict())
    scheduler.step()
    scheduler.observe([HALF, TENTH])
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.05, 0.01])


# ------------------------------------------------------------------------------------------- which lr is the ceiling
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_the_ceiling_is_the_lr_at_construction_not_an_earlier_schedulers(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr_of(kind, 10.0), foreach=False)
    range_test = ExponentialLR(optimizer, gamma=0.5)
    for _ in range(5):
        optimizer.step()
        range_test.step()
    for ceiling in (0.01, 0.3):
        optimizer.param_groups[0]["lr"] = lr_of(kind, ceiling)
        scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
        assert scheduler.metrics()["ceiling"] == float(optimizer.param_groups[0]["lr"]) == ceiling
        scheduler.observe(HALF)
        assert float(optimizer.param_groups[0]["lr"]) == ceiling / 2


@pytest.mark.parametrize("first", [False, True])
def test_within_a_sequential_lr_the_ceiling_is_the_initial_lr_as_for_its_other_children(first):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    other = LinearLR(optimizer, start_factor=0.25, total_iters=2)  # which has written 0.25 when ours is built
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    both = SequentialLR(optimizer, [scheduler, other] if first else [other, scheduler], milestones=[2])
    used = []
    for _ in range(4):
        scheduler.observe(HALF)
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    assert used == ([0.5, 0.5, 0.25, 0.625] if first else [0.25, 0.625, 0.5, 0.5])


def test_ceilings_may_be_said_by_others():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=1.0)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler.observe(HALF)
    scheduler.set_ceilings([2.0, 4.0])
    assert scheduler.get_last_lr() == [1.0, 2.0]
    assert scheduler.metrics()["ceiling"] == 2.0
    with pytest.raises(ValueError, match="2 parameter groups, got 1"):
        scheduler.set_ceilings([2.0])
    scheduled = SNRAdaptiveLR(optimizer, LambdaLR(optimizer, lambda _: 1.0))
    with pytest.raises(RuntimeError, match="schedule="):
        scheduled.set_ceilings([1.0, 1.0])


# -------------------------------------------------------------------------------------------------- inner schedules
@pytest.mark.parametrize("kind", ["float", "tensor"])
def test_an_inner_schedule_that_fails_leaves_the_lr_as_it_was(kind):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr_of(kind), momentum=0.9, foreach=False)
    scheduler = SNRAdaptiveLR(optimizer, OneCycleLR(optimizer, max_lr=0.1, total_steps=2), smoothing=0.0)
    scheduler.observe(HALF)
    for _ in range(2):
        optimizer.step()
        scheduler.step()
    before, state = float(optimizer.param_groups[0]["lr"]), scheduler.last_epoch
    for _ in range(2):
        with pytest.raises(ValueError, match="total steps"):
            scheduler.step()
        assert (float(optimizer.param_groups[0]["lr"]), scheduler.last_epoch) == (before, state)
    scheduler.observe(TENTH)  # still in charge
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(before / 5)


def test_a_schedule_that_differs_by_group_wants_a_tensor_for_each_group():
    def groups():
        lr = lr_of("tensor")
        return torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=lr, foreach=False)

    optimizer = groups()
    with pytest.raises(ValueError, match="several groups share one tensor"):
        SNRAdaptiveLR(optimizer, LambdaLR(optimizer, [lambda _: 0.5, lambda _: 1.0]))
    optimizer = groups()
    for group in optimizer.param_groups:  # the way out
        group["lr"] = group["lr"].clone()
    SNRAdaptiveLR(optimizer, LambdaLR(optimizer, [lambda _: 0.5, lambda _: 1.0]))
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.05, 0.1]
    optimizer = groups()
    SNRAdaptiveLR(optimizer, LambdaLR(optimizer, lambda _: 0.5))  # the same for all: nothing is lost
    assert [group["lr"].item() for group in optimizer.param_groups] == [0.05, 0.05]


def test_views_of_one_tensor_are_one_lr():
    lr = lr_of("tensor")
    parts = [{"params": [nn.Parameter(torch.ones(1))], "lr": one} for one in (lr, lr.view(()), lr.detach())]
    optimizer = torch.optim.SGD(parts, lr=0.1, foreach=False)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, per_group=True)
    scheduler.observe([HALF, TENTH, HALF])
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx([0.05, 0.01, 0.05])


def test_the_state_of_an_inner_schedule_is_not_shared_either():
    def scheduled():
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr_of("tensor"), foreach=False)
        return SNRAdaptiveLR(optimizer, ExponentialLR(optimizer, 0.5), smoothing=0.0)

    first, second, third = scheduled(), scheduled(), scheduled()
    first.state_dict()["schedule"]["base_lrs"][0].fill_(9.0)
    state = first.state_dict()
    second.load_state_dict(state)
    third.load_state_dict(state)
    state["schedule"]["base_lrs"][0].fill_(9.0)
    for scheduler in (first, second, third):
        assert float(scheduler.schedule.base_lrs[0]) == 0.1
    assert second.schedule.base_lrs[0] is not third.schedule.base_lrs[0]


def test_a_state_that_is_refused_changes_nothing_not_even_the_inner_schedule():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer, ExponentialLR(optimizer, 0.5), smoothing=0.0)
    state = scheduler.state_dict()
    state["schedule"]["last_epoch"] = 7
    for averages in ({}, {**state["averages"], "weight": torch.zeros(2)}, {**state["averages"], "weight": 0.0}):
        with pytest.raises(ValueError, match="state_dict"):
            scheduler.load_state_dict({**state, "averages": averages})
        assert scheduler.schedule.last_epoch == 0


def test_another_child_of_a_sequential_lr_is_not_reported():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer)
    both = SequentialLR(optimizer, [scheduler, ExponentialLR(optimizer, 0.5)], milestones=[1])
    scheduler.attach(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="The epoch parameter")  # torch 2.6's own, of its own call
        for _ in range(5):
            for _ in range(2):
                model(torch.randn(3)).sum().backward()
            optimizer.step()
            both.step()
            optimizer.zero_grad()


def test_in_a_sequence_the_ceiling_is_the_initial_lr_that_the_sequence_puts_back():
    """A checkpoint of the optimizer may have brought another than that at construction; never a larger rate."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = SNRAdaptiveLR(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(lr=0.25, initial_lr=0.25)
    optimizer.load_state_dict(saved)
    both = SequentialLR(optimizer, [ConstantLR(optimizer, factor=1.0), scheduler], milestones=[2])
    lrs = []
    for _ in range(4):
        optimizer.step()
        both.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    assert lrs == [0.25] * 4


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_behind_a_warm_up_the_ceiling_is_that_before_the_warm_up(tensor_lr):
    """Also in torch 2.6, where a SequentialLR makes initial_lr the live tensor, which the warm-up overwrites."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=torch.tensor(1.0) if tensor_lr else 1.0)
    warm_up, scheduler = ConstantLR(optimizer, factor=0.5, total_iters=5), SNRAdaptiveLR(optimizer)
    both = SequentialLR(optimizer, [warm_up, scheduler], milestones=[2])
    lrs = []
    for _ in range(4):
        optimizer.step()
        both.step()
        lrs.append(float(optimizer.param_groups[0]["lr"]))
    assert lrs == [0.5, 1.0, 1.0, 1.0]


def test_an_observation_that_is_refused_does_not_count_as_one():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer)
    with pytest.raises(TypeError):
        scheduler.observe(3)
    optimizer.step()
    with pytest.warns(UserWarning, match="nothing measures"):
        scheduler.step()


def test_the_end_of_an_inner_schedule_shows_where_trainers_look_for_it():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    assert not hasattr(SNRAdaptiveLR(optimizer), "total_steps")
    assert not hasattr(SNRAdaptiveLR(optimizer, ExponentialLR(optimizer, 0.9)), "total_steps")
    assert SNRAdaptiveLR(optimizer, OneCycleLR(optimizer, max_lr=0.1, total_steps=7)).total_steps == 7


# ------------------------------------------------------------------------------------- optimizers that heed no lr
class KeepsItsLr(torch.optim.Optimizer):
    """Reads its lr once, when a parameter is new."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("lr", float(group["lr"]))
                p.data.add_(p.grad, alpha=-state["lr"])


class Outer(torch.optim.Optimizer):
    """Moves the parameters of the user by an inner optimizer."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self, closure=None):
        self.base_optimizer.step()


class Own(KeepsItsLr):
    """Moves by the lr of its group, as an optimizer should."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-float(group["lr"]))


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("make", [torch.optim.Rprop, KeepsItsLr])
def test_an_optimizer_whose_steps_do_not_depend_on_its_lr_is_named(make, kind):
    with pytest.warns(UserWarning, match=rf"{make.__name__} do not depend on the lr"):
        SNRAdaptiveLR(make([nn.Parameter(torch.ones(1))], lr=lr_of(kind)))


class Noisy(Own):
    """Moves by the lr of its group up to a bound, with noise that it draws."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                noise = 1 + 0.01 * torch.randn_like(p.grad)
                p.data.add_(p.grad * noise, alpha=-min(float(group["lr"]), 0.01))


@pytest.mark.parametrize("make", [Own, Noisy, Outer])
def test_other_optimizers_are_not_and_trying_them_out_moves_nothing(make):
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = make([p], lr=0.1)
    LambdaLR(optimizer, lambda _: 1.0)  # puts a step() into the optimizer that is bound to it
    random, steps = torch.get_rng_state(), []
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SNRAdaptiveLR(optimizer)
    finally:
        hook.remove()
    assert torch.equal(random, torch.get_rng_state())
    assert not steps
    assert p.tolist() == [1.0, 1.0]
    assert not optimizer.state


@pytest.mark.parametrize("lr", [None, "0.1", True])
def test_a_group_without_an_lr_is_refused_by_number(lr):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(2)], lr=0.1)
    optimizer.param_groups[1]["lr"] = lr
    with pytest.raises(TypeError, match=r"group 1 of SGD.*relative_step"):
        SNRAdaptiveLR(optimizer)
