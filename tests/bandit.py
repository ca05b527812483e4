"""A softmax bandit: every expectation is a finite sum, so each claim of the method is checked without sampling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class SoftmaxBandit:
    """One prompt: policy ``softmax(theta)`` over a few actions, each with a fixed reward. All in float64."""

    def __init__(self, theta: Tensor, rewards: Tensor) -> None:
        self.p = theta.double().softmax(0)
        self.rewards = rewards.double()
        self.scores = torch.eye(len(self.p), dtype=torch.float64) - self.p  # grad log pi of each action
        self.weights = self.scores.square().sum(1)

    @property
    def gradient(self) -> Tensor:
        """``grad J = E[r grad log pi]``."""
        return (self.p * self.rewards) @ self.scores

    @property
    def optimal_baseline(self) -> Tensor:
        """``E[w r] / E[w]``."""
        return (self.p * self.weights * self.rewards).sum() / (self.p * self.weights).sum()

    def single_sample_covariance_trace(self, baseline: Tensor | float) -> Tensor:
        """``tr Cov[(r - b) grad log pi]`` for a constant ``b``."""
        samples = (self.rewards - baseline)[:, None] * self.scores
        return (self.p * samples.square().sum(1)).sum() - self.gradient.square().sum()


def batches(bandits: list[SoftmaxBandit], group_size: int) -> Iterator[tuple[float, Tensor]]:
    """Every possible batch of ``group_size`` actions per bandit with its probability: ``(p, actions [P, G])``."""
    choices = [range(len(bandit.p)) for bandit in bandits for _ in range(group_size)]
    for actions in itertools.product(*choices):
        table = torch.tensor(actions).view(len(bandits), group_size)
        yield float(torch.stack([b.p[a].prod() for b, a in zip(bandits, table, strict=True)]).prod()), table


def expected_gradient(
    bandits: list[SoftmaxBandit], group_size: int, advantages: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``E[(1/G) sum_i A_i grad log pi(o_i)]`` of each bandit, ``[P, actions]``, by enumeration of all batches."""
    total = torch.zeros(len(bandits), len(bandits[0].p), dtype=torch.float64)
    for probability, actions in batches(bandits, group_size):
        rewards = torch.cat([b.rewards[a] for b, a in zip(bandits, actions, strict=True)])
        weights = torch.cat([b.weights[a] for b, a in zip(bandits, actions, strict=True)])
        scores = torch.cat([b.scores[a] for b, a in zip(bandits, actions, strict=True)])
        weighted = advantages(rewards, weights)[:, None] * scores
        total += probability * weighted.view(len(bandits), group_size, -1).mean(1)
    return total
