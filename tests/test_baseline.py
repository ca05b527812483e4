"""The baseline: unbiased by enumeration, optimal among constants, equal to its own slow twin, safe with bad data."""

from __future__ import annotations

import math

import pytest
import torch
from bandit import SoftmaxBandit, expected_gradient
from hypothesis import given, settings
from hypothesis import strategies as st

from snr_optim import GradWeightedBaseline

BANDITS = [
    SoftmaxBandit(torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.2])),
    SoftmaxBandit(torch.tensor([-2.0, 0.5, 0.1]), torch.tensor([0.0, 1.0, 0.7])),
]
TRUE_GRADIENT = torch.stack([bandit.gradient for bandit in BANDITS])


@pytest.mark.parametrize("scope", ["group", "batch", "shrink"])
@pytest.mark.parametrize("weighted", [True, False])
def test_leave_one_out_gradient_is_unbiased_exactly(scope, weighted):
    baseline = GradWeightedBaseline(scope, kappa=2.0)
    gradient = expected_gradient(
        BANDITS, 3, lambda r, w: baseline.advantages(r, w if weighted else None, groups=3)
    )  # all 729 batches
    assert torch.allclose(gradient, TRUE_GRADIENT, rtol=0, atol=1e-14)


@pytest.mark.parametrize("scope", ["group", "batch", "shrink"])
def test_full_batch_gradient_is_biased(scope):
    baseline = GradWeightedBaseline(scope, leave_one_out=False, kappa=2.0)
    gradient = expected_gradient(BANDITS, 3, lambda r, w: baseline.advantages(r, w, groups=3))
    assert (gradient - TRUE_GRADIENT).norm() > 0.05 * TRUE_GRADIENT.norm()


@pytest.mark.parametrize("bandit", BANDITS)
def test_optimal_baseline_minimises_the_covariance_trace_among_constants(bandit):
    best = bandit.single_sample_covariance_trace(bandit.optimal_baseline)
    for b in torch.linspace(-1, 2, 301, dtype=torch.float64):
        assert bandit.single_sample_covariance_trace(b) >= best - 1e-15
    slope = torch.func.grad(bandit.single_sample_covariance_trace)(bandit.optimal_baseline)
    assert abs(slope) < 1e-14


@pytest.mark.parametrize("bandit", BANDITS)
def test_group_estimate_tends_to_the_optimal_baseline(bandit):
    actions = torch.repeat_interleave(torch.arange(3), (bandit.p * 30_000).round().long())
    estimate = GradWeightedBaseline("group")(bandit.rewards[actions], bandit.weights[actions], groups=len(actions))
    assert torch.allclose(estimate, bandit.optimal_baseline.expand_as(estimate), atol=2e-4)


def slow_baseline(rewards, weights, ids, kappa):
    """The formula as loops over Python floats."""
    out = []
    for i, group in enumerate(ids):
        scored = [j for j in range(len(ids)) if not math.isnan(rewards[j])]
        own = [j for j in scored if ids[j] == group and j != i]
        pool = [j for j in scored if ids[j] != group]

        def terms(w, own=own, pool=pool):
            wr, ws = [w[j] * rewards[j] for j in own], [w[j] for j in own]
            pool_wr, pool_ws = [w[j] * rewards[j] for j in pool], [w[j] for j in pool]
            if kappa == math.inf:
                return (math.fsum(pool_wr), math.fsum(pool_ws)) if pool else (math.fsum(wr), math.fsum(ws))
            scale = kappa / len(pool) if pool else 0.0
            return math.fsum(wr) + scale * math.fsum(pool_wr), math.fsum(ws) + scale * math.fsum(pool_ws)

        numerator, denominator = terms(weights)
        if denominator == 0:
            numerator, denominator = terms([1.0] * len(ids))
        out.append(numerator / denominator if denominator else 0.0)
    return torch.tensor(out, dtype=torch.float64)


@settings(deadline=None, max_examples=150)
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.floats(-10, 10), st.just(math.nan)),
            st.one_of(st.just(0.0), st.floats(1e-12, 1e12)),
            st.integers(-2, 3),
        ),
        max_size=12,
    ),
    kappa=st.sampled_from([0.0, 0.5, 16.0, math.inf]),
)
def test_equals_the_slow_twin_on_ragged_groups(rows, kappa):
    rewards, weights, ids = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    scope = {0.0: "group", math.inf: "batch"}.get(kappa, "shrink")
    module = GradWeightedBaseline(scope, kappa=kappa if scope == "shrink" else 1.0)
    fast = module(
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(weights, dtype=torch.float64),
        groups=torch.tensor(ids, dtype=torch.long),
    )
    # A weighted mean of numbers up to 10, summed in float64: 1e-12 leaves room for 12 terms and their weights' ratio.
    assert torch.allclose(fast, slow_baseline(rewards, weights, ids, kappa), rtol=1e-9, atol=1e-12)


def test_a_dominating_weight_does_not_cancel_the_others():
    weights = torch.tensor([1e30, 1.0, 3.0], dtype=torch.float64)
    b = GradWeightedBaseline("group")(torch.tensor([0.0, 1.0, 0.0]), weights, groups=3)
    assert b[0] == 0.25  # total - own would give 0 / 0


def test_equal_weights_are_rloo_and_only_ratios_matter():
    rewards = torch.rand(24, dtype=torch.float64)
    rloo = (rewards.view(3, 8).sum(1, keepdim=True) - rewards.view(3, 8)) / 7
    baseline = GradWeightedBaseline("group")
    assert torch.allclose(baseline(rewards, groups=8), rloo.flatten())
    weights = torch.rand(24, dtype=torch.float64)
    assert torch.allclose(baseline(rewards, weights, 8), baseline(rewards, 1e200 * weights, 8), rtol=1e-12)


def test_columns_of_rewards_to_go_are_separate_problems():
    rewards, weights = torch.rand(6, 4), torch.rand(6, 4)
    baseline = GradWeightedBaseline("shrink")
    together = baseline(rewards, weights, groups=3)
    apart = torch.stack([baseline(rewards[:, t], weights[:, t], groups=3) for t in range(4)], dim=1)
    assert torch.equal(together, apart)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [("group", [1.0, 0.0, 1.0]), ("batch", [0.0, 1.0, 0.0]), ("shrink", [1 / 17, 1.0, 1 / 17])],
)
def test_one_sequence_per_group(scope, expected):
    b = GradWeightedBaseline(scope)(torch.tensor([1.0, 0.0, 1.0]), groups=torch.tensor([9, -4, 9]))
    # the group -4 has one member, so nothing of its own to go by
    assert torch.allclose(b, torch.tensor(expected))


def test_unscored_rewards_count_nowhere():
    rewards = torch.tensor([1.0, math.nan, 0.0, 1.0])
    weights = torch.tensor([1.0, math.nan, 2.0, 1.0])
    advantages = GradWeightedBaseline("group").advantages(rewards, weights, groups=4)
    without = GradWeightedBaseline("group").advantages(rewards[[0, 2, 3]], weights[[0, 2, 3]], groups=3)
    assert torch.equal(advantages, torch.tensor([without[0], 0.0, without[1], without[2]]))


def test_empty_batch_and_dtypes():
    assert GradWeightedBaseline("batch")(torch.empty(0), groups=4).shape == (0,)
    assert GradWeightedBaseline()(torch.tensor([1, 0]), groups=2).dtype == torch.float32
    assert GradWeightedBaseline()(torch.tensor([1, 0], dtype=torch.bfloat16), groups=2).dtype == torch.float32
    assert GradWeightedBaseline().advantages(torch.tensor([True, False]), groups=2).tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        (dict(rewards=torch.ones(4), groups=3), ValueError, "groups"),
        (dict(rewards=torch.ones(4), groups=0), ValueError, "groups"),
        (dict(rewards=torch.ones(4)), ValueError, "groups"),
        (dict(rewards=torch.ones(4), groups=2.0), TypeError, "groups"),
        (dict(rewards=torch.ones(4), groups=torch.ones(4)), TypeError, "groups"),
        (dict(rewards=torch.ones(4), groups=torch.ones(3, dtype=torch.long)), ValueError, "groups"),
        (dict(rewards=torch.ones(4), weights=torch.ones(3), groups=2), ValueError, "weights"),
        (dict(rewards=torch.ones(4), weights=-torch.ones(4), groups=2), ValueError, "weights"),
        (dict(rewards=torch.ones(4), weights=torch.full((4,), math.nan), groups=2), ValueError, "weights"),
        (dict(rewards=torch.ones(4), weights=torch.full((4,), math.inf), groups=2), ValueError, "weights"),
        (dict(rewards=torch.full((4,), -math.inf), groups=2), ValueError, "rewards"),
        (dict(rewards=torch.tensor(1.0), groups=1), TypeError, "rewards"),
        (dict(rewards=[1.0, 0.0], groups=2), TypeError, "rewards"),
    ],
)
def test_bad_input_is_named(arguments, error, names):
    with pytest.raises(error, match=names):
        GradWeightedBaseline("shrink")(**arguments)


@pytest.mark.parametrize("kwargs", [{"scope": "prompt"}, {"kappa": 0.0}, {"kappa": math.inf}, {"kappa": math.nan}])
def test_bad_settings_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        GradWeightedBaseline(**kwargs)
