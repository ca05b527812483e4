"""Sub-batches without gradient, passes that fail, steps that are skipped: what belongs to a batch, what was dropped."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from gradients import OutOfMemory
from torch import nn

from snr_optim import GradientMoments, SNRAdaptiveLR


class Run:
    """A product of two weights, both 1: the gradient of input ``x`` is ``(x, x)``."""

    def __init__(self):
        self.model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
        with torch.no_grad():
            for p in self.model.parameters():
                p.fill_(1.0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.scheduler = SNRAdaptiveLR(self.optimizer, smoothing=0.0, min_factor=0.0)
        self.handle = self.scheduler.attach(self.model)

    def backward(self, x):
        self.model(torch.full((1, 1), x).double()).sum().backward()

    def fail(self):
        y = self.model[0](torch.ones(1, 1).double())
        self.model[1](OutOfMemory.apply(y)).sum().backward()

    def sub_batches(self, *xs):
        for x in xs:
            with self.handle.sub_batch(1):
                if x:
                    self.backward(x)

    def clear(self, how):
        if how == "optimizer":
            self.optimizer.zero_grad()
        elif how == "optimizer, to zero":
            self.optimizer.zero_grad(set_to_none=False)
        elif how.startswith("model"):
            self.model.zero_grad(set_to_none="zero" not in how)
        else:
            for p in self.model.parameters():
                p.grad = None

    def count(self, why="unstepped"):
        return self.scheduler.metrics()[f"skipped_{why}"]

    def expect_step(self, *xs):
        """The next step is that of the sub-batches with these inputs."""
        self.optimizer.step()
        expected = GradientMoments.from_gradients([torch.tensor([x, x]) for x in xs])
        assert self.handle.moments.num_sub_batches == len(xs)
        assert self.scheduler.factor == pytest.approx(max(0.0, expected.lr_factor), rel=1e-12)


EVERY_WAY = ["optimizer", "optimizer, to zero", "model", "model, to zero", "by hand"]


def test_a_step_without_any_gradient_that_is_skipped_does_not_join_the_next_one():
    run = Run()
    run.sub_batches(0.0, 0.0)
    run.optimizer.zero_grad()
    assert run.count() == 1
    run.sub_batches(2.0, 3.0)
    run.expect_step(2.0, 3.0)


def test_sub_batches_without_gradient_belong_to_the_batch_that_they_begin():
    run = Run()
    run.optimizer.zero_grad()
    run.sub_batches(0.0, 2.0, 0.0, 3.0)
    assert run.count() == 0
    run.expect_step(0.0, 2.0, 0.0, 3.0)


@pytest.mark.parametrize("how", [way for way in EVERY_WAY if way != "model, to zero"])
@pytest.mark.parametrize("stated", [True, False])
def test_a_batch_that_is_cleared_counts_at_once_and_once(how, stated):
    run = Run()
    for x in (1.0, 5.0):
        run.sub_batches(x) if stated else run.backward(x)
    assert run.count() == 0
    run.clear(how)
    assert run.count() == run.count() == 1
    run.sub_batches(2.0, 3.0)
    assert run.count() == 1
    run.expect_step(2.0, 3.0)
    assert run.count() == 1
    run.clear(how)
    assert run.count() == 1


@pytest.mark.parametrize("how", EVERY_WAY)
@pytest.mark.parametrize("within", [True, False])
def test_after_a_pass_that_failed_and_was_cleared_the_batch_begins_anew(how, within):
    run = Run()
    with pytest.raises(MemoryError), run.handle.sub_batch(1) if within else nullcontext():
        run.fail()
    run.clear(how)
    run.sub_batches(0.0, 2.0, 3.0)
    run.expect_step(0.0, 2.0, 3.0)
    assert run.count() == 1


@pytest.mark.parametrize("within", [True, False])
def test_a_pass_that_failed_and_was_not_cleared_makes_the_batch_invalid(within):
    run = Run()
    run.sub_batches(2.0)
    with pytest.raises(MemoryError), run.handle.sub_batch(1) if within else nullcontext():
        run.fail()
    run.sub_batches(0.0, 3.0)
    with pytest.warns(UserWarning, match="half-way" if within else "not empty"):
        run.optimizer.step()
    assert run.count("invalid") == 1


def test_what_was_cleared_within_a_sub_batch_leaves_no_sub_batch_behind():
    run = Run()
    with run.handle.sub_batch(1):
        run.backward(7.0)
        run.optimizer.zero_grad()
    run.sub_batches(2.0, 3.0)
    run.expect_step(2.0, 3.0)
    assert run.count() == 1


@pytest.mark.parametrize("order", ["before", "after", "both"])
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_autograd_grad_does_not_count_wherever_it_is_called(order, which):
    run = Run()
    parameters = {"all": [0, 1], "first": [0], "last": [1]}[which]
    wanted = [list(run.model.parameters())[i] for i in parameters]
    for x in (2.0, 3.0):
        with run.handle.sub_batch(1):
            y = run.model(torch.full((1, 1), x).double()).sum()
            if order != "after":
                torch.autograd.grad(y, wanted, retain_graph=True)
            y.backward(retain_graph=True)
            if order != "before":
                torch.autograd.grad(y, wanted)
    run.expect_step(2.0, 3.0)


def test_gradients_for_some_tensors_are_added_to_grad_and_count():
    run = Run()
    for x in (2.0, 3.0):
        y = run.model(torch.full((1, 1), x).double()).sum()
        y.backward(inputs=list(run.model.parameters()))
    run.expect_step(2.0, 3.0)


def test_clipping_is_no_clearing_and_copies_keep_the_count():
    run = Run()
    run.sub_batches(4.0)
    run.optimizer.zero_grad()
    run.sub_batches(2.0, 3.0)
    nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    assert run.count() == 1  # between clipping and the step
    run.model.zero_grad()
    assert run.count() == copy.deepcopy(run.scheduler).metrics()["skipped_unstepped"] == 2


def test_zero_grad_is_the_optimizers_own_again_after_remove():
    run = Run()
    assert "zero_grad" in vars(run.optimizer)
    run.handle.remove()
    assert "zero_grad" not in vars(run.optimizer)
    with run.scheduler.attach(run.model):
        theirs = run.optimizer.zero_grad = lambda: None
    assert vars(run.optimizer)["zero_grad"] is theirs  # put there since: not ours to take


def test_zero_grad_of_somebody_else_is_called_and_stays():
    run, called = Run(), []
    run.handle.remove()
    original = run.optimizer.zero_grad

    def theirs(*args, **kwargs):
        called.append(1)
        original(*args, **kwargs)

    run.optimizer.zero_grad = theirs
    with run.scheduler.attach(run.model):
        run.optimizer.zero_grad()
    assert run.optimizer.zero_grad is theirs
    assert called == [1]


def test_an_optimizer_that_never_steps_is_named_once():
    class TwoPhases(torch.optim.SGD):
        def second_step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-group["lr"])
            self.zero_grad()

    run = Run()
    optimizer = TwoPhases(run.model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer)
    scheduler.attach(run.model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(30):
            for x in (2.0, 3.0):
                run.backward(x)
            optimizer.second_step()
            scheduler.step()
    assert [str(one.message) for one in said if "TwoPhases was never called" in str(one.message)].__len__() == 1
    assert scheduler.metrics()["skipped_unstepped"] == 30
    assert scheduler.metrics()["lr"] == 0.1


def test_a_grad_scaler_that_skips_its_first_steps_is_no_such_optimizer():
    run = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            run.backward(2.0)
            run.optimizer.zero_grad()
    run.sub_batches(2.0, 3.0)
    run.expect_step(2.0, 3.0)
    assert run.count() == 8
