"""The baseline: unbiased by enumeration, optimal among constants, equal to its own slow twin, safe with bad data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from bandit import SoftmaxBandit, forced
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_baseline import RECALL, SlowBaseline

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
        for k, m in itertools.product(range(len(slow.kappas)), range(3)) if scope == "shrink" else ():
            b = forced(fast, k, m)(rewards, weights, **given)
            expected = slow(batch, (slow.kappas[k], RECALL[m]))
            assert torch.allclose(b, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
        if scope != "group":
            fast.update(rewards, weights, **given)
            slow.update(batch)
            for k, m in itertools.product(range(len(slow.kappas)), range(3)) if slow.losses else ():
                loss = float(fast.get_extra_state()["selection.losses"][k, m])
                assert loss == pytest.approx(slow.losses[slow.kappas[k], RECALL[m]], rel=1e-9, abs=1e-9)
        if prompts and scope == "shrink":
            state = fast.get_extra_state()
            remembered = dict(zip(state["memory.ids"].tolist(), state["memory.sums"].tolist(), strict=True))
            assert remembered.keys() == slow.memory.keys()
            for prompt, sums in slow.memory.items():
                assert remembered[prompt] == pytest.approx(list(sums), rel=1e-9, abs=1e-9)


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


def test_with_no_other_output_the_pool_decides_whatever_kappa():
    baseline = GradWeightedBaseline()
    baseline.update(torch.tensor([1.0, 0.0, 1.0, 1.0]), prompts=torch.tensor([1, 1, 2, 2]))
    for k in range(7):
        chosen = forced(baseline, k, 0)
        assert chosen(torch.tensor([9.0]), groups=1).item() == 0.75
        assert chosen.predict(torch.tensor([77])).tolist() == [0.75]
        assert chosen(torch.tensor([9.0, math.nan]), groups=2)[0].item() == 0.75


def test_ratios_are_squared_into_the_weights():
    rewards, weights, ratios = torch.rand(3, 12)
    baseline = GradWeightedBaseline(kappa=2.0)
    expected = baseline(rewards, weights * ratios**2, groups=3)
    assert torch.allclose(baseline(rewards, weights, groups=3, ratios=ratios), expected, rtol=1e-6)


def test_parts_of_a_batch_are_worked_on_like_the_whole(monkeypatch):
    rewards, weights = torch.rand(40).round(), torch.rand(40)
    ids = torch.arange(10).repeat_interleave(4)
    whole, in_parts = GradWeightedBaseline(), GradWeightedBaseline()
    for block in (1 << 19, 12):
        monkeypatch.setattr("snr_optim.baseline.estimator.BLOCK", block)
        baseline = whole if block > 12 else in_parts
        for _ in range(2):
            advantages = baseline.advantages(rewards, weights, prompts=ids, update=True)
        if baseline is whole:
            expected = advantages
    assert torch.allclose(advantages, expected, rtol=1e-6)
    for name, value in whole.get_extra_state().items():
        assert torch.allclose(in_parts.get_extra_state()[name], value, rtol=1e-12), name


def test_padding_of_nan_counts_nowhere():
    """Columns of rewards-to-go where some outputs have ended: the same as leaving these out."""
    rewards, weights = torch.rand(6, 3), torch.rand(6, 3)
    ended = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 0, 0], [0, 0, 1], [0, 1, 1]]).bool()
    baseline, ids = GradWeightedBaseline(kappa=2.0), torch.arange(6) // 3
    advantages = baseline.advantages(rewards.masked_fill(ended, math.nan), weights, groups=ids)
    for t in range(3):
        alive = ~ended[:, t]
        expected = baseline.advantages(rewards[alive, t], weights[alive, t], groups=ids[alive])
        assert torch.allclose(advantages[alive, t], expected, atol=1e-6)
        assert not advantages[~alive, t].any()


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
        (dict(rewards=torch.ones(4, 0), groups=2), ValueError, "rewards"),
        (dict(rewards=torch.ones(4, 1, 1), groups=2), TypeError, "rewards"),
    ],
)
def test_bad_input_is_named(arguments, error, names):
    with pytest.raises(error, match=names):
        GradWeightedBaseline("shrink")(**arguments)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scope": "prompt"}, {"kappa": 0.0}, {"kappa": math.inf}, {"kappa": math.nan}, {"kappa": "best"},
        {"decay": 1.0}, {"decay": -0.1}, {"decay": "slow"}, {"kappa": True},
    ],
)  # fmt: skip
def test_bad_settings_are_named(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        GradWeightedBaseline(**kwargs)


def test_a_kappa_in_the_place_of_leave_one_out_is_refused():
    with pytest.raises(TypeError, match="leave_one_out"):
        GradWeightedBaseline("shrink", 16.0)


@pytest.mark.parametrize(
    ("scope", "arguments", "error", "names"),
    [
        ("shrink", dict(prompts=torch.tensor([0, 0, 1, 2]), groups=2), ValueError, "prompts"),
        ("shrink", dict(prompts=torch.tensor([0, 0, 1]), groups=2), ValueError, "prompts"),
        ("shrink", dict(prompts=torch.rand(4), groups=2), TypeError, "prompts"),
        ("batch", dict(prompts=torch.tensor([0, 0, 1, 1])), ValueError, "prompts"),
        ("group", dict(prompts=torch.tensor([0, 0, 1, 1])), ValueError, "prompts"),
        ("shrink", dict(ratios=torch.full((4,), math.inf), groups=2), ValueError, "ratios"),
        ("shrink", dict(ratios=torch.ones(3), groups=2), ValueError, "ratios"),
        ("shrink", dict(ratios=torch.tensor([1.0, -0.1, 1.0, 1.0]), groups=2), ValueError, "ratios"),
        ("shrink", dict(ratios=torch.zeros(4), groups=2), ValueError, "ratios"),
        ("shrink", dict(ratios=torch.full((4,), math.nan), groups=2), ValueError, "ratios"),
        ("shrink", dict(groups=np.array([0, 0, 1, 1])), TypeError, "groups"),
        ("shrink", dict(prompts=[0, 0, 1, 1]), TypeError, "prompts"),
        ("shrink", dict(prompts=torch.ones(4, dtype=torch.bool), groups=2), TypeError, "prompts"),
        ("shrink", dict(weights=torch.ones(4, dtype=torch.complex64), groups=2), TypeError, "weights"),
    ],
)
def test_bad_extras_are_named(scope, arguments, error, names):
    with pytest.raises(error, match=names):
        GradWeightedBaseline(scope).advantages(torch.ones(4), **arguments)


# ------------------------------------------------------------------------------------------------ the family of weights
def test_lengths_are_opo_without_the_output_itself():
    rewards, lengths = torch.rand(4, 3, dtype=torch.float64), torch.randint(1, 9, (4, 3)).double()
    b = GradWeightedBaseline("group")(rewards.flatten(), lengths.flatten(), groups=3).view(4, 3)
    for q in range(4):
        for i in range(3):
            others = [j for j in range(3) if j != i]
            assert b[q, i] == pytest.approx(float(lengths[q, others] @ rewards[q, others] / lengths[q, others].sum()))


def tokens(batch=24, length=7):
    """Rewards and weights of tokens, a mask, and what OTB makes of them: rewards-to-go and cumulative weights."""
    mask = (torch.arange(length) < torch.randint(1, length + 1, (batch, 1))).double()
    rewards, log_probs, sum_p_squared = torch.rand(3, batch, length, dtype=torch.float64)
    log_probs = log_probs.log()
    weights = (1 - 2 * log_probs.exp() + sum_p_squared + 1) * mask  # + 1: any numbers will do, but not negative ones
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1)
    return rewards, log_probs, sum_p_squared + 1, mask, to_go, weights.cumsum(1) * mask


def test_cumulative_weights_are_the_optimal_token_baseline():
    """Its definition, sum_i W_it R_it / sum_i W_it over the outputs of a prompt, the output itself included."""
    *_, mask, to_go, cumulative = tokens()
    b = GradWeightedBaseline("group", leave_one_out=False)(to_go, cumulative, groups=8)
    for q in range(3):
        for t in range(mask.shape[1]):
            rows = slice(8 * q, 8 * q + 8)
            total = float(cumulative[rows, t].sum())
            expected = float(cumulative[rows, t] @ to_go[rows, t]) / total if total else 0.0
            assert b[rows, t].tolist() == pytest.approx([expected] * 8, rel=1e-12)


def test_verl_gives_the_same_optimal_token_baseline():
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
    rewards, log_probs, sum_p_squared, mask, to_go, cumulative = tokens()
    index = torch.arange(24).div(8, rounding_mode="floor").numpy()
    theirs, _ = algorithms.compute_optimal_token_baseline_advantage(
        rewards, mask, index, log_probs, sum_p_squared, handle_zero_tail=False
    )
    ours = GradWeightedBaseline("group", leave_one_out=False).advantages(to_go, cumulative, groups=8) * mask
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)  # theirs adds 1e-8 to the denominator


def test_many_tokens_are_worked_on_in_their_own_precision():
    rewards, weights = torch.rand(512, 1024), torch.rand(512, 1024) ** 8
    for scope in ("group", "batch", "shrink"):
        baseline = GradWeightedBaseline(scope)
        exact = baseline(rewards.double(), weights.double(), groups=8)
        # A weighted mean of numbers in [0, 1] by eight additions in float32.
        assert torch.allclose(baseline(rewards, weights, groups=8).double(), exact, rtol=0, atol=2e-6)


def test_ids_in_any_order_are_the_same_groups():
    rewards, weights, order = torch.rand(24), torch.rand(24), torch.randperm(24)
    for scope in ("group", "batch", "shrink"):
        baseline = GradWeightedBaseline(scope)
        by_size, by_id = baseline(rewards, weights, 4), baseline(rewards[order], weights[order], order // 4 * 3 - 7)
        assert torch.allclose(by_size[order], by_id, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------------- learning
def batch_of(means, group, seed, spread=1.0):
    """Rewards 0 or 1 with the given means per prompt; weights that do not tell the reward."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.as_tensor(means).repeat_interleave(group)
    rewards = torch.bernoulli(means, generator=generator)
    return rewards, torch.rand(len(rewards), generator=generator) ** spread


def test_advantages_change_nothing_unless_asked_to_learn():
    baseline = GradWeightedBaseline()
    rewards, weights = batch_of([0.1, 0.9] * 8, 4, seed=0)
    first = baseline.advantages(rewards, weights, groups=4)
    assert torch.equal(baseline.advantages(rewards, weights, groups=4), first)
    assert torch.allclose(rewards - baseline(rewards, weights, groups=4), first, atol=1e-6)
    assert torch.equal(baseline.advantages(rewards, weights, groups=4, update=True), first)
    assert not torch.equal(baseline.advantages(rewards, weights, groups=4), first)
    other = GradWeightedBaseline()
    other.update(rewards, weights, groups=4)
    for name, value in baseline.get_extra_state().items():
        assert torch.equal(value, other.get_extra_state()[name]), name


def test_kappa_follows_the_prompts():
    alike, different = GradWeightedBaseline(), GradWeightedBaseline()
    for seed in range(20):
        alike.update(*batch_of([0.5] * 32, 8, seed), groups=8)
        different.update(*batch_of([0.02, 0.98] * 16, 8, seed), groups=8)
    assert alike.metrics()["kappa"] >= 64
    assert different.metrics()["kappa"] <= 1
    assert different.metrics()["second_moment"] <= 1.0


def test_prompts_are_remembered_where_that_helps():
    """Two outputs per prompt say little; what the prompt did before says more."""
    means = torch.linspace(0.02, 0.98, 32)
    ids = torch.arange(32).repeat_interleave(2)
    remembers, forgets = GradWeightedBaseline(), GradWeightedBaseline()
    moments = {"remembers": 0.0, "forgets": 0.0}
    for seed in range(30):
        rewards, weights = batch_of(means, 2, seed)
        for name, baseline, extra in (("remembers", remembers, {"prompts": ids}), ("forgets", forgets, {})):
            advantages = baseline.advantages(rewards, weights, groups=2, update=True, **extra)
            moments[name] += float((weights * advantages**2).sum()) * (seed >= 15)
    assert remembers.metrics()["recall"] > 0
    assert remembers.metrics()["prompts_remembered"] == 32
    assert moments["remembers"] < 0.9 * moments["forgets"]
    assert remembers.predict(torch.tensor([0, 31])).tolist() == pytest.approx([0.1, 0.9], abs=0.15)
    assert remembers.predict(torch.tensor([77])).item() == pytest.approx(remembers.predict().item(), rel=1e-6)


@pytest.mark.filterwarnings("ignore")  # torch says that there is one process
def test_distributed_checkpoints_fill_the_state_in_place_or_say_that_they_cannot(tmp_path):
    import torch.distributed.checkpoint as dcp

    learned = GradWeightedBaseline()
    for k in range(3):
        learned.update(torch.rand(16) + k, torch.rand(16), groups=4)
    given = learned.state_dict()["_extra_state"]
    dcp.save({"baseline": learned}, checkpoint_id=tmp_path / "pool")
    fresh = GradWeightedBaseline()
    dcp.load({"baseline": fresh}, checkpoint_id=tmp_path / "pool")
    for name, value in fresh.state_dict()["_extra_state"].items():
        assert torch.equal(value, given[name]), name
        value.zero_()  # handed out: not the baseline's own
    assert torch.equal(fresh.predict(), learned.predict())
    learned.update(torch.rand(4), torch.rand(4), prompts=torch.arange(4) // 2)
    dcp.save({"baseline": learned}, checkpoint_id=tmp_path / "prompts")
    with pytest.raises(BaseException, match="Size mismatch"):  # torch derives it from nothing narrower
        dcp.load({"baseline": fresh}, checkpoint_id=tmp_path / "prompts")


def test_state_is_restored_bit_for_bit(tmp_path):
    ids = torch.tensor([3, 3, 8, 8])
    baseline = GradWeightedBaseline()
    for seed in range(3):
        baseline.update(*batch_of([0.2, 0.8], 2, seed), prompts=ids)
    torch.save(baseline.state_dict(), tmp_path / "state.pt")
    resumed = GradWeightedBaseline()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for seed in range(3, 6):
        rewards, weights = batch_of([0.2, 0.8], 2, seed)
        both = [b.advantages(rewards, weights, prompts=ids, update=True) for b in (baseline, resumed)]
        assert torch.equal(*both)
    assert baseline.metrics() == resumed.metrics()
    for other in (GradWeightedBaseline("batch"), GradWeightedBaseline(kappa=2.0)):
        with pytest.raises(ValueError, match="state_dict"):
            other.load_state_dict(baseline.state_dict())
    good = baseline.get_extra_state()
    for name, bad in (
        ("pool.sums", torch.zeros(3, dtype=torch.float64)),
        ("memory.ids", torch.tensor([8, 3])),
        ("memory.sums", "none"),
        ("selection.gains", torch.zeros(1, 1, dtype=torch.float64)),
    ):
        with pytest.raises(ValueError, match="state_dict"):
            resumed.set_extra_state(good | {name: bad})
    assert baseline.metrics() == resumed.metrics()


def test_casting_the_module_leaves_its_memory_exact():
    baseline = GradWeightedBaseline()
    baseline.update(*batch_of([0.2, 0.8], 4, seed=0), groups=4)
    before = baseline.predict()
    assert torch.equal(baseline.to(torch.bfloat16).predict(), before)


def test_tokens_are_pooled_by_their_place_and_longer_outputs_may_come():
    baseline = GradWeightedBaseline("batch", decay=0.5)
    baseline.update(torch.tensor([[1.0, 2.0]]), groups=1)
    baseline.update(torch.tensor([[3.0, 6.0, 9.0]]), groups=1)
    assert baseline.predict().tolist() == pytest.approx([(0.5 + 3) / 1.5, (1 + 6) / 1.5, 9.0])
    assert baseline(torch.zeros(1, 2), groups=1).tolist()[0] == pytest.approx(baseline.predict()[:2].tolist())
    with pytest.raises(ValueError, match="rewards"):
        baseline(torch.zeros(3), groups=1)


def test_hostile_batches_leave_no_trace():
    baseline = GradWeightedBaseline()
    rewards, weights = batch_of([0.3, 0.6], 4, seed=0)
    baseline.update(rewards, weights, groups=4)
    state = baseline.get_extra_state()
    for bad in (torch.full_like(weights, math.nan), torch.full_like(weights, math.inf), -weights):
        with pytest.raises(ValueError, match="weights"):
            baseline.advantages(rewards, bad, groups=4, update=True)
    assert all(torch.equal(value, state[name]) for name, value in baseline.get_extra_state().items())
    tiny = torch.full_like(weights, 1e-310, dtype=torch.float64)
    baseline.update(rewards, tiny, prompts=torch.arange(8) // 4)
    for power in (153.0, 153.5, 154.0):  # squares of the gains overflow, and are not taken
        baseline.update(rewards, 10**power * weights.double(), groups=4)
    baseline.update(1e50 * rewards.double(), 1e250 * weights.double(), groups=4)
    baseline.update(torch.full_like(rewards, math.nan), weights, groups=4)
    baseline.update(rewards, torch.zeros_like(weights), groups=4)
    baseline.update(rewards[:0], weights[:0], groups=4)
    state = baseline.get_extra_state()
    assert all(value.isfinite().all() for name, value in state.items() if name != "selection.kappas")
