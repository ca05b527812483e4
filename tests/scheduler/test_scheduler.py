"""SNRAdaptiveLR in situations that break schedulers: resuming, sequences, inner schedules, another hand on the lr."""

from __future__ import annotations

import copy
import io
import math
import warnings

import pytest
import torch
from bandit import SoftmaxBandit
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from snr_optim import GradientMoments, SNRAdaptiveLR

HALF = GradientMoments(2.0, 5.0, 4)  # S / (S + V) = 1 / 2
TENTH = GradientMoments(10.0, 19.0, 2)


def make_optimizer(lr=1.0, groups=1, kind=torch.optim.SGD):
    return kind([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr * (i + 1)} for i in range(groups)])


def lrs(optimizer):
    return [float(group["lr"]) for group in optimizer.param_groups]


def train_step(optimizer, scheduler, moments=None):
    if moments is not None:
        scheduler.observe(moments)
    used = lrs(optimizer)
    optimizer.step()
    scheduler.step()
    return used


def test_factor_minimises_the_descent_bound():
    """-eta S + C/2 eta^2 (S + V) of theorem 3, with S and V of a bandit by enumeration and eta_max = 1 / C."""
    bandit = SoftmaxBandit(torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.2]))
    smoothness, batch = 3.0, 4
    signal = bandit.gradient.square().sum().item()
    noise = bandit.single_sample_covariance_trace(0.0).item() / batch
    optimizer = make_optimizer(lr=1 / smoothness)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, min_factor=0.0)
    # moments whose estimates are the true S and V: ||g||^2 = S + V, sum c ||g_k||^2 = S + m V
    scheduler.observe(GradientMoments(signal + noise, signal + 2 * noise, 2))

    def bound(eta):
        return -eta * signal + smoothness / 2 * eta**2 * (signal + noise)

    [chosen] = lrs(optimizer)
    assert all(bound(chosen) <= bound(chosen + step) for step in (-1e-3, -1e-5, 1e-5, 1e-3))


def test_factor_is_one_until_known_then_clamped():
    scheduler = SNRAdaptiveLR(make_optimizer(), smoothing=0.0, min_factor=0.2, max_factor=0.8)
    assert scheduler.factor == 0.8
    assert SNRAdaptiveLR(make_optimizer()).factor == 1.0
    scheduler.observe(GradientMoments(1.0, 9.0, 2))
    assert scheduler.factor == 0.2
    assert scheduler.metrics()["floor_bound"] == 1
    scheduler.observe(GradientMoments(1.0, 1.0, 2))
    assert scheduler.factor == 0.8


def test_observe_before_step_sets_this_step_and_after_it_the_next():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    assert train_step(optimizer, scheduler, HALF) == [0.5]
    optimizer.step()
    scheduler.observe(TENTH)
    scheduler.step()
    assert train_step(optimizer, scheduler) == pytest.approx([0.1])


def test_resume_order_and_any_other():
    def fresh():
        optimizer = make_optimizer(groups=2, kind=torch.optim.AdamW)
        return optimizer, SNRAdaptiveLR(optimizer)

    optimizer, scheduler = fresh()
    train_step(optimizer, scheduler, HALF)
    for order in ("optimizer first", "scheduler first", "scheduler only"):
        resumed, resumed_scheduler = fresh()
        if order == "optimizer first":
            resumed.load_state_dict(optimizer.state_dict())
        resumed_scheduler.load_state_dict(scheduler.state_dict())
        if order == "scheduler first":
            resumed.load_state_dict(optimizer.state_dict())
        assert lrs(resumed) == [0.5, 1.0], order
        assert train_step(resumed, resumed_scheduler, TENTH) == train_step(
            *copy.deepcopy((optimizer, scheduler)), TENTH
        )


def test_sequential_lr_enters_without_step():
    optimizer = make_optimizer()
    warm_up = LinearLR(optimizer, start_factor=0.25, total_iters=3)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    both = SequentialLR(optimizer, [warm_up, scheduler], milestones=[3])
    used = []
    for _ in range(5):
        scheduler.observe(HALF)
        used += train_step(optimizer, both)
    assert used == pytest.approx([0.25, 0.5, 0.75, 0.5, 0.5])
    assert scheduler.metrics()["observations"] == 5


def test_sequential_lr_as_first_child_leaves_the_lr_to_the_next():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    both = SequentialLR(optimizer, [scheduler, LambdaLR(optimizer, lambda _: 0.125)], milestones=[2])
    used = []
    for _ in range(4):
        scheduler.observe(HALF)
        used += train_step(optimizer, both)
    assert used == [0.5, 0.5, 0.125, 0.125]


@pytest.mark.parametrize(
    "make_inner",
    [
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
        lambda optimizer: ExponentialLR(optimizer, gamma=0.5),
        lambda optimizer: LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        lambda optimizer: SequentialLR(
            optimizer, [LinearLR(optimizer, 0.1, total_iters=3), CosineAnnealingLR(optimizer, 7)], milestones=[3]
        ),
    ],
    ids=["recursive", "exponential", "closed form", "sequential"],
)
def test_inner_schedule_is_multiplied_exactly(make_inner):
    alone, together = make_optimizer(groups=2), make_optimizer(groups=2)
    inner = make_inner(alone)
    scheduler = SNRAdaptiveLR(together, schedule=make_inner(together), smoothing=0.0)
    for step in range(9):
        scheduler.observe(HALF if step % 2 else TENTH)
        factor = scheduler.factor
        assert lrs(together) == [lr * factor for lr in lrs(alone)]
        train_step(alone, inner)
        train_step(together, scheduler)


def test_an_equal_lr_of_the_next_child_is_not_taken_for_ours():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    both = SequentialLR(optimizer, [scheduler, ExponentialLR(optimizer, 0.5)], milestones=[2])
    used = []
    for moments in (GradientMoments(2.0, 2.0, 4), GradientMoments(2.0, 2.0, 4), TENTH, TENTH):
        scheduler.observe(moments)
        used += train_step(optimizer, both)
    assert used == [1.0, 1.0, 1.0, 0.5]


def test_eight_steps_are_one_step():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer)
    scheduler.observe(HALF)
    optimizer.step()
    scheduler.step()
    once = lrs(optimizer)
    for _ in range(7):
        scheduler.step()
    assert lrs(optimizer) == once == [0.5]


def test_a_foreign_step_count_changes_nothing():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler._step_count += 5
    assert train_step(optimizer, scheduler, HALF) == [0.5]


def test_step_takes_no_metric_and_reads_no_epoch():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, schedule=ExponentialLR(optimizer, 0.5))
    with pytest.raises(TypeError, match="observe"):
        scheduler.step(0.7)
    optimizer.step()
    scheduler.step(1)
    assert lrs(optimizer) == [0.5]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("with_inner", [False, True])
def test_state_loads_with_weights_only_and_resumes_bit_exactly(tensor_lr, with_inner):
    def fresh():
        optimizer = make_optimizer(lr=torch.tensor(0.3) if tensor_lr else 0.3, kind=torch.optim.Adam)
        return optimizer, SNRAdaptiveLR(optimizer, CosineAnnealingLR(optimizer, 20) if with_inner else None)

    stream = [GradientMoments(1.0 + 0.1 * i, 3.0 + 0.37 * i, 4) for i in range(12)]
    optimizer, scheduler = fresh()
    for moments in stream[:6]:
        train_step(optimizer, scheduler, moments)
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    resumed, resumed_scheduler = fresh()
    resumed.load_state_dict(loaded["optimizer"])
    resumed_scheduler.load_state_dict(loaded["scheduler"])
    for moments in stream[6:]:
        assert train_step(resumed, resumed_scheduler, moments) == train_step(optimizer, scheduler, moments)
    assert resumed_scheduler.metrics() == scheduler.metrics()


def test_it_is_a_true_lr_scheduler():
    assert isinstance(SNRAdaptiveLR(make_optimizer()), torch.optim.lr_scheduler.LRScheduler)


def test_a_tensor_lr_is_filled_never_replaced():
    lr = torch.tensor(2.0)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    held = optimizer.param_groups[0]["lr"]
    train_step(optimizer, scheduler, HALF)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 1.0
    assert isinstance(scheduler.get_last_lr()[0], torch.Tensor)
    assert scheduler.get_last_lr()[0] is not held


@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)])
def test_replaced_group_dicts_are_followed(lr):
    optimizer = make_optimizer(lr)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train_step(optimizer, scheduler, HALF) == [0.5]


def test_a_deep_copy_is_independent():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    train_step(optimizer, scheduler, HALF)
    twin, twin_scheduler = copy.deepcopy((optimizer, scheduler))
    assert train_step(twin, twin_scheduler, TENTH) == pytest.approx([0.1])
    assert lrs(optimizer) == [0.5]


def test_a_new_group_brings_its_own_ceiling():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 10.0})
    assert train_step(optimizer, scheduler, HALF) == [0.5, 5.0]
    inner = ExponentialLR(optimizer, 0.5)
    scheduler = SNRAdaptiveLR(optimizer, schedule=inner)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 10.0})
    with pytest.raises(RuntimeError, match="param group"):
        scheduler.step()


@pytest.mark.parametrize("with_inner", [False, True])
def test_a_skipped_first_optimizer_step_raises_no_false_alarm(with_inner):
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, ExponentialLR(optimizer, 0.5) if with_inner else None)
    scheduler.observe(HALF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.step()


def test_steps_that_nothing_measures_are_said_once_and_others_never():
    model = torch.nn.Linear(2, 1)
    for prepare in (lambda scheduler: scheduler.attach(model), lambda scheduler: scheduler.observe(HALF), None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = SNRAdaptiveLR(optimizer)
        if prepare is not None:
            prepare(scheduler)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(3):
                optimizer.step()
                scheduler.step()
        assert len([one for one in said if "nothing measures the gradients" in str(one.message)]) == (prepare is None)


def test_get_last_lr_is_what_is_used():
    optimizer = make_optimizer(groups=3)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler.observe(HALF)
    assert scheduler.get_last_lr() == lrs(optimizer) == [0.5, 1.0, 1.5]
    scheduler.step()
    assert scheduler.get_last_lr() == lrs(optimizer)


def test_one_step_per_rollout_many_observations():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    used = []
    for moments in (HALF, TENTH, HALF):
        scheduler.observe(moments)
        used += lrs(optimizer)
        optimizer.step()
    scheduler.step()
    assert used == pytest.approx([0.5, 0.1, 0.5])


def test_monitor_mode_measures_and_leaves_the_lr_alone():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, adapt=False)
    assert train_step(optimizer, scheduler, HALF) == [1.0]
    assert scheduler.factor == 0.5


def test_hostile_observations_change_neither_factor_nor_lr():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler.observe(HALF)
    for bad in ((math.nan, math.nan, 4), (1.0, math.inf, 4), (0.0, 0.0, 4), (3.0, 3.0, 1)):
        scheduler.observe(GradientMoments(*bad))
        assert lrs(optimizer) == [0.5]
        assert scheduler.factor == 0.5
    metrics = scheduler.metrics()
    assert [metrics[f"skipped_{why}"] for why in ("single", "flat", "invalid")] == [1, 1, 2]
    assert metrics["critical_batch_size"] == 4.0  # V / S = 1, times four sub-batches


def test_another_hand_on_the_lr_is_reported_once():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer)
    optimizer.param_groups[0]["lr"] = 0.7
    with pytest.warns(UserWarning, match="schedule="):
        scheduler.step()
    assert lrs(optimizer) == [1.0]


def test_bad_arguments_are_named():
    optimizer = make_optimizer()
    with pytest.raises(TypeError, match="optimizer"):
        SNRAdaptiveLR(object())
    with pytest.raises(TypeError, match="schedule"):
        SNRAdaptiveLR(optimizer, ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match="schedule"):
        SNRAdaptiveLR(optimizer, SNRAdaptiveLR(optimizer))
    with pytest.raises(ValueError, match="schedule"):
        SNRAdaptiveLR(optimizer, ExponentialLR(make_optimizer(), 0.5))
    with pytest.raises(ValueError, match="min_factor"):
        SNRAdaptiveLR(optimizer, min_factor=0.5, max_factor=0.1)
    with pytest.raises(ValueError, match="smoothing"):
        SNRAdaptiveLR(optimizer, smoothing=1.0)
    with pytest.raises(ValueError, match="norm"):
        SNRAdaptiveLR(optimizer, norm="manhattan")
    with pytest.raises(TypeError, match="moments"):
        SNRAdaptiveLR(optimizer).observe((1.0, 2.0, 3))


def test_a_foreign_state_is_refused_and_changes_nothing():
    optimizer = make_optimizer()
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    scheduler.observe(HALF)
    before = scheduler.state_dict()
    for state in ({}, LambdaLR(make_optimizer(), lambda _: 1.0).state_dict(), {**before, "base_lrs": [1.0, 2.0]}):
        with pytest.raises(ValueError, match="state_dict"):
            scheduler.load_state_dict(state)
    assert scheduler.state_dict() == before


def test_smoothing_auto_shrinks_and_a_number_does_not():
    plain, auto = SNRAdaptiveLR(make_optimizer(), smoothing=0.95), SNRAdaptiveLR(make_optimizer())
    for moments in (HALF, TENTH, HALF, TENTH):
        plain.observe(moments)
        auto.observe(moments)
    ratio, error = plain._averages.ratio().item(), plain._averages.ratio_standard_error().item()
    assert plain.factor == ratio
    assert auto.factor == pytest.approx(ratio**3 / (ratio**2 + 4 * error**2))
    with pytest.raises(ValueError, match="smoothing"):
        SNRAdaptiveLR(make_optimizer(), smoothing="long")


def test_metrics_are_floats_under_stable_names():
    scheduler = SNRAdaptiveLR(make_optimizer())
    names = {
        "factor", "lr", "ceiling", "signal", "noise", "snr", "snr_standard_error", "degrees_of_freedom",
        "critical_batch_size", "observations", "floor_bound", "skipped_single", "skipped_flat", "skipped_invalid",
        "skipped_unstepped",
    }  # fmt: skip
    assert set(scheduler.metrics()) == names
    for moments in (HALF, GradientMoments(3.0, 6.0, 4)):
        scheduler.observe(moments)
    metrics = scheduler.metrics()
    assert all(type(value) is float for value in metrics.values())
    assert metrics["snr"] == pytest.approx(metrics["signal"] / metrics["noise"])
    assert metrics["snr_standard_error"] > 0
    assert metrics["degrees_of_freedom"] == pytest.approx(3 * 1.95**2 / (1 + 0.95**2))


def test_per_parameter_group_moments_set_per_group_factors():
    optimizer = make_optimizer(groups=2)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, per_group=True)
    scheduler.observe([HALF, GradientMoments(1.0, 1.0, 4)])
    assert lrs(optimizer) == [0.5, 2.0]
    scheduler.observe([GradientMoments(0.0, 0.0, 4), GradientMoments(1.0, 4.0, 4)])  # the first carries no information
    assert lrs(optimizer) == [0.5, 0.02]
    assert scheduler.metrics()["floor_bound"] == 1
    resumed_optimizer = make_optimizer(groups=2)
    resumed = SNRAdaptiveLR(resumed_optimizer, smoothing=0.0, per_group=True)
    resumed.load_state_dict(scheduler.state_dict())
    assert lrs(resumed_optimizer) == [0.5, 0.02]
    for wrong in (HALF, [HALF], [HALF] * 3):
        with pytest.raises(ValueError, match="2 parameter groups"):
            scheduler.observe(wrong)
    with pytest.raises(ValueError, match="per_group"):
        SNRAdaptiveLR(make_optimizer(groups=2)).load_state_dict(scheduler.state_dict())


def test_one_factor_for_all_groups_comes_from_the_sum_of_their_moments():
    one, several = (SNRAdaptiveLR(make_optimizer(groups=2), smoothing=0.0) for _ in range(2))
    one.observe(GradientMoments(4.0, 10.0, 4))
    several.observe([HALF, HALF])
    assert lrs(one.optimizer) == lrs(several.optimizer) == [0.5, 1.0]
