"""verl's ``algorithm.adv_estimator``: ``grad_weighted`` and ``oblr_po``.

Here: the way from the tensors that verl has of a batch to advantages. ``trainers.py`` brings the tensors here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from snr_optim.baseline import GradWeightedBaseline
from snr_optim.grad_norms.proxies import chosen_token_grad_norms

OPTIONS = "snr_optim"  # algorithm.snr_optim holds the options of the baseline, and the kind of its weights
WEIGHTS = ("logit", "length", "none")
DEFAULT_SCOPES = {"grad_weighted": "shrink", "oblr_po": "group"}

# By the name of the estimator, with the options that it was built with: a baseline learns from batch to batch.
_baselines: dict[str, tuple[dict[str, Any], GradWeightedBaseline]] = {}


def grad_weighted(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Iterable[Hashable] | None = None,
    config: Mapping[str, Any] | None = None,
    batch: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    r"""Advantages against :class:`~snr_optim.GradWeightedBaseline`, which learns from batch to batch.

    .. math::
        A_i = r_i - b_i, \qquad
        w_i = \sum_t c_{it}^2\, \|e_{o_{it}} - \pi_t\|^2

    ``r`` is the sum of a row's ``token_level_rewards``. ``w`` is the stand-in for the squared norm of the row's
    gradient that :func:`~snr_optim.logit_grad_norms` computes, here from what verl computes beside the old log-probs
    (:func:`token_grad_norms`, which says what is lost). ``c`` are verl's importance weights between rollout and
    training, and 1 without them.

    A row without a token that is trained on, such as verl's padding, is not scored: it gets advantage 0 and is part of
    no baseline. The same holds, with a warning, for a row whose reward or weight is NaN or infinite.

    ``+algorithm.snr_optim={scope: ..., kappa: ..., decay: ..., weights: ...}`` sets the options of the baseline;
    ``weights`` is ``logit`` (as above), ``length``, or ``none``.

    Args:
        token_level_rewards: ``[B, T]``.
        response_mask: ``[B, T]``, 1 where the policy chose the token.
        index: ``[B]``, equal for the outputs of one prompt: verl's ``uid``.
        config: verl's ``algorithm``.
        batch: verl's tensors by name: ``old_log_probs`` and ``sum_pi_squared`` ``[B, T]``, and ``rollout_is_weights``
            where verl has them.

    Returns:
        Advantages and returns (rewards-to-go), ``[B, T]``, 0 outside of ``response_mask``.

    Raises:
        ValueError: there is no ``index``; an option that the baseline does not have; ``weights=logit`` where the batch
            has no ``sum_pi_squared``.

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
    index: Iterable[Hashable] | None = None,
    config: Mapping[str, Any] | None = None,
    batch: Mapping[str, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The paper's baseline: as :func:`grad_weighted`, but within each prompt alone (arXiv 2511.23310, theorem 7)."""
    return _estimate("oblr_po", token_level_rewards, response_mask, index, config, batch)


Estimator = Callable[..., tuple[Tensor, Tensor]]
ESTIMATORS: dict[str, Estimator] = {"grad_weighted": grad_weighted, "oblr_po": oblr_po}


def token_grad_norms(log_probs: Tensor, sum_pi_squared: Tensor) -> Tensor:
    r"""``||e_y - p||^2`` of every token, from the two numbers that verl has of it.

    .. math::
        \|e_y - p\|^2 = (1 - p_y)^2 + R, \qquad
        R = \sum_{v \neq y} p_v^2 = \Big(\sum_v p_v^2\Big) - p_y^2 \in \big[0,\, (1 - p_y)^2\big]

    ``1 - p`` keeps the digits of ``log p`` (:func:`~snr_optim.grad_norms.proxies.chosen_token_grad_norms`). ``R`` is a
    difference of two rounded numbers, computed in float64 and put back between its bounds, so that whatever rounding
    has done to ``sum_pi_squared``, the result is within a factor of two of the true norm if ``log p`` is right.

    **What is lost.** verl computes ``sum_pi_squared`` in the precision of the logits. In a trial with 32,000 words it
    was off by up to 7e-6 of itself from float32 logits, so that ``R`` has no digit left where ``1 - p`` is below about
    2e-3; from bfloat16 logits it was off by 16 to 61 %. There the factor of two is all that is known. ``log p`` is
    itself the difference of a logit and its ``logsumexp``, rounded at about 1e-6 for float32 logits of size 20: a token
    with ``1 - p`` below that has a weight of about 1e-12, but not one digit of it. Where verl has bfloat16 logits but
    not flash-attn, it takes torch's log-softmax of them, which on a CPU was off by up to 3e-3 in ``log p``.
    :func:`~snr_optim.logit_grad_norms` loses none of this, but it needs logits, which do not leave verl's engine.

    Args:
        log_probs: any shape, ``log p`` of the chosen tokens.
        sum_pi_squared: the same shape, ``sum_v p_v^2``.

    Returns:
        The same shape in float64, between ``(1 - p)^2`` and twice that; NaN where an input is NaN.

    Example:
        >>> log_p, sum_pi_squared = torch.tensor([-1e-6]), torch.tensor([0.999998])  # a confident token, in float32
        >>> 0.999e-12 < token_grad_norms(log_p, sum_pi_squared).item() < 2.001e-12
        True
        >>> 1 - 2 * log_p.exp() + sum_pi_squared  # the textbook formula
        tensor([0.])
    """
    log_probs = log_probs.double()
    least = chosen_token_grad_norms(log_probs)
    others = sum_pi_squared.double() - (2 * log_probs).exp()
    return least + torch.minimum(others.clamp_min(0), least)


def baseline_of(name: str) -> GradWeightedBaseline | None:
    """Return the baseline that an estimator of this process learns with, or None before its first batch."""
    return _baselines[name][1] if name in _baselines else None


def configured_baseline(name: str, config: Mapping[str, Any] | None) -> GradWeightedBaseline:
    """Return the baseline that an estimator uses under a config; it is made where there is none yet.

    Args:
        name: the estimator's, as in ``ESTIMATORS``.
        config: verl's ``algorithm``.

    Raises:
        ValueError: an option that the baseline does not have.
    """
    return _configured(name, config)[0]


@torch.no_grad()
def _estimate(
    name: str,
    rewards: Tensor,
    mask: Tensor,
    index: Iterable[Hashable] | None,
    config: Mapping[str, Any] | None,
    batch: Mapping[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    if index is None:
        raise ValueError(f"{name}: expected the prompt of each row (uid in the batch), got none")
    baseline, kind = _configured(name, config)
    mask = mask.to(rewards)
    prompt_groups = _numbered(index).to(rewards.device)
    totals, weights = rewards.sum(1), _weights(name, kind, mask, batch)
    trained, finite = mask.any(dim=1), totals.isfinite() & weights.isfinite()
    if not finite[trained].all():
        warnings.warn(
            f"{name}: rewards, old_log_probs or sum_pi_squared are NaN or infinite in {int((~finite & trained).sum())} "
            "rows. These have advantage 0, and count in no baseline.",
            stacklevel=2,
        )
    totals, weights = totals.masked_fill(~(trained & finite), torch.nan), weights.masked_fill(~finite, 0)
    advantages = baseline.advantages(totals, weights, groups=prompt_groups, update=True)
    returns = rewards.flip(1).cumsum(1).flip(1)
    return advantages[:, None] * mask, returns * mask


def _configured(name: str, config: Mapping[str, Any] | None) -> tuple[GradWeightedBaseline, str]:
    """Return the baseline of an estimator in this process, and the kind of its weights."""
    options = dict((config or {}).get(OPTIONS) or {})
    kind = options.pop("weights", "logit")
    if kind not in WEIGHTS:
        raise ValueError(f"algorithm.{OPTIONS}.weights: expected one of {', '.join(WEIGHTS)}, got {kind!r}")
    options = {"scope": DEFAULT_SCOPES[name], **options}
    if name not in _baselines or _baselines[name][0] != options:
        try:
            _baselines[name] = options, GradWeightedBaseline(**options)
        except TypeError as error:
            raise ValueError(f"algorithm.{OPTIONS}: {error}") from None
    return _baselines[name][1], kind


def _weights(name: str, kind: str, mask: Tensor, batch: Mapping[str, Tensor] | None) -> Tensor:
    """Return ``[B]``, in float64 for ``kind="logit"``."""
    if kind == "none":
        return torch.ones_like(mask[:, 0])
    if kind == "length":
        return mask.sum(1)
    missing = [key for key in ("sum_pi_squared", "old_log_probs") if batch is None or key not in batch]
    if batch is None or missing:
        raise ValueError(
            f"{name}: {' and '.join(missing)} not in the batch. Set "
            "actor_rollout_ref.actor.calculate_sum_pi_squared=True (and use_fused_kernels=False, no bypass_mode), or "
            "+algorithm.snr_optim.weights=none, which costs most of what the baseline gains. "
            "`python -m snr_optim.integrations.verl check` tells more"
        )
    norms = token_grad_norms(batch["old_log_probs"], batch["sum_pi_squared"])
    if batch.get("rollout_is_weights") is not None:
        norms = norms * batch["rollout_is_weights"].double().square()
    return torch.where(mask > 0, norms, 0.0).sum(1)


def _numbered(index: Iterable[Hashable]) -> Tensor:
    """Number the prompts in the order of their first rows."""
    numbers: dict[Hashable, int] = {}
    return torch.tensor([numbers.setdefault(one, len(numbers)) for one in index])
