"""Signal and noise: unbiased for unequal sub-batches, averaged in the right order, unharmed by hostile data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_optim import GradientMoments
from snr_optim.noise.averages import MomentAverages


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 2), min_size=2, max_size=4),
    values=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
)
def test_signal_and_noise_are_unbiased_for_unequal_sub_batches(sizes, values):
    """Units are i.i.d. uniform over three gradients; the mean over all 3^N batches is the expectation."""
    outcomes = torch.tensor([[value, value**2 - 1.0] for value in values], dtype=torch.float64)
    mean, total = outcomes.mean(0), sum(sizes)
    true_noise = (outcomes - mean).square().sum(1).mean() / total
    signal = noise = 0.0
    for draw in itertools.product(range(3), repeat=total):
        parts = outcomes[list(draw)].split(sizes)
        moments = GradientMoments.from_gradients([part.mean(0) for part in parts], shares=sizes)
        signal += moments.signal / 3**total
        noise += moments.noise / 3**total
    assert noise == pytest.approx(true_noise.item(), rel=1e-9, abs=1e-9)
    assert signal == pytest.approx(mean.square().sum().item(), rel=1e-9, abs=1e-9)


def test_from_gradients_takes_lists_with_absent_parameters():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    moments = GradientMoments.from_gradients([[a, None], [None, b]], shares=[1, 3])
    assert moments == GradientMoments(0.25**2 * 5 + 0.75**2 * 9, 0.25 * 5 + 0.75 * 9, 2)


def test_scaling_every_gradient_alike_changes_neither_snr_nor_factor():
    gradients = list(torch.randn(6, 10, dtype=torch.float64))
    plain = GradientMoments.from_gradients(gradients)
    scaled = GradientMoments.from_gradients([1e6 * g for g in gradients])
    assert scaled.batch_snr == pytest.approx(plain.batch_snr, rel=1e-10)
    assert scaled.lr_factor == pytest.approx(plain.lr_factor, rel=1e-10)


def test_one_sub_batch_leaves_the_noise_unknown():
    moments = GradientMoments(2.0, 2.0, 1)
    assert all(math.isnan(value) for value in (moments.noise, moments.signal, moments.batch_snr, moments.lr_factor))


def test_ratios_of_zero_do_not_raise():
    assert GradientMoments(1.0, 1.0, 2).batch_snr == math.inf
    assert math.isnan(GradientMoments(0.0, 0.0, 2).lr_factor)
    assert GradientMoments(0.0, 1.0, 2).lr_factor == -math.inf


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ((-1.0, 1.0, 2), ValueError, "sq_norm_of_mean"),
        ((1.0, torch.tensor(-1.0), 2), ValueError, "mean_of_sq_norms"),
        ((1.0, 0.5, 2), ValueError, "mean_of_sq_norms"),
        ((1.0, 2.0, 0), ValueError, "num"),
        ((1.0, 2.0, 2.0), TypeError, "num"),
        ((torch.ones(2), 2.0, 2), TypeError, "sq_norm_of_mean"),
        (("1", 2.0, 2), TypeError, "sq_norm_of_mean"),
    ],
)
def test_bad_moments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        GradientMoments(*arguments)


@pytest.mark.parametrize(
    ("gradients", "shares", "names"),
    [
        ([], None, "gradients"),
        ([torch.ones(1), torch.ones(2)], None, "gradients"),
        ([[torch.ones(1)], [torch.ones(1), torch.ones(1)]], None, "gradients"),
        ([torch.ones(1), torch.ones(1)], [1.0], "shares"),
        ([torch.ones(1), torch.ones(1)], [1.0, 0.0], "shares"),
        ([torch.ones(1), torch.ones(1)], [1.0, math.nan], "shares"),
    ],
)
def test_bad_gradients_are_named(gradients, shares, names):
    with pytest.raises(ValueError, match=names):
        GradientMoments.from_gradients(gradients, shares)


def test_averages_divide_once_and_clamp_last():
    """S = 0.01, V = 1: averaging first finds the truth, clamping each batch first finds far more."""
    generator = torch.Generator().manual_seed(0)
    true_gradient = torch.full((100,), 0.01, dtype=torch.float64)  # S = 0.01
    averages, clamped = MomentAverages(smoothing=0.999), []
    for _ in range(3000):
        noise = torch.randn(8, 100, generator=generator, dtype=torch.float64) * (8 / 100) ** 0.5  # V = 1
        moments = GradientMoments.from_gradients(list(true_gradient + noise))
        averages.update(moments)
        clamped.append(max(moments.signal, 0.0))
    truth = 0.01 / 1.01
    assert averages.ratio().item() == pytest.approx(truth, abs=0.01)  # std of the average: 0.0085 / sqrt(...)
    assert sum(clamped) / len(clamped) > 5 * truth
    exact = MomentAverages(smoothing=0.5)
    exact.update(GradientMoments(4.0, 12.0, 5))
    exact.update(GradientMoments(1.0, 13.0, 5))
    assert exact.ratio().item() == pytest.approx((0.25 * 2 - 0.5 * 2) / (0.25 * 4 + 0.5 * 1))
    assert exact.signal().item() == pytest.approx((0.25 * 2 - 0.5 * 2) / 0.75)
    assert exact.noise().item() == pytest.approx((0.25 * 2 + 0.5 * 3) / 0.75)


@pytest.mark.parametrize(
    ("bad", "counter"),
    [
        (GradientMoments(2.0, 2.0, 1), "skipped_single"),
        (GradientMoments(0.0, 0.0, 4), "skipped_flat"),
        (GradientMoments(math.nan, 1.0, 4), "skipped_invalid"),
        (GradientMoments(1.0, math.inf, 4), "skipped_invalid"),
        (GradientMoments(torch.tensor(math.nan), torch.tensor(math.nan), 4), "skipped_invalid"),
    ],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.9])
def test_hostile_batches_move_nothing_but_their_counter(bad, counter, smoothing):
    averages = MomentAverages(smoothing)
    averages.update(GradientMoments(2.0, 5.0, 4))
    before = averages.state_dict()
    averages.update(bad)
    after = averages.state_dict()
    assert {name for name in after if before[name] != after[name]} == {counter}
    assert after[counter] == 1


def test_smoothing_zero_is_the_current_batch():
    averages = MomentAverages(0.0)
    for moments in (GradientMoments(4.0, 12.0, 5), GradientMoments(3.0, 9.0, 4)):
        averages.update(moments)
        assert averages.ratio().item() == moments.lr_factor


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_bad_smoothing_is_named(smoothing):
    with pytest.raises(ValueError, match="smoothing"):
        MomentAverages(smoothing)


@pytest.mark.parametrize("smoothing", [0.5, 0.9, 0.98])
def test_the_standard_error_is_the_spread_over_replicates(smoothing):
    """2000 streams of gaussian gradients with S / (S + V) = 1 / 2; the delta method is good to some percent."""
    generator = torch.Generator().manual_seed(0)
    m, d, steps, streams = 4, 50, 40, 2000
    noise = torch.randn(steps, streams, m, d, generator=generator) * (m / d) ** 0.5  # V = 1
    gradients = noise + d**-0.5  # S = 1
    sq_norm = gradients.mean(2).square().sum(-1).double()
    mean_sq = gradients.square().sum(-1).mean(2).double()
    averages = MomentAverages(smoothing)
    averages.__dict__.update({k: v.expand(streams) for k, v in averages.state_dict().items()})  # all streams at once
    for q, mean_q in zip(sq_norm, mean_sq, strict=True):
        moments = GradientMoments(1.0, 1.0, m)
        moments.__dict__.update(sq_norm_of_mean=q, mean_of_sq_norms=mean_q)
        averages.update(moments)
    spread = averages.ratio().std().item()
    reported = averages.ratio_standard_error().square().mean().sqrt().item()
    assert reported == pytest.approx(spread, rel=0.1)
    weights = torch.tensor([smoothing**age for age in range(steps)], dtype=torch.float64)
    effective = (weights.sum() ** 2 / weights.square().sum()).item()
    assert averages.effective_observations()[0].item() == pytest.approx(effective)
    assert averages.degrees_of_freedom()[0].item() == pytest.approx(effective * (m - 1))


def test_one_batch_tells_nothing_about_its_spread():
    averages = MomentAverages(0.9)
    assert averages.ratio_standard_error().isnan()
    averages.update(GradientMoments(2.0, 5.0, 4))
    assert averages.ratio_standard_error().isnan()
    averages.update(GradientMoments(2.0, 5.0, 4))
    assert averages.ratio_standard_error() == 0


def test_the_shrunk_ratio_is_half_at_two_standard_errors():
    averages = MomentAverages(0.9)
    averages.update(GradientMoments(2.0, 5.0, 4))
    assert averages.shrunk_ratio() == averages.ratio() == 0.5  # one batch: nothing is known of its error
    averages.update(GradientMoments(2.0, 5.0, 4))
    assert averages.shrunk_ratio() == 0.5  # no error
    averages.update(GradientMoments(4.0, 12.0, 4))
    ratio, error = averages.ratio().item(), averages.ratio_standard_error().item()
    assert averages.shrunk_ratio().item() == pytest.approx(ratio**3 / (ratio**2 + 4 * error**2))
    for _ in range(20):
        averages.update(GradientMoments(1.0, 5.0, 4))
    assert averages.ratio() < 0
    assert averages.shrunk_ratio() == 0


def test_num_may_be_a_tensor():
    """Where a device would have to be waited for: as after an all-reduce."""
    known, on_device = MomentAverages(0.5), MomentAverages(0.5)
    for num in (4, 1, 3):
        known.update(GradientMoments(2.0, 5.0, num))
        on_device.update(GradientMoments(2.0, 5.0, torch.tensor(float(num))))
    assert known.state_dict() == on_device.state_dict()
    assert GradientMoments(2.0, 5.0, torch.tensor(4.0)).noise == 1.0
    assert math.isnan(GradientMoments(2.0, 5.0, torch.tensor(1)).noise)
    for num in (torch.tensor([2.0]), 2.0, True, None):
        with pytest.raises(TypeError, match="num"):
            GradientMoments(2.0, 5.0, num)


def test_parts_of_one_gradient_only():
    with pytest.raises(ValueError, match="parts"):
        GradientMoments.of_parts([])
    with pytest.raises(ValueError, match="same sub-batches"):
        GradientMoments.of_parts([GradientMoments(1.0, 2.0, 2), GradientMoments(1.0, 2.0, 3)])
