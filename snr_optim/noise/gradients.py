"""Where the gradients of a model lie while it trains: the leaves at which they arrive, and this process's ``.grad``.

Here: the interface, for a model of one process. :mod:`~snr_optim.noise.data_parallel` has those of several.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class SubBatchSums(NamedTuple):
    """What the sub-batches of a batch add up to, for each parameter group; over all ranks in the end.

    Attributes:
        scaled: ``sum_k ||h_k||^2 / n_k``; NaN where it is not known.
        of_grad: ``||.grad||^2``.
        size: ``sum_k n_k``.
        num: the number of sub-batches ``m``.
    """

    scaled: Tensor
    of_grad: Tensor
    size: float | Tensor
    num: int | Tensor


class LocalGradients:
    """The gradients of one process: they arrive at the parameters, and ``.grad`` is their sum.

    Args:
        model: it is asked how it is parallelised.
        parameters: those that are watched.

    Raises:
        RuntimeError: the parameters are sharded.
    """

    grad_is_what_arrived = True  # after the first backward pass of a batch, so that they can be compared
    spans_processes = False  # whether the moments are those of all processes

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self._smallest = _smallest(parameters)
        self.expect_supported()

    def expect_supported(self) -> None:
        """Raise a RuntimeError that says why the parameters cannot be watched, if they cannot."""
        if any(hasattr(p, "placements") for p in self.parameters):
            raise RuntimeError("model: its parameters are DTensors, but not of fully_shard: that is not supported")

    def watch(self, watch_leaf: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        """Call ``watch_leaf(index, leaf)`` for the leaf of each parameter, now or in the forward pass that makes it.

        Returns:
            The handles of what does it in the forward pass.
        """
        for index, parameter in enumerate(self.parameters):
            watch_leaf(index, parameter)
        return []

    def leaf(self, index: int) -> Tensor:
        """The tensor at which the gradient of a parameter arrives."""
        return self.parameters[index]

    def grad_of(self, parameter: Tensor) -> Tensor | None:
        """This process's part of a ``.grad``."""
        return parameter.grad

    def to_measure(self, arrived: Iterable[int]) -> Iterable[int]:
        """The parameters whose ``.grad`` may have changed by a backward pass that brought gradients to ``arrived``."""
        return arrived

    def is_reduced(self, before: list[GradState]) -> bool:
        """Whether ``.grad``, which was as in ``before`` when a backward pass began, is now that of all ranks."""
        return True

    def undisturbed(self) -> list[int]:
        """Some parameters whose ``.grad`` is as the last backward pass has left it, unless somebody has changed it."""
        return self._smallest

    def states(self) -> list[GradState]:
        """How every ``.grad`` is now."""
        return [GradState(p) for p in self.parameters]

    def gone_since(self, states: list[GradState]) -> bool:
        """Whether a ``.grad`` that was there is not there any more."""
        return any(p.grad is None and not state.empty for state, p in zip(states, self.parameters, strict=False))

    def changed_since(self, states: list[GradState]) -> bool:
        """Whether anyone has cleared or replaced a ``.grad``, or written to it."""
        return not all(state.holds(p) for state, p in zip(states, self.parameters, strict=False))

    def check(self, of_grad: dict[int, Tensor]) -> tuple[list[Tensor], str | None]:
        """Look at a batch that has left these norms of ``.grad``, by parameter.

        Returns:
            Norms that must be zero, or the batch cannot be measured; and why it cannot, where that is known already.
        """
        return [], None

    def sum_over_ranks(self, sums: SubBatchSums, *, stated: bool, measured: bool) -> tuple[SubBatchSums, str | None]:
        """Add the sums of all ranks up.

        Args:
            sums: those of this rank.
            stated: whether it stated the sizes of its sub-batches.
            measured: whether it saw any ``.grad``.

        Returns:
            The sums, the same on all ranks; and what is wrong, where it is known without waiting for a device.
        """
        return sums, None


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


def _smallest(parameters: list[Tensor], elements: int = 1 << 20) -> list[int]:
    """The smallest parameters, of so many elements together; one at least."""
    chosen: list[int] = []
    for index in sorted(range(len(parameters)), key=lambda i: parameters[i].numel()):
        elements -= parameters[index].numel()
        if chosen and elements < 0:
            break
        chosen.append(index)
    return chosen
