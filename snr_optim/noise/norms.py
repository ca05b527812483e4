"""The norm in which gradients are measured: the Euclidean one, or the one in which Adam takes its steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from snr_kernels.precision import widest_dtype

Norm: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (parameter, a gradient of it) -> 0-d, float32 at least

CHUNK = 1 << 20  # elements that AdamNorm works on at a time


def euclidean(parameter: Tensor, gradient: Tensor) -> Tensor:
    """``||g||``, accumulated in float32 at least."""
    return _norm(_values(gradient))


class AdamNorm:
    r"""The norm of a gradient in the metric of Adam's step, with the second moment of the steps before.

    .. math::
        \|g\|_P^2 = \sum_i \frac{g_i^2}{\sqrt{\hat v_i} + \epsilon}

    For an update ``-eta P g`` and smoothness measured in the ``P^{-1}`` metric, the descent bound of OBLR-PO
    (arXiv 2511.23310, theorem 3) is minimised by the same ``S / (S + V)`` with these norms. ``v`` lags one step, so
    it is independent of the noise in ``g``.

    Any optimizer that keeps ``exp_avg_sq`` and ``step`` will do: Adam, AdamW, NAdam, RAdam, SparseAdam, fused or not.
    One that turns out not to gets Euclidean norms, after one warning.

    Args:
        optimizer: its state is read, never changed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._group_of: dict[int, int] = {}
        self._warned = False

    @staticmethod
    def suits(optimizer: Optimizer) -> bool:
        """Whether the optimizer looks like Adam: before its first step, its settings must tell."""
        return {"betas", "eps"} <= optimizer.defaults.keys()

    def __call__(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """``||g||_P``; NaN before the first step, when there is no second moment yet, but 0 for zeros."""
        state = self._optimizer.state.get(parameter)
        if not state or _has_not_stepped(state):
            norm = euclidean(parameter, gradient)
            return torch.where(norm == 0, norm, torch.nan)
        if not {"exp_avg_sq", "step"} <= state.keys():
            return self._fall_back(parameter, gradient)
        settings = self._settings_of(parameter)
        second_moment = state["max_exp_avg_sq"] if settings.get("amsgrad") else state["exp_avg_sq"]
        if gradient.is_sparse:
            gradient = gradient.coalesce()
            second_moment, gradient = second_moment[tuple(gradient.indices())], gradient.values()
        correction = (1 - settings["betas"][1] ** _double(state["step"])) ** 0.5  # in float32 it would lose digits
        total: Tensor | float = 0.0
        for g, v in zip(_chunks(gradient), _chunks(second_moment), strict=True):
            total = total + _norm(g / (v.sqrt() / correction + settings["eps"]).sqrt()).square()
        return torch.as_tensor(total).sqrt()

    def _fall_back(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        if not self._warned:
            self._warned = True
            name = type(self._optimizer).__name__
            warnings.warn(f"AdamNorm: {name} keeps no exp_avg_sq as Adam does; norms are Euclidean.", stacklevel=2)
        return euclidean(parameter, gradient)

    def _settings_of(self, parameter: Tensor) -> dict[str, Any]:
        groups = self._optimizer.param_groups  # never kept: load_state_dict() replaces them
        if id(parameter) not in self._group_of:
            self._group_of = {id(p): number for number, group in enumerate(groups) for p in group["params"]}
        settings: dict[str, Any] = groups[self._group_of[id(parameter)]]
        return settings


def _has_not_stepped(state: dict[str, Any]) -> bool:
    """Whether the state was made by a step that a ``GradScaler`` skipped; a step count on a device is not asked."""
    step = state.get("step", 1)
    return bool(step == 0) if not isinstance(step, Tensor) or step.device.type == "cpu" else False


def _double(step: Any) -> Any:
    return step.to(widest_dtype(step.device)) if isinstance(step, Tensor) else step


def _chunks(values: Tensor) -> Iterator[Tensor]:
    """Real, flat, and float32 at least."""
    values = torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
    for chunk in torch.split(values.flatten(), CHUNK):
        yield chunk.to(torch.promote_types(chunk.dtype, torch.float32))


def _values(gradient: Tensor) -> Tensor:
    """The entries that are stored; those of a sparse gradient that share an index are summed first."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient.detach()


def _norm(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
    return norm


class SquaresByGroup:
    """Sums of squared norms over the parameters of each parameter group.

    Args:
        sizes: how many parameters each parameter group has; they are numbered in the order of the groups.
        device: where the sums are taken.
    """

    def __init__(self, sizes: list[int], device: torch.device) -> None:
        self._group_of = [number for number, size in enumerate(sizes) for _ in range(size)]
        self._num_groups, self._device = len(sizes), device

    def __call__(self, norms: dict[int, Tensor]) -> Tensor:
        """Of norms by the number of their parameter; ``[parameter groups]``."""
        by_group: list[list[Tensor]] = [[] for _ in range(self._num_groups)]
        for i, norm in norms.items():
            by_group[self._group_of[i]].append(norm)
        return torch.stack([sum_of_squares(norms_of_group, self._device) for norms_of_group in by_group])


def sum_of_squares(norms: list[Tensor], device: torch.device) -> Tensor:
    """In float64 where the device has it; norms from several devices meet on ``device``."""
    dtype = widest_dtype(device)
    by_device: dict[torch.device, list[Tensor]] = {}
    for norm in norms:
        by_device.setdefault(norm.device, []).append(norm)
    total = torch.zeros((), dtype=dtype, device=device)
    for of_device in by_device.values():
        total = total + torch.stack(of_device).to(device, dtype).square().sum()
    return total
