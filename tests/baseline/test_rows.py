"""What the README says of prompts that are dropped and of rollouts in several rows, by enumeration of all batches."""

from __future__ import annotations

import itertools

import pytest
import torch

from snr_optim import GradWeightedBaseline

# Two prompts, three answers each with rewards 0, 1/2 and 1
ANSWERS = [torch.tensor(t, dtype=torch.float64).softmax(0) for t in ([0.9, -0.4, 0.1], [-0.5, 0.2, 0.8])]
REWARDS = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
TRUE = torch.cat([p * (REWARDS - p @ REWARDS) for p in ANSWERS])


def gradient_with_flat_prompts(scope, treatment, n=3):
    """The expected gradient, divided by all prompts; a flat prompt's rewards are all alike."""
    total = torch.zeros(6, dtype=torch.float64)
    for answers in itertools.product(range(3), repeat=2 * n):
        chance = torch.stack([ANSWERS[i // n][a] for i, a in enumerate(answers)]).prod()
        rewards, groups = REWARDS[list(answers)], torch.arange(2 * n) // n
        flat = torch.tensor([len(set(answers[:n])) == 1, len(set(answers[n:])) == 1])[groups]
        kept = ~flat if treatment != "kept" else torch.ones_like(flat)
        baseline, advantages = GradWeightedBaseline(scope), torch.zeros_like(rewards)
        if treatment == "dropped before":
            advantages[kept] = baseline.advantages(rewards[kept], groups=groups[kept])
        else:
            advantages[kept] = baseline.advantages(rewards, groups=groups)[kept]
        for i, a in enumerate(answers):
            score = -ANSWERS[i // n].clone()
            score[a] += 1
            total[3 * (i // n) : 3 * (i // n) + 3] += chance * advantages[i] * score / n
    return total


@pytest.mark.parametrize(
    ("scope", "treatment", "bias"),
    [
        ("group", "kept", 0.0), ("group", "dropped before", 0.0), ("group", "skipped after", 0.0),
        ("shrink", "kept", 0.0), ("shrink", "dropped before", 0.21), ("shrink", "skipped after", 0.28),
    ],
)  # fmt: skip
def test_flat_prompts_may_be_dropped_in_scope_group_alone(scope, treatment, bias):
    found = gradient_with_flat_prompts(scope, treatment)
    relative = float((found - TRUE).norm() / TRUE.norm())
    assert relative == pytest.approx(bias, abs=0.005 if bias else 1e-10)


@pytest.mark.parametrize(
    ("scope", "unit", "length"),
    [("group", "rollouts", 1.0), ("shrink", "rollouts", 1.0), ("group", "rows", 0.82), ("shrink", "rows", 0.985)],
)
def test_rollouts_in_several_rows_are_passed_as_rollouts(scope, unit, length):
    """Two tasks with four rollouts: a success is cut into four rows, a failure is one."""
    n = 4
    p = torch.tensor([0.3, -0.2], dtype=torch.float64).softmax(0)
    true, scores = p[0] * p[1] * torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64) - p
    total = torch.zeros(2, dtype=torch.float64)
    for successes in itertools.product((0, 1), repeat=2 * n):
        rewards = torch.tensor(successes, dtype=torch.float64)
        rollout_of_row = torch.arange(2 * n).repeat_interleave(1 + 3 * rewards.long())
        if unit == "rows":
            of_rows = GradWeightedBaseline(scope).advantages(rewards[rollout_of_row], groups=rollout_of_row // n)
        else:
            of_rows = GradWeightedBaseline(scope).advantages(rewards, groups=n)[rollout_of_row]
        share = 1 / (1 + 3 * rewards)[rollout_of_row]  # of the rollout's score
        of_row = (of_rows * share)[:, None] * scores[list(successes)][rollout_of_row]
        total += p[list(successes)].prod() * of_row.sum(0) / (2 * n)
    assert float(total @ true / (true @ true)) == pytest.approx(length, abs=0.004 if length < 1 else 1e-10)
