"""The baseline: unbiased by enumeration, optimal among constants, equal to its own slow twin, safe with bad data."""

from __future__ import annotations

import math

import pytest
import torch
from bandit import SoftmaxBandit
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_baseline import SlowBaseline

from snr_optim import GradWeightedBaseline

BANDITS = [
    SoftmaxBandit(torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.2])),
    SoftmaxBandit(torch.tensor([-2.0, 0.5, 0.1]), torch.tensor([0.0, 1.0, 0.7])),
]


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


OUTPUTS = st.tuples(
    st.one_of(st.floats(-10, 10), st.just(math.nan)),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e6)),
    st.integers(0, 2),
)


def as_tensors(batch):
    def column(name, dtype=torch.float64):
        return torch.tensor([o[name] for o in batch], dtype=dtype)

    given = {"groups": column("group", torch.long)}
    given |= {"prompts": column("prompt", torch.long)} if "prompt" in batch[0] else {}
    return column("reward"), column("weight"), given


@settings(deadline=None, max_examples=100)
@given(
    rows=st.lists(st.lists(OUTPUTS, min_size=1, max_size=8), min_size=1, max_size=4),
    kappa=st.sampled_from([0.0, 0.5, 16.0, math.inf, "auto"]),
    prompts=st.booleans(),
)
def test_equals_the_slow_twin_over_several_batches(rows, kappa, prompts):
    scope = {0.0: "group", math.inf: "batch"}.get(kappa, "shrink")
    fast = GradWeightedBaseline(scope, kappa=kappa if scope == "shrink" else "auto", decay=0.8)
    slow = SlowBaseline(kappa, decay=0.0 if scope == "group" else 0.8)
    for t, row in enumerate(rows):
        batch = [dict(reward=r, weight=w, group=g) for r, w, g in row]
        for o in batch:
            if prompts and scope == "shrink":
                o["prompt"] = (o["group"] + t) % 4
        rewards, weights, given = as_tensors(batch)
        b = fast(rewards, weights, **given)
        choice = tuple(fast.metrics()[name] for name in ("kappa", "recall"))
        best = slow.score(slow.choice())
        # Rounding may decide between candidates that are equally good, not between others.
        assert slow.score(choice) == pytest.approx(best, rel=1e-6, abs=1e-9 * (1 + sum(slow.losses.values())))
        # Weighted means of numbers up to 10, summed in float64 with weights up to 1e12 apart.
        assert torch.allclose(b, torch.tensor(slow(batch, choice), dtype=torch.float64), rtol=1e-9, atol=1e-10)
        if scope != "group":
            fast.update(rewards, weights, **given)
            slow.update(batch)


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
    [("group", [1.0, 0.0, 1.0]), ("batch", [0.0, 1.0, 0.0]), ("shrink", [1 / 65, 1.0, 1 / 65])],
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
