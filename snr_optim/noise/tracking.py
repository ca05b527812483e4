"""What is kept of a batch while its gradients arrive: norms and versions, never a gradient. And the order of hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle


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


class GradientHook:
    """Ours on a parameter. It must come last: what the last hook leaves is what is added to ``.grad``."""

    changes_nothing = True
    __torch_unserializable__ = True  # torch would warn that a pickled parameter has lost it, as it should

    def __init__(self, on_gradient: Callable[[int, Tensor], None], index: int) -> None:
        self._on_gradient, self._index = on_gradient, index

    def __call__(self, gradient: Tensor) -> None:
        self._on_gradient(self._index, gradient)


class PostAccumulateGuard:
    """Two hooks around somebody else's hooks that run when a gradient was added to ``.grad``: did they change it?"""

    __torch_unserializable__ = True

    def __init__(
        self, norm_of_grad: Callable[[Tensor], Tensor | None], report: Callable[[Tensor | None], None]
    ) -> None:
        self._norm_of_grad, self._report = norm_of_grad, report
        self._norm: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def surround(self, parameter: Any) -> None:
        """Be the first and the last of the parameter's hooks, where there are others."""
        hooks = parameter._post_accumulate_grad_hooks or {}
        others = [
            number for number, hook in hooks.items() if not isinstance(getattr(hook, "__self__", None), type(self))
        ]
        if not others:
            return
        order = list(hooks)
        ours = [handle.id for handle in self._handles]
        if ours and order.index(ours[0]) < order.index(others[0]) and order.index(ours[1]) > order.index(others[-1]):
            return
        self.remove()
        others_first = dict(hooks)
        hooks.clear()  # in place: the engine holds this very dict, and goes by its order of insertion
        self._handles = [parameter.register_post_accumulate_grad_hook(self._before)]
        hooks.update(others_first)
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, parameter: Tensor) -> None:
        self._norm = self._norm_of_grad(parameter)

    def _after(self, parameter: Tensor) -> None:
        before, self._norm = self._norm, None
        after = self._norm_of_grad(parameter)
        self._report(None if before is None or after is None else difference(after, before))


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
