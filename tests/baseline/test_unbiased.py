"""Unbiasedness is proved by enumeration: E[(1/G) sum_i (r_i - b_i) grad log pi(o_i)] over all batches, in float64."""

from __future__ import annotations

import pytest
import torch
from bandit import SoftmaxBandit, TwoTokenLM, every_batch, expected_gradient, forced

from snr_optim import GradWeightedBaseline
from snr_optim.baseline.history import CandidateSelection, Pool

BANDITS = [
    SoftmaxBandit(torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.0, 0.2])),
    SoftmaxBandit(torch.tensor([-2.0, 0.5, 0.1]), torch.tensor([0.0, 1.0, 0.7])),
]
TRUE_GRADIENT = torch.stack([bandit.gradient for bandit in BANDITS])
LMS = [TwoTokenLM(0), TwoTokenLM(1)]
EXACT = 1e-13  # absolute, of gradients of size 0.1 to 1
BIASED = 0.02  # relative: what a biased baseline must be off by at least, for these tests to mean something
WEIGHTS = {
    "exact": lambda lm: lm.weights,
    "logit": lambda lm: lm.token_scores[..., -8:].square().sum((1, 2)),  # of the head alone: any function of the output
    "length": lambda lm: lm.lengths,
    "none": lambda lm: None,
}


def past(baseline, seed=0, num=3, **extra):
    """Batches of another policy, learned from before."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        rewards, weights = torch.rand(2, 6, dtype=torch.float64, generator=generator)
        baseline.update(rewards**2, weights, groups=3, **extra)
    return baseline


PROMPTS = torch.tensor([5, 7]).repeat_interleave(3)
CASES = {
    "group": (lambda: GradWeightedBaseline("group"), {}),
    "batch": (lambda: GradWeightedBaseline("batch"), {}),
    "batch, past": (lambda: past(GradWeightedBaseline("batch")), {}),
    "shrink": (lambda: GradWeightedBaseline(kappa=2.0), {}),
    "shrink, past": (lambda: past(GradWeightedBaseline(kappa=2.0)), {}),
    "auto": (lambda: GradWeightedBaseline(), {}),
    "auto, past": (lambda: past(GradWeightedBaseline()), {}),
    "prompts": (lambda: forced(past(GradWeightedBaseline(), prompts=PROMPTS), 2, 2), {"prompts": PROMPTS}),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_baseline_keeps_the_gradient_of_a_bandit(case, weighted):
    make, extra = CASES[case]
    baseline = make()
    gradient = expected_gradient(
        BANDITS, 3, lambda r, w: baseline.advantages(r, w if weighted else None, groups=3, **extra)
    )  # all 729 batches
    assert (gradient - TRUE_GRADIENT).abs().max() < EXACT


@pytest.mark.parametrize(("k", "m"), [(0, 0), (0, 2), (2, 1), (6, 0), (1, 2)])
def test_so_does_every_candidate_with_memories(k, m):
    """kappa 0 to inf, with none, some or all of what the prompts did before."""
    baseline = forced(past(GradWeightedBaseline(), prompts=PROMPTS), k, m)
    assert baseline.metrics()["kappa"] == (0.0, 1.0, 4.0, 16.0, 64.0, 256.0, float("inf"))[k]
    gradient = expected_gradient(BANDITS, 3, lambda r, w: baseline.advantages(r, w, prompts=PROMPTS))
    assert (gradient - TRUE_GRADIENT).abs().max() < EXACT


def test_importance_ratios_keep_the_gradient_off_policy():
    """Sampled from BANDITS, for the gradient of other policies: E[c (r - b) grad log pi]."""
    targets = [SoftmaxBandit(b.p.log() + torch.tensor([0.5, 0.0, -0.5]), b.rewards) for b in BANDITS]
    baseline, truth = GradWeightedBaseline(kappa=2.0), torch.stack([t.gradient for t in targets])
    probability, outputs = every_batch(BANDITS, 3)

    def gather(values):  # [actions] of each bandit -> [B, N]
        return torch.cat([v[o] for v, o in zip(values, outputs, strict=True)])

    ratios = gather([t.p / b.p for t, b in zip(targets, BANDITS, strict=True)])
    advantages = baseline.advantages(
        gather([b.rewards for b in BANDITS]), gather([t.weights for t in targets]), 3, ratios=ratios
    )
    scores = torch.stack([t.scores[o] for t, o in zip(targets, outputs, strict=True)])  # [P, G, N, actions]
    gradient = ((probability * ratios * advantages).view(2, 3, -1, 1) * scores).mean(1).sum(1)
    assert (gradient - truth).abs().max() < EXACT


def lm_gradient(baseline, weight, by_token=False):
    """``[P, parameters]``, over all 729 batches of 2 prompts x 3 outputs, each a column."""
    probability, outputs = every_batch(LMS, 3)

    def gather(values):
        return torch.cat([v[o] for v, o in zip(values, outputs, strict=True)])

    rewards = gather([lm.rewards for lm in LMS])
    if not by_token:
        weights = None if weight(LMS[0]) is None else gather([weight(lm) for lm in LMS])
        advantages = baseline.advantages(rewards, weights, groups=3)
        scores = torch.stack([lm.scores[o] for lm, o in zip(LMS, outputs, strict=True)])
        return ((probability * advantages).view(2, 3, -1, 1) * scores).mean(1).sum(1)
    mask = gather([lm.mask for lm in LMS]).double()  # [B, N, 2]
    token_weights = gather([lm.token_scores.square().sum(2) for lm in LMS])
    to_go, cumulative = rewards[..., None] * mask, token_weights.cumsum(2) * mask
    advantages = baseline.advantages(to_go.flatten(1), cumulative.flatten(1), groups=3).view_as(to_go) * mask
    scores = torch.stack([lm.token_scores[o] for lm, o in zip(LMS, outputs, strict=True)])  # [P, G, N, 2, parameters]
    weighted = (probability[:, None] * advantages).view(2, 3, -1, 2, 1) * scores
    return weighted.sum(3).mean(1).sum(1)


LM_GRADIENT = torch.stack([lm.gradient for lm in LMS])


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("scope", ["group", "batch", "shrink"])
def test_every_scope_and_weight_keeps_the_gradient_of_a_language_model(scope, weight):
    gradient = lm_gradient(GradWeightedBaseline(scope), WEIGHTS[weight])
    assert (gradient - LM_GRADIENT).abs().max() < EXACT


@pytest.mark.parametrize("scope", ["group", "batch", "shrink"])
def test_so_do_baselines_for_each_token(scope):
    assert (lm_gradient(GradWeightedBaseline(scope), None, by_token=True) - LM_GRADIENT).abs().max() < EXACT


# ------------------------------------------------------------------------------------ the same tests see what is biased
@pytest.mark.parametrize("scope", ["group", "batch", "shrink"])
def test_own_output_included_is_biased(scope):
    baseline = GradWeightedBaseline(scope, leave_one_out=False, **({"kappa": 2.0} if scope == "shrink" else {}))
    gradient = expected_gradient(BANDITS, 3, lambda r, w: baseline.advantages(r, w, groups=3))
    assert (gradient - TRUE_GRADIENT).norm() > BIASED * TRUE_GRADIENT.norm()
    gradient = lm_gradient(baseline, WEIGHTS["exact"])
    assert (gradient - LM_GRADIENT).norm() > BIASED * LM_GRADIENT.norm()
    gradient = lm_gradient(baseline, None, by_token=True)
    assert (gradient - LM_GRADIENT).norm() > BIASED * LM_GRADIENT.norm()


def test_kappa_chosen_on_the_same_batch_is_biased(monkeypatch):
    """Each output is still left out of its own baseline; that it helps to choose which one is enough."""

    monkeypatch.setattr(CandidateSelection, "ERRORS", 0.0)  # any gain is enough

    def advantages(r, w):
        chosen = GradWeightedBaseline()
        chosen.update(r, w, groups=3)
        chosen._pool = Pool(0.0)  # nothing but the choice is learned
        return chosen.advantages(r, w, groups=3)

    gradient = expected_gradient(BANDITS, 3, advantages)
    assert (gradient - TRUE_GRADIENT).norm() > BIASED * TRUE_GRADIENT.norm()


@pytest.mark.parametrize("case", ["batch, past", "prompts"])
def test_learning_from_a_batch_before_using_it_is_biased(case):
    make, extra = CASES[case]

    def advantages(r, w):
        baseline = make()
        baseline.update(r, w, groups=3, **extra)
        return baseline.advantages(r, w, groups=3, **extra)

    gradient = expected_gradient(BANDITS, 3, advantages)
    assert (gradient - TRUE_GRADIENT).norm() > BIASED * TRUE_GRADIENT.norm()
