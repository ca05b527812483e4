"""What earlier batches leave behind: pooled sums, evidence on how much to shrink, the outputs of prompts seen before.

All of it is known before the next outputs are sampled, which is what keeps baselines built from it unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snr_kernels.precision import widest_dtype


class Pool:
    """Sums of past batches, each batch ``decay`` times the weight of the next: ``[..., 4]``."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.sums = torch.zeros(4, dtype=torch.float64, device="cpu")

    def like(self, columns: torch.Size) -> Tensor:
        """The sums for the columns of a batch, ``[*columns, 4]``; zeros for those never seen."""
        if self.sums.dim() == len(columns) + 1:
            return _padded(self.sums, columns[0])[: columns[0]] if columns else self.sums
        if self.sums.dim() == 1 and not self.sums.any():
            return self.sums.new_zeros(*columns, 4)
        raise ValueError(
            f"rewards: expected {self.sums.dim()} dimensions, as in earlier batches, got {len(columns) + 1}; "
            "rewards [B] and rewards-to-go [B, T] want a baseline each"
        )

    def update(self, total: Tensor) -> None:
        """Fold the sums of one batch in, ``[*columns, 4]``."""
        past = torch.zeros_like(total) if self.sums.dim() < total.dim() else self.sums
        if total.dim() > 1:
            longest = max(len(past), len(total))
            past, total = _padded(past, longest), _padded(total, longest)
        self.sums = self.decay * past + total


class CandidateSelection:
    r"""Which candidate to take: the default, or the one whose gain over it is the surest.

    A candidate's loss is its second moment ``sum w (r - b)^2`` over batches that it had not seen. Up to terms without
    ``b`` this is the variance of the gradient, and since ``b_i`` is made without output ``i``, the sum over a batch is
    a leave-one-out cross-validation of it. With ``D_q`` the gain over the default on the outputs of prompt ``q``,

    .. math::
        \text{best} = \arg\max_c \; \sum_q D_{q,c} - 2 \Big( \sum_q D_{q,c}^2 \Big)^{1/2}

    the default having 0: a candidate has to be ahead by two standard errors. Weights are heavy-tailed, so a few
    outputs can make any candidate look good for a while.
    """

    DECAY = 0.99  # per batch
    ERRORS = 2.0

    def __init__(self, kappas: Sequence[float], recall: Sequence[float], default: tuple[int, int]) -> None:
        self.default = default
        self.kappas = torch.tensor(kappas, dtype=torch.float64, device="cpu")
        self.recall = torch.tensor(recall, dtype=torch.float64, device="cpu")
        shape = (len(kappas), len(recall))
        self.losses = torch.zeros(shape, dtype=torch.float64, device="cpu")
        self.gains, self.squares = torch.zeros_like(self.losses), torch.zeros_like(self.losses)

    def update(self, losses: Tensor) -> None:
        """Fold one batch in: losses ``[..., P]`` of each prompt, size 1 where all candidates are the same."""
        losses = losses.expand(*self.losses.shape, -1)
        gains = losses[self.default] - losses
        before = torch.stack([self.losses, self.gains, self.squares])
        decay = before.new_tensor([self.DECAY, self.DECAY, self.DECAY**2]).view(3, *[1] * self.losses.dim())
        after = decay * before + torch.stack([losses.sum(-1), gains.sum(-1), gains.square().sum(-1)])
        after = torch.where(after.isfinite().all(), after, before)  # w r^2 of absurd size says nothing
        self.losses, self.gains, self.squares = after.unbind()

    def best(self) -> tuple[Tensor, Tensor]:
        """Its index among the kappas, and among the shares that are recalled."""
        score = self.gains - self.ERRORS * self.squares.sqrt()
        score = torch.where(score > 0, score, -torch.inf)
        score[self.default] = 0.0
        k, m = torch.unravel_index(score.argmax(), score.shape)
        return k, m

    def shrinkages(self) -> Tensor:
        """``kappa / (1 + kappa)`` of all candidates."""
        return torch.where(self.kappas.isinf(), 1, self.kappas / (1 + self.kappas))


class PromptMemory:
    """Sums of the outputs that each prompt had before, in weights relative to those of their time.

    Between two visits gradients shrink as the policy grows confident; what stays comparable is a weight relative to the
    mean weight of its batch. Each visit counts ``DECAY`` times the next one.
    """

    DECAY = 0.7

    def __init__(self) -> None:
        self.ids = torch.zeros(0, dtype=torch.int64, device="cpu")
        self.sums = torch.zeros(0, 4, dtype=torch.float64, device="cpu")

    def recall(self, ids: Tensor) -> Tensor:
        """``[P] -> [P, 4]``; zeros for a prompt never seen."""
        if not len(self.ids):
            return self.sums.new_zeros(len(ids), 4)
        place = torch.searchsorted(self.ids, ids).clamp_max(len(self.ids) - 1)
        return torch.where((self.ids[place] == ids)[:, None], self.sums[place], 0)

    def update(self, ids: Tensor, sums: Tensor) -> None:
        """Fold in one visit of prompts ``[P]`` with sums ``[P, 4]``; a prompt may occur twice."""
        merged, index = torch.unique(torch.cat([self.ids, ids]), return_inverse=True)
        old, new = index.split([len(self.ids), len(ids)])
        total = sums.new_zeros(len(merged), 4).index_copy_(0, old, self.sums)
        total[new] *= self.DECAY
        self.ids, self.sums = merged, total.index_add_(0, new, sums)


def _padded(rows: Tensor, least: int) -> Tensor:
    """Zeros below, up to ``least`` rows."""
    return torch.nn.functional.pad(rows, (0, 0, 0, max(0, least - len(rows))))


# ------------------------------------------------------------------------------------------------------- as state
def state_of(parts: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor of the parts, as ``part.name``."""
    return {
        f"{part}.{name}": value
        for part, owner in parts.items()
        for name, value in vars(owner).items()
        if isinstance(value, Tensor)
    }


def load_state(parts: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Put the tensors back where :func:`state_of` found them."""
    own = state_of(parts)
    if set(state) != set(own):
        raise ValueError(f"state_dict: missing or unexpected keys {sorted(set(state) ^ set(own))}")
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.is_floating_point() != own[key].is_floating_point():
            raise ValueError(f"state_dict: {key}: expected a tensor like {own[key].dtype}, got {value!r}")
    settings = ("selection.kappas", "selection.recall")
    if any(state[key].tolist() != own[key].tolist() for key in settings):
        raise ValueError("state_dict: from a baseline with other settings of scope or kappa")
    ids, sums, pool = state["memory.ids"], state["memory.sums"], state["pool.sums"]
    tables = all(
        state[f"selection.{name}"].shape == own["selection.losses"].shape for name in ("losses", "gains", "squares")
    )
    if not tables or pool.dim() not in (1, 2) or pool.shape[-1] != 4 or sums.shape != (*ids.shape, 4) or ids.dim() != 1:
        raise ValueError(
            f"state_dict: unexpected shapes { ({key: list(value.shape) for key, value in state.items()}) }"
        )
    if (ids.diff() <= 0).any():
        raise ValueError("state_dict: memory.ids: expected increasing ids")
    for key, value in state.items():
        part, name = key.split(".")
        setattr(parts[part], name, value.clone())


def move(parts: dict[str, Any], device: torch.device) -> None:
    """Bring all tensors to a device; floats are float64, float32 on mps."""
    exact = widest_dtype(device)
    for key, value in state_of(parts).items():
        dtype = exact if value.is_floating_point() else value.dtype
        if value.device != device or value.dtype != dtype:
            part, name = key.split(".")
            setattr(parts[part], name, value.to(device, dtype))
