"""Moments from the backward passes of one process: every ``backward()`` between two optimizer steps is a sub-batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snr_optim.moments import ROUNDING, GradientMoments
from snr_optim.sources.backward import at_end_of_backward, current_backward, in_reentrant_checkpoint
from snr_optim.sources.norms import Norm, euclidean


class AccumulationSource:
    r"""Catches the norm of each micro-batch gradient on its way into ``.grad``.

    Backward pass ``k`` adds ``h_k`` to ``.grad``, which ends as ``g_hat = sum_k h_k``. With ``h_k = c_k g_k``, where
    ``c_k`` is the share of sub-batch ``k`` in the batch,

    .. math::
        \sum_k c_k \|g_k\|^2 = \sum_k \|h_k\|^2 / c_k

    Leaf hooks see every ``h_k`` whole, tied weights included, and the norm of ``.grad`` is taken when a backward pass
    ends, before anything can clip or unscale it. No gradient is kept, nothing waits for a device.

    **Scale and shares.** Sub-batches count equally unless :meth:`sub_batch` states their sizes: right for micro-batches
    of equal size, and for the mean of their mean losses. Whether the losses are divided by the number of
    micro-batches does not matter to ``S / (S + V)``: it scales all norms alike. The unit is the prompt: put all
    sequences of a prompt into the same micro-batch.

    **What is no gradient of the loss** never becomes one. A batch whose ``.grad`` was cleared without a call to
    :meth:`moments` is dropped and counted in ``dropped``. Where ``.grad`` was not empty before the first backward
    pass, or was changed between two of them, or where a parameter got its gradient in pieces, the moments are NaN, and
    :class:`SNRAdaptiveLR` counts them as invalid. ``torch.autograd.grad`` leaves ``.grad`` alone and does not count.

    Args:
        model: its parameters that require grad now are watched; no change to model or loss.
        param_groups: the parameters to watch instead, in groups; :meth:`group_moments` tells them apart.
        norm: the norm of a gradient: :func:`euclidean`, or an :class:`AdamNorm`.

    Raises:
        ValueError: no parameter requires grad.
        RuntimeError: parameters are sharded (DTensor).

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> source = AccumulationSource(model)
        >>> for x in (3.0, 1.0):
        ...     (model(torch.tensor([[x]])).sum() / 2).backward()
        >>> moments = source.moments()
        >>> moments.sq_norm_of_mean.item(), moments.mean_of_sq_norms.item(), moments.num
        (4.0, 5.0, 2)
    """

    def __init__(
        self, model: nn.Module, param_groups: Iterable[Iterable[Tensor]] | None = None, *, norm: Norm = euclidean
    ) -> None:
        self.model = model
        groups = [model.parameters()] if param_groups is None else param_groups
        watched = [[p for p in group if p.requires_grad] for group in groups]
        self.parameters = [p for group in watched for p in group]
        self._group_of = [number for number, group in enumerate(watched) for _ in group]
        self._num_groups = len(watched)
        if not self.parameters:
            raise ValueError("model: expected at least one parameter with requires_grad")
        self._norm = norm
        self._device = self.parameters[0].device
        self.dropped = 0
        self._batch = _Batch()
        self._sub_batch: _SubBatch | None = None  # the one whose gradients are arriving
        self._stated_size: float | None = None  # of the sub_batch() that is open
        self._running: dict[int, set[int]] = {}  # backward passes that have not ended: whose gradients came
        self._latest = -1  # the one that began last
        self._state: list[_GradState] = []  # how the last backward pass left every .grad
        self._warned = False
        self._handles: list[RemovableHandle] = []
        self._watch()

    # -- what a source yields -----------------------------------------------------------------------

    @property
    def recorded(self) -> bool:
        """Has a gradient come since the last call of :meth:`moments`?"""
        return self._sub_batch is not None or bool(self._batch.sizes)

    def moments(self) -> GradientMoments:
        """Moments of the batch accumulated since the last call; starts the next batch.

        Call it at any time between the last backward pass and the next: clipping, unscaling and the optimizer do
        not matter. Never raises: with no backward pass ``num`` is 1, and what cannot be measured is NaN.
        """
        return GradientMoments.of_parts(self.group_moments())

    @torch.no_grad()
    def group_moments(self) -> list[GradientMoments]:
        """The same, one for each parameter group."""
        self._close()
        batch, self._batch = self._batch, _Batch()
        self._state = []
        return self._to_moments(*self._sums(batch))

    @contextmanager
    def sub_batch(self, size: float) -> Iterator[None]:
        """States the size of the backward pass within: its number of prompts, or its share of the batch.

        For micro-batches of unequal size whose gradients are sums over their prompts, all scaled alike. Either all
        sub-batches of a batch have their sizes stated, or none.

        Args:
            size: positive, in the same unit for the whole batch.

        Raises:
            ValueError: ``size`` is not positive and finite.
            RuntimeError: sub-batches are nested; no gradient came; or a parameter got its gradient in pieces, as
                from two backward passes.
        """
        if not 0 < size < float("inf"):
            raise ValueError(f"size: expected a positive number of prompts, or a share, got {size!r}")
        if self._stated_size is not None:
            raise RuntimeError("sub_batch: the previous sub-batch is still open")
        self._close()
        self._stated_size = float(size)
        try:
            yield
        finally:
            arrived, self._stated_size = self._sub_batch, None
        if arrived is None:
            raise RuntimeError("sub_batch: no gradient reached the parameters; was backward() called?")
        if arrived.in_pieces:
            raise RuntimeError("sub_batch: a parameter got a gradient twice; expected one backward() per sub_batch")
        self._close()

    def remove(self) -> None:
        """Take the hooks off; the source yields nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # -- gradients arriving -------------------------------------------------------------------------

    def _watch(self) -> None:
        if any(hasattr(p, "placements") for p in self.parameters):
            raise RuntimeError("model: sharded (DTensor) parameters are not supported by AccumulationSource")
        for index, parameter in enumerate(self.parameters):
            self._watch_parameter(index, parameter)

    def _watch_parameter(self, index: int, parameter: Tensor) -> None:
        handle = parameter.register_hook(partial(self._on_gradient, index))  # type: ignore[no-untyped-call]
        self._handles.append(handle)

    @torch.no_grad()
    def _on_gradient(self, index: int, gradient: Tensor) -> None:
        if current_backward() not in self._running:
            self._on_begin(current_backward(), index)
        sub_batch = self._sub_batch
        if sub_batch is None or (index in sub_batch.norms and sub_batch.nested and self._stated_size is None):
            sub_batch = self._open()
        if index in sub_batch.norms:
            sub_batch.in_pieces = True  # ||a + b||^2 is not ||a||^2 + ||b||^2
        sub_batch.norms[index] = self._norm(self.parameters[index], gradient)
        self._running[current_backward()].add(index)

    def _on_begin(self, backward: int, index: int) -> None:
        """The first gradient of a backward pass, that of parameter ``index``, has come."""
        nested = in_reentrant_checkpoint()
        if self._running and not nested:  # its end never came
            self._running.clear()
            self._drop()
        # A pass that began before the latest one is that around a checkpoint's: both are one backward().
        another = not nested and backward > self._latest
        self._running[backward] = set()
        self._latest = max(self._latest, backward)
        if self._sub_batch is None or (another and self._stated_size is None):
            self._open()
        assert self._sub_batch is not None
        self._sub_batch.nested |= nested
        at_end_of_backward(partial(self._on_end, backward, index, self._grad_states()))

    @torch.no_grad()
    def _on_end(self, backward: int, index: int, before: list[_GradState]) -> None:
        """A backward pass is over, and its gradients are in ``.grad``."""
        arrived = self._running.pop(backward, set())
        if self._sub_batch is None:
            return
        after = self._grad_states()
        if not self._accumulated(index, before, after):  # it was torch.autograd.grad
            for i in arrived:
                self._sub_batch.norms.pop(i, None)
            return
        self._batch.reduced = self._reduced(before, after)
        if self._batch.reduced:
            self._measure(arrived)
        self._state = after

    def _open(self) -> _SubBatch:
        """A sub-batch begins; and a new batch with it, where ``.grad`` was cleared or changed since the last one."""
        if self._state and self._changed(self._state, self._grad_states()):
            self._drop()
        self._close()
        if (
            not self._batch.sizes
        ):  # .grad should be None or zero: what is left of it tells when the moments are computed
            self._batch.rest = [self._norm_of_grad(p) for p in self.parameters if p.grad is not None]
        self._sub_batch = _SubBatch(self._stated_size)
        return self._sub_batch

    def _drop(self) -> None:
        self.dropped += 1
        self._batch, self._sub_batch, self._state = _Batch(), None, []

    def _close(self) -> None:
        """Fold the sub-batch that is open into the batch."""
        sub_batch, self._sub_batch = self._sub_batch, None
        if sub_batch is None or not sub_batch.norms:
            return
        batch, size = self._batch, sub_batch.size
        if batch.sizes and batch.stated != (size is not None):
            batch.fault = "some sub-batches have their sizes stated and some have not"
        if sub_batch.in_pieces:
            batch.fault = "a parameter got its gradient in pieces: reentrant checkpointing of a shared module?"
        batch.stated = size is not None
        batch.sizes.append(size or 1.0)
        batch.scaled.append(self._by_group(sub_batch.norms) / batch.sizes[-1])

    # -- what lies in .grad -------------------------------------------------------------------------

    def _grad_states(self) -> list[_GradState]:
        return [_GradState.of(p) for p in self.parameters]

    def _accumulated(self, index: int, before: list[_GradState], after: list[_GradState]) -> bool:
        """Did the backward pass add the gradient of parameter ``index`` to its ``.grad``?"""
        return before[index] != after[index]

    def _changed(self, before: list[_GradState], after: list[_GradState]) -> bool:
        """Has anyone cleared or changed ``.grad`` between two backward passes?"""
        return before != after

    def _reduced(self, before: list[_GradState], after: list[_GradState]) -> bool:
        """Is ``.grad`` now the gradient of all ranks?"""
        return True

    def _measure(self, arrived: Iterable[int]) -> None:
        """Take the norm of ``.grad`` where the backward pass that is over has added to it."""
        for i in arrived:
            self._batch.of_grad[i] = self._norm_of_grad(self.parameters[i])

    def _norm_of_grad(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return self._norm(parameter, parameter.grad)

    # -- sums ---------------------------------------------------------------------------------------

    def _by_group(self, norms: dict[int, Tensor]) -> Tensor:
        """Squared norms summed over the parameters of each group, in float64 where the device has it."""
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        sums = torch.zeros(self._num_groups, dtype=dtype, device=self._device)
        if norms:
            values = torch.stack([norm.to(self._device, dtype, non_blocking=True) for norm in norms.values()])
            groups = torch.tensor([self._group_of[i] for i in norms], device=self._device)
            sums.index_add_(0, groups, values.square())
        return sums

    def _sums(self, batch: _Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        """Over the batch, by group: ``sum_k ||h_k||^2 / n_k`` and ``||.grad||^2``; then ``sum_k n_k`` and ``m``."""
        scaled, of_grad = self._by_group({}), self._by_group(batch.of_grad)
        for sub_batch in batch.scaled:
            scaled = scaled + sub_batch
        if batch.rest:
            rest = torch.stack([norm.to(self._device) for norm in batch.rest]).square().sum()
            scaled = torch.where(rest == 0, scaled, torch.nan)
            if self._device.type == "cpu" and rest != 0:
                batch.fault = (
                    ".grad was not empty before its first backward pass (zero_grad() forgotten?) or was changed"
                )
        if not batch.reduced:
            batch.fault = "after its last backward pass .grad was not reduced over the ranks (no_sync?)"
        if batch.fault is not None:
            self._warn(batch.fault)
            scaled = scaled * torch.nan
        return scaled, of_grad, sum(batch.sizes), len(batch.sizes)

    def _warn(self, fault: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"A batch could not be measured, and counts as invalid: {fault}.", stacklevel=2)

    def _to_moments(
        self, scaled: Tensor, of_grad: Tensor, total: float | Tensor, num: int | Tensor
    ) -> list[GradientMoments]:
        mean_of_sq_norms = total * scaled
        if isinstance(num, int) and num == 0:
            mean_of_sq_norms, num = mean_of_sq_norms * torch.nan, 1
        possible = mean_of_sq_norms >= (1 - ROUNDING) * of_grad
        mean_of_sq_norms = torch.where(possible, mean_of_sq_norms, torch.nan)
        pairs = zip(of_grad.unbind(), mean_of_sq_norms.unbind(), strict=True)
        return [GradientMoments(*pair, num) for pair in pairs]


class _GradState(NamedTuple):
    """Tells whether a ``.grad`` was replaced or written to, without reading it and without keeping it alive."""

    identity: int
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> _GradState:
        if parameter.grad is None:
            return cls(0, 0)
        local = getattr(parameter.grad, "_local_tensor", parameter.grad)  # what fully_shard writes to
        return cls(id(local), local._version)


@dataclass
class _SubBatch:
    """The gradients of one backward pass, as they arrive."""

    size: float | None  # as stated
    norms: dict[int, Tensor] = field(default_factory=dict)  # ||h_k|| by parameter
    nested: bool = False  # some came from within a reentrant checkpoint
    in_pieces: bool = False


@dataclass
class _Batch:
    """What is kept of the sub-batches since ``.grad`` was empty."""

    sizes: list[float] = field(default_factory=list)  # n_k
    scaled: list[Tensor] = field(default_factory=list)  # ||h_k||^2 / n_k, by group
    of_grad: dict[int, Tensor] = field(default_factory=dict)  # ||.grad|| by parameter, after the last backward pass
    rest: list[Tensor] = field(default_factory=list)  # ||.grad|| before the first one
    stated: bool = False  # the sizes
    reduced: bool = True  # .grad, over the ranks, after the last backward pass
    fault: str | None = None
