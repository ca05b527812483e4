"""verl's ``algorithm.adv_estimator``: ``grad_weighted`` and ``oblr_po``.

Here: from the tensors that verl has of a batch to advantages. How they get here is ``trainers.py``'s business.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from snr_optim.baseline import GradWeightedBaseline

OPTIONS = "snr_optim"  # algorithm.snr_optim: options of the baseline, and weights
WEIGHTS = ("logit", "length", "none")
SCOPES = {"grad_weighted": "shrink", "oblr_po": "group"}  # where the options do not tell

# By the name of the estimator, with their options: they learn from batch to batch.
_baselines: dict[str, tuple[dict[str, Any], GradWeightedBaseline]] = {}


def grad_weighted(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    batch: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    r"""Advantages against :class:`~snr_optim.GradWeightedBaseline`, which learns from batch to batch.

    .. math::
        A_i = r_i - b_i, \qquad
        w_i = \sum_t c_{it}^2 \big(1 - 2\,\pi(o_{it}) + \textstyle\sum_v \pi(v)^2\big)
            = \sum_t c_{it}^2\, \|e_{o_{it}} - \pi_t\|^2

    ``r`` is the sum of a row's ``token_level_rewards``, ``w`` the stand-in of :func:`~snr_optim.logit_grad_norms` for
    the norm of its gradient, from what verl computes beside the old log-probs; ``c`` are its importance weights between
    rollout and training, 1 without. Rows without a token that is trained on, such as verl's padding, are not scored:
    advantage 0, and no part of any baseline. Nor are those whose reward or weight is NaN or infinite, with a warning.

    ``+algorithm.snr_optim={scope: ..., kappa: ..., decay: ..., weights: ...}`` sets the options of the baseline;
    ``weights`` is ``logit`` (as above), ``length``, or ``none``.

    Args:
        token_level_rewards: ``[B, T]``.
        response_mask: ``[B, T]``, 1 where a token is the policy's own.
        index: ``[B]``, the same for outputs of one prompt: verl's ``uid``.
        config: verl's ``algorithm``.
        batch: verl's tensors by name: ``old_log_probs`` and ``sum_pi_squared`` ``[B, T]``, maybe
            ``rollout_is_weights``.

    Returns:
        Advantages and returns (rewards-to-go), ``[B, T]``, 0 outside of ``response_mask``.

    Raises:
        ValueError: no ``index``; options that the baseline does not have; ``weights=logit`` where the batch has no
            ``sum_pi_squared``.

    Example:
        >>> import numpy as np
        >>> from snr_optim.integrations.verl import oblr_po
        >>> rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
        >>> mask, uid = torch.ones(3, 2), np.array(["a", "a", "a"], dtype=object)
        >>> batch = {"old_log_probs": torch.full((3, 2), 0.5).log(), "sum_pi_squared": torch.full((3, 2), 0.5)}
        >>> oblr_po(rewards, mask, index=uid, config={}, batch=batch)[0]
        tensor([[ 1.0000,  1.0000],
                [-0.5000, -0.5000],
                [-0.5000, -0.5000]])
    """
    return _estimate("grad_weighted", token_level_rewards, response_mask, index, config, batch)


def oblr_po(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any = None,
    config: Any = None,
    batch: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The paper's: the same within each prompt alone, ``scope: group`` (arXiv 2511.23310, theorem 7)."""
    return _estimate("oblr_po", token_level_rewards, response_mask, index, config, batch)


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"grad_weighted": grad_weighted, "oblr_po": oblr_po}


def baseline_of(name: str) -> GradWeightedBaseline | None:
    """What an estimator of this process has learned; None before its first batch."""
    return _baselines[name][1] if name in _baselines else None


def restore(name: str, config: Any, state: dict[str, Any]) -> None:
    """Let an estimator go on from a saved state of its baseline.

    Raises:
        ValueError: it was saved with other options.
    """
    _configured(name, config)[0].load_state_dict(state)


def check_estimator(name: str, config: Any) -> None:
    """Refuse options that an estimator does not have, before there is a batch.

    Raises:
        ValueError: as :func:`grad_weighted`.
    """
    _configured(name, config)


@torch.no_grad()
def _estimate(name: str, rewards: Tensor, mask: Tensor, index: Any, config: Any, batch: Any) -> tuple[Tensor, Tensor]:
    if index is None:
        raise ValueError(f"{name}: expected the prompt of each row (uid in the batch), got none")
    baseline, kind = _configured(name, config)
    mask = mask.to(rewards)
    groups = _numbered(index).to(rewards.device)
    totals, weights = rewards.sum(1), _weights(name, kind, mask, batch)
    trained, finite = mask.any(dim=1), totals.isfinite() & weights.isfinite()
    if not finite[trained].all():
        warnings.warn(
            f"{name}: rewards, old_log_probs or sum_pi_squared are NaN or infinite in {int((~finite & trained).sum())} "
            "rows. These have advantage 0, and count in no baseline.",
            stacklevel=2,
        )
    totals, weights = totals.masked_fill(~(trained & finite), torch.nan), weights.masked_fill(~finite, 0)
    advantages = baseline.advantages(totals, weights, groups=groups, update=True)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    return advantages[:, None] * mask, to_go * mask


def _configured(name: str, config: Any) -> tuple[GradWeightedBaseline, str]:
    """The baseline that a name stands for in this process, and the kind of its weights."""
    options = dict((config or {}).get(OPTIONS) or {})
    kind = options.pop("weights", "logit")
    if kind not in WEIGHTS:
        raise ValueError(f"algorithm.{OPTIONS}.weights: expected one of {', '.join(WEIGHTS)}, got {kind!r}")
    options = {"scope": SCOPES[name], **options}
    if name not in _baselines or _baselines[name][0] != options:
        try:
            _baselines[name] = options, GradWeightedBaseline(**options)
        except TypeError as error:
            raise ValueError(f"algorithm.{OPTIONS}: {error}") from None
    return _baselines[name][1], kind


def _weights(name: str, kind: str, mask: Tensor, batch: Any) -> Tensor:
    if kind == "none":
        return torch.ones_like(mask[:, 0])
    if kind == "length":
        return mask.sum(1)
    missing = [key for key in ("sum_pi_squared", "old_log_probs") if batch is None or key not in batch]
    if missing:
        raise ValueError(
            f"{name}: {' and '.join(missing)} not in the batch. Set "
            "actor_rollout_ref.actor.calculate_sum_pi_squared=True (and use_fused_kernels=False, no bypass_mode), or "
            "+algorithm.snr_optim.weights=none, which costs most of what the baseline gains. "
            "`python -m snr_optim.integrations.verl check` tells more"
        )
    of_tokens = (1 - 2 * batch["old_log_probs"].float().exp() + batch["sum_pi_squared"].float()).clamp_min(0)
    if batch.get("rollout_is_weights") is not None:
        of_tokens = of_tokens * batch["rollout_is_weights"].float().square()
    return torch.where(mask > 0, of_tokens, 0.0).sum(1)


def _numbered(index: Any) -> Tensor:
    """Prompts by number, in order of their first row."""
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(one, len(numbers)) for one in index])
