"""Policies small enough to enumerate: every expectation is a finite sum, so each claim is checked without sampling."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

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


class TwoTokenLM:
    """One prompt of a language model over outputs of one token or two: token 0 ends them. All in float64."""

    OUTPUTS = ((0,), (1, 0), (1, 1))

    def __init__(self, prompt: int) -> None:
        torch.manual_seed(prompt)
        embedding = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)  # prompt, tokens 0 and 1
        head = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

        def log_probs(output: tuple[int, ...]) -> list[Tensor]:
            states = embedding[torch.tensor([0, *(1 + token for token in output[:-1])])].cumsum(0)
            return [row.log_softmax(0)[token] for row, token in zip(states @ head, output, strict=True)]

        self.p = torch.stack([sum(log_probs(o), torch.zeros(())).exp() for o in self.OUTPUTS]).detach()
        token_scores = [
            [torch.cat([g.flatten() for g in torch.autograd.grad(lp, (embedding, head), retain_graph=True)])
             for lp in log_probs(o)] for o in self.OUTPUTS
        ]  # fmt: skip
        end = torch.zeros_like(token_scores[0][0])
        self.token_scores = torch.stack(
            [torch.stack([*rows, end][:2]) for rows in token_scores]
        )  # [outputs, 2, parameters]
        self.scores = self.token_scores.sum(1)
        self.mask = torch.tensor([[len(o) > t for t in range(2)] for o in self.OUTPUTS])
        self.lengths = self.mask.sum(1).double()
        self.rewards = torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64) + prompt
        self.weights = self.scores.square().sum(1)

    @property
    def gradient(self) -> Tensor:
        return (self.p * self.rewards) @ self.scores


def forced(baseline: Any, k: int, m: int) -> Any:
    """The baseline, with the choice of candidate taken from it: by evidence that leaves no doubt."""
    baseline = copy.deepcopy(baseline)
    selection = baseline._selection
    selection.gains, selection.squares = torch.full_like(selection.gains, -1.0), torch.zeros_like(selection.squares)
    selection.gains[k, m] = 1.0
    return baseline


def every_batch(policies: list[Any], group_size: int) -> tuple[Tensor, Tensor]:
    """Every possible batch at once: probabilities ``[N]`` and outputs ``[P, G, N]``; a batch is a column."""
    choices = [range(len(policy.p)) for policy in policies for _ in range(group_size)]
    outputs = torch.tensor(list(itertools.product(*choices))).T.reshape(len(policies), group_size, -1)
    return torch.stack([policy.p[o].prod(0) for policy, o in zip(policies, outputs, strict=True)]).prod(0), outputs


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
