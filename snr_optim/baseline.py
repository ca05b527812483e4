"""Variance-optimal baselines for policy gradients, unbiased because no output is in its own baseline.

The pure function holds the formula; the module holds the choice. Weights come from :mod:`snr_optim.per_sample`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from snr_optim.groups import Groups

SCOPES = ("group", "batch", "shrink")


class GradWeightedBaseline(nn.Module):
    r"""The gradient-weighted baseline of OBLR-PO, estimated without the output that it is subtracted from.

    .. math::
        b^*(q) = \frac{E[w\,r \mid q]}{E[w \mid q]}, \qquad
        b_i = \frac{\sum_{j \in q,\, j \neq i} w_j r_j + \kappa\, \overline{w r}_{-q}}
                   {\sum_{j \in q,\, j \neq i} w_j + \kappa\, \overline{w}_{-q}}, \qquad
        w = \|\nabla_\theta \log \pi_\theta(o \mid q)\|^2

    ``b*`` minimises the trace of the covariance of the gradient among constants (arXiv 2511.23310,
    theorem 7). Its estimate ``b_i`` uses the other outputs ``j`` of the prompt, and as ``kappa``
    pseudo-outputs the means over all *other prompts* ``-q`` of the batch:

    - ``scope="group"``, ``kappa = 0``: the paper's leave-one-out estimate. With ``weights=None`` it is RLOO,
      with lengths as weights the leave-one-out form of OPO.
    - ``scope="batch"``, ``kappa = inf``: the other prompts alone. Of low variance, since heavy-tailed
      weights need many samples; the better choice where prompts are alike.
    - ``scope="shrink"``: the group's estimate drawn toward the other prompts'; for prompts of mixed difficulty.

    In every scope ``b_i`` is independent of output ``i``, so ``(r_i - b_i) grad log pi(o_i)`` keeps its mean.

    Args:
        scope: ``"group"``, ``"batch"`` or ``"shrink"``.
        leave_one_out: ``False`` puts each output (with ``"batch"``, each prompt) into its own baseline. That
            is **biased**; it is here to compare with methods that do it.
        kappa: strength of the shrinkage in pseudo-outputs, used by ``"shrink"`` alone.

    Raises:
        ValueError: an unknown ``scope``, or ``kappa`` not positive and finite.

    Example:
        >>> baseline = GradWeightedBaseline(scope="group")
        >>> rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
        >>> baseline(rewards, weights=torch.tensor([1.0, 1.0, 3.0, 1.0]), groups=4)
        tensor([0.2000, 0.4000, 0.6667, 0.2000])
        >>> baseline.advantages(rewards, groups=4)              # equal weights: RLOO
        tensor([ 0.6667, -0.6667, -0.6667,  0.6667])
    """

    def __init__(self, scope: str = "group", leave_one_out: bool = True, *, kappa: float = 16.0) -> None:
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
        if not 0 < kappa < math.inf:
            raise ValueError(
                f"kappa: expected a positive finite number, got {kappa!r}; scope='group' is kappa = 0, "
                "scope='batch' is kappa = inf"
            )
        self.scope = scope
        self.leave_one_out = leave_one_out
        self.kappa = {"group": 0.0, "batch": math.inf, "shrink": float(kappa)}[scope]

    def forward(self, rewards: Tensor, weights: Tensor | None = None, groups: int | Tensor | None = None) -> Tensor:
        """The baseline of each output.

        Args:
            rewards: ``[B]``, one per output; NaN for one that was not scored, which then counts nowhere.
                Or ``[B, T]``: rewards-to-go, each column a problem of its own.
            weights: squared score norms, of the shape of ``rewards``, non-negative; equal when left out.
                Off-policy with importance ratio ``c``: pass ``c**2 * w``. Only their ratios matter.
            groups: size of every prompt's group (neighbours belong together), or integer ids ``[B]``.

        Returns:
            Like ``rewards``, float32 at least, without gradient. Weights that are all zero wherever an
            output's baseline looks count as equal. Where a prompt has no other scored output the other
            prompts decide (not in scope ``"group"``); in scope ``"batch"`` with a single prompt, its own
            other outputs; with nothing to go by the baseline is 0.

        Raises:
            TypeError: complex rewards or weights, or ``groups`` neither int nor integer tensor.
            ValueError: shapes that disagree; infinite rewards; weights negative, NaN or infinite.
        """
        rewards, weights, partition = _checked(rewards, weights, groups)
        return gradient_weighted_baseline(rewards, weights, partition, self.kappa, self.leave_one_out)

    def advantages(self, rewards: Tensor, weights: Tensor | None = None, groups: int | Tensor | None = None) -> Tensor:
        """``rewards - baseline``; 0 where the reward is NaN. Arguments, errors and dtype as in :meth:`forward`."""
        b: Tensor = self(rewards, weights, groups)
        return torch.nan_to_num(rewards.detach().to(b.dtype) - b, nan=0.0)

    def extra_repr(self) -> str:
        kappa = f", kappa={self.kappa}" if self.scope == "shrink" else ""
        return f"scope={self.scope!r}, leave_one_out={self.leave_one_out}{kappa}"


def gradient_weighted_baseline(
    rewards: Tensor, weights: Tensor, groups: Groups, kappa: float, leave_one_out: bool = True
) -> Tensor:
    """The formula of :class:`GradWeightedBaseline` on checked input.

    Args:
        rewards: ``[B, ...]``; NaN is left out.
        weights: of the same shape.
        groups: partition of the ``B`` outputs.
        kappa: ``0`` for the group alone, ``inf`` for the other prompts alone.
        leave_one_out: ``False`` includes the output itself, and its prompt in the pool.
    """
    scored = ~rewards.isnan()
    exact = torch.float32 if rewards.device.type == "mps" else torch.float64
    r = torch.where(scored, rewards, 0).to(exact)
    w = torch.where(scored, weights, 0).to(exact)
    w = w / w.amax(0).clamp_min(torch.finfo(exact).tiny) if w.numel() else w  # only ratios matter: no overflow
    u = scored.to(exact)

    sums = torch.stack([w * r, w, u * r, u], dim=-1)
    if leave_one_out:
        own, pool = groups.sum_of_others(sums), groups.sum_of_other_groups(sums)
    else:
        own, pool = groups.sum(sums)[groups.index], sums.sum(0, keepdim=True).expand_as(sums)
    pool_has_outputs = pool[..., 3:] > 0
    pool_means = torch.where(pool_has_outputs, pool / pool[..., 3:], 0)
    if math.isinf(kappa):
        wr, w, ur, u = torch.where(pool_has_outputs, pool_means, own).unbind(-1)
    else:
        wr, w, ur, u = (own + kappa * pool_means).unbind(-1)
    equally_weighted = torch.where(u > 0, ur / u, 0)
    return torch.where(w > 0, wr / w, equally_weighted).to(torch.promote_types(rewards.dtype, torch.float32))


def _checked(rewards: Tensor, weights: Tensor | None, groups: int | Tensor | None) -> tuple[Tensor, Tensor, Groups]:
    if not isinstance(rewards, Tensor) or rewards.dim() == 0 or rewards.is_complex():
        raise TypeError(f"rewards: expected a real tensor [B] or [B, T], got {_described(rewards)}")
    rewards = rewards.detach()
    if rewards.isinf().any():
        raise ValueError("rewards: expected finite values, or NaN for 'not scored'; got inf")
    if weights is None:
        weights = torch.ones_like(rewards, dtype=torch.float32)
    if not isinstance(weights, Tensor) or weights.is_complex():
        raise TypeError(f"weights: expected a real tensor like rewards, got {_described(weights)}")
    if weights.shape != rewards.shape:
        raise ValueError(f"weights: expected the shape of rewards, {list(rewards.shape)}, got {list(weights.shape)}")
    weights = weights.detach().to(rewards.device)
    refused = ~(rewards.isnan() | ((weights >= 0) & ~weights.isinf()))
    if refused.any():
        raise ValueError(
            f"weights: expected non-negative finite numbers, got {weights[refused][0].item()} "
            f"at {refused.nonzero()[0].tolist()}"
        )
    if groups is None:
        raise ValueError("groups: expected the size of every prompt's group, or integer ids [B]")
    return rewards, weights, Groups.of(groups, len(rewards), rewards.device)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__
