"""What the ops on log-probs take and return, with logits or without: labels to leave out, temperatures, statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100  # the label of a row that is left out, as in torch's cross_entropy


class LogprobStats(NamedTuple):
    """Per-token statistics of ``p = softmax(logits / temperature)``, each of the shape of ``labels``.

    A statistic is None where ``outputs=`` has left it out.

    Attributes:
        log_prob: ``log p_y`` in nats.
        entropy: ``-sum_v p_v log p_v`` in nats.
        sum_p_squared: ``sum_v p_v^2``, the collision probability.
        grad_norm_squared: ``||e_y - p||^2 = ||d log p_y / d (logits / temperature)||^2``, in ``[0, 2]``.
    """

    log_prob: Tensor | None
    entropy: Tensor | None
    sum_p_squared: Tensor | None
    grad_norm_squared: Tensor | None


def temperature_tensor(temperature: float | Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperature as ``[]`` or ``[...]``, in the dtype of the arithmetic, on the device of the labels."""
    if not isinstance(temperature, Tensor):
        limits = torch.finfo(dtype)
        if not limits.tiny <= temperature <= limits.max:
            raise ValueError(f"temperature: expected a positive number that {dtype} holds, got {temperature!r}")
        return torch.full((), temperature, dtype=dtype, device=labels.device)
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected a number or a floating tensor, got {temperature.dtype}")
    if temperature.dim() and temperature.shape != labels.shape:
        expected = f"a number or the shape of labels, {list(labels.shape)}"
        raise ValueError(f"temperature: expected {expected}, got {list(temperature.shape)}")
    if temperature.device != labels.device:
        raise ValueError(f"temperature: expected the device of labels, {labels.device}, got {temperature.device}")
    if temperature.requires_grad:
        raise ValueError("temperature: expected a tensor without gradient; detach() it")
    return temperature.to(dtype)
