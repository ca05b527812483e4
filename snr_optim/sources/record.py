"""What is kept of a batch while its gradients arrive: norms and versions, never a gradient."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class GradState:
    """Tells whether a ``.grad`` was replaced or written to, without reading it and without keeping it alive."""

    def __init__(self, parameter: Tensor) -> None:
        local = self._local(parameter)
        self._reference = None if local is None else weakref.ref(local)
        self._versions = self._versions_of(parameter)

    def holds(self, parameter: Tensor) -> bool:
        local = self._local(parameter)
        same = local is None if self._reference is None else self._reference() is local
        return same and self._versions == self._versions_of(parameter)

    @property
    def empty(self) -> bool:
        return self._reference is None

    @staticmethod
    def _local(parameter: Tensor) -> Tensor | None:
        return getattr(parameter.grad, "_local_tensor", parameter.grad)  # fully_shard writes to the shard within

    @staticmethod
    def _versions_of(parameter: Tensor) -> tuple[int, ...]:
        local = GradState._local(parameter)
        return () if local is None or parameter.grad is None else (local._version, parameter.grad._version)


class Origin(NamedTuple):
    """Where a dense gradient lies, and how often it was written to: equal for the gradient that became ``.grad``."""

    address: int
    version: int

    @classmethod
    def of(cls, gradient: Tensor) -> Origin | None:
        return None if gradient.is_sparse else cls(gradient.data_ptr(), gradient._version)


@dataclass
class BackwardPass:
    """A run of the autograd engine."""

    nested: bool  # in the backward of a Function, as reentrant checkpoints do
    first: int  # the parameter whose gradient came first
    states: list[GradState]  # of every .grad when it began
    arrived: set[int] = field(default_factory=set)


@dataclass
class SubBatch:
    """The gradients of one backward(), as they arrive."""

    size: float | None  # as stated
    norms: dict[int, Tensor] = field(default_factory=dict)  # ||h_k|| by parameter
    origins: dict[int, Origin | None] = field(default_factory=dict)  # where .grad was still empty
    in_pieces: bool = False


@dataclass
class Batch:
    """What is kept of the sub-batches since ``.grad`` was empty."""

    sizes: list[float] = field(default_factory=list)  # n_k
    stated: bool = False  # the sizes
    scaled: list[Tensor] = field(default_factory=list)  # ||h_k||^2 / n_k, by group
    of_grad: dict[int, Tensor] = field(default_factory=dict)  # ||.grad|| by parameter, after the last backward pass
    reduced: bool = True  # .grad, over the ranks, after it
    must_be_zero: list[Tensor] = field(default_factory=list)  # or .grad holds something else
    seen: set[int] = field(default_factory=set)  # parameters that got a gradient
    overlap: bool = False  # some of them from two sub-batches
    fault: str | None = None


def difference(norm: Tensor, other: Tensor) -> Tensor:
    """Zero where two norms agree up to the order of their sums; also where one is not finite, which tells by itself."""
    return ((norm - other).abs() - 1e-3 * other).clamp_min(0).nan_to_num(0.0)


def sum_of_squares(norms: list[Tensor], device: torch.device) -> Tensor:
    """In float64 where the device has it; norms from several devices meet on ``device``."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    by_device: dict[torch.device, list[Tensor]] = {}
    for norm in norms:
        by_device.setdefault(norm.device, []).append(norm)
    total = torch.zeros((), dtype=dtype, device=device)
    for of_device in by_device.values():
        total = total + torch.stack(of_device).to(device, dtype).square().sum()
    return total
