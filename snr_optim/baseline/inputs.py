"""A batch as the user hands it over, checked: everything that can be wrong is said here, and by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snr_kernels.precision import widest_dtype
from snr_optim.prompt_groups import PromptGroups

# So that sums of w r stay finite: (rewards, weights), by the precision that is worked in.
LARGEST = {torch.float64: (1e50, 1e250), torch.float32: (1e10, 1e22)}
EXACT_UP_TO = 1 << 18  # numbers of [B, T] that are worked on in float64 whatever their own precision


@dataclass
class Batch:
    """``B`` outputs, zeros where one was not scored.

    Attributes:
        rewards: ``[B]`` or ``[B, T]`` in float64; float32 if it was no more and is large, or is on mps.
        weights: likewise, importance ratios included.
        scored: likewise, 0 and 1; None where all are.
        groups: the partition into prompts.
        prompts: ``[P]`` ids that last over batches, or None.
        groups_given: ``[B]`` the ids that ``groups`` was made of, None where it was a size.
        float64_given: whether rewards came in float64.
    """

    rewards: Tensor
    weights: Tensor
    scored: Tensor | None
    groups: PromptGroups
    prompts: Tensor | None = None
    groups_given: Tensor | None = None
    float64_given: bool = False

    def part(self, sequences: slice, groups: PromptGroups) -> Batch:
        """Rewards and weights of some of its outputs."""
        scored = None if self.scored is None else self.scored[sequences]
        return Batch(self.rewards[sequences], self.weights[sequences], scored, groups)


def check(rewards: Any, weights: Any, groups: Any, ratios: Any = None, prompts: Any = None) -> Batch:
    """The batch, or the error that names the argument."""
    if not isinstance(rewards, Tensor) or rewards.dim() not in (1, 2) or rewards.is_complex():
        raise TypeError(f"rewards: expected a real tensor [B] or [B, T], got {_described(rewards)}")
    if rewards.dim() == 2 and not rewards.shape[1]:
        raise ValueError(f"rewards: expected at least one token, got shape {list(rewards.shape)}")
    coarse = widest_dtype(rewards.device) == torch.float32 or (rewards.dim() > 1 and rewards.numel() > EXACT_UP_TO)
    r = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32) if coarse else torch.float64)
    w = torch.ones_like(r) if weights is None else _like("weights", weights, rewards).to(r)
    if ratios is not None:
        c = _like("ratios", ratios, rewards).to(r)
        _expect_ratios(c, ~r.isnan())
        w = w * c.square()
    if prompts is not None:
        prompts = _prompt_ids(prompts, len(r))
        groups = prompts if groups is None else groups
    if groups is None:
        raise ValueError("groups: expected the size of every prompt's group, or integer ids [B]")
    partition = PromptGroups.of(groups, len(r), r.device)
    if prompts is not None and r.dim() > 1:
        raise ValueError("prompts: expected rewards [B]; prompts are not remembered per token, [B, T]")
    scored = None
    if r.numel() and not _all_within_bounds(r, w):
        known = ~r.isnan()
        _expect_within_bounds(r, w, known, "weights" if ratios is None else "weights * ratios**2")
        r, w, scored = torch.where(known, r, 0), torch.where(known, w, 0), known.to(r.dtype)
    ids = None if prompts is None else of_groups("prompts", prompts.to(r.device), partition)
    given = groups.to(r.device, torch.int64) if isinstance(groups, Tensor) else None
    return Batch(r, w, scored, partition, ids, given, rewards.dtype == torch.float64)


def _like(name: str, value: Any, rewards: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.is_complex():
        raise TypeError(f"{name}: expected a real tensor like rewards, got {_described(value)}")
    if value.shape != rewards.shape:
        raise ValueError(f"{name}: expected the shape of rewards, {list(rewards.shape)}, got {list(value.shape)}")
    return value.detach()


def _expect_ratios(c: Tensor, known: Tensor) -> None:
    bad = known & ~(c >= 0)
    if bad.any():
        raise ValueError(
            f"ratios: expected pi / pi_old, not its logarithm: non-negative numbers; got {c[bad][0].item():g} "
            f"at {bad.nonzero()[0].tolist()}"
        )
    if known.any() and not c[known].any():
        raise ValueError("ratios: expected pi / pi_old, not its logarithm; all are 0")


def _all_within_bounds(r: Tensor, w: Tensor) -> bool:
    """In one look, so that an accelerator is waited for once; False where anything is NaN."""
    largest_reward, largest_weight = LARGEST[r.dtype]
    lowest, highest, least, most = torch.stack([*r.aminmax(), *w.aminmax()]).tolist()
    return bool(-largest_reward <= lowest and highest <= largest_reward and least >= 0 and most <= largest_weight)


def _expect_within_bounds(r: Tensor, w: Tensor, known: Tensor, weights: str) -> None:
    largest_reward, largest_weight = LARGEST[r.dtype]
    bad = known & ~(r.abs() <= largest_reward)
    if bad.any():
        raise ValueError(
            f"rewards: expected finite values (up to {largest_reward:g}), or NaN for 'not scored'; "
            f"got {r[bad][0].item()} at {bad.nonzero()[0].tolist()}"
        )
    bad = known & ~((w >= 0) & (w <= largest_weight))
    if bad.any():
        raise ValueError(
            f"{weights}: expected non-negative finite numbers (up to {largest_weight:g}), got {w[bad][0].item()} "
            f"at {bad.nonzero()[0].tolist()}"
        )


def _prompt_ids(prompts: Any, batch: int) -> Tensor:
    integers = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(prompts, Tensor) or prompts.dtype not in integers:
        raise TypeError(f"prompts: expected a tensor of integer ids [B], got {_described(prompts)}")
    if prompts.shape != (batch,):
        raise ValueError(f"prompts: expected one id per output, shape [{batch}], got {list(prompts.shape)}")
    return prompts.detach().to(torch.int64)


def of_groups(name: str, ids: Tensor, groups: PromptGroups) -> Tensor:
    """``[B] -> [P]``: what all outputs of a group have to agree on."""
    of_group = groups.first(ids)
    if (of_group[groups.index] != ids).any():
        raise ValueError(f"{name}: expected one id for all outputs of a group, got several")
    return of_group


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return type(value).__name__
