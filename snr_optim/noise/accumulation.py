"""Moments from a training loop: every ``backward()`` between two optimizer steps is a sub-batch, on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from snr_optim.noise.data_parallel import gradients_of
from snr_optim.noise.gradients import LocalGradients, SubBatchSums
from snr_optim.noise.moments import ROUNDING, GradientMoments
from snr_optim.noise.norms import Norm, SquaresByGroup, euclidean, sum_of_squares
from snr_optim.noise.tracking import Accumulated, BatchTracker

NOT_EMPTY = (
    ".grad was not empty before its first backward pass (zero_grad() forgotten?), was changed between two of them or "
    "by a post-accumulate hook (clip after the last one, or by register_hook), or is not what our hooks saw: a hook "
    "that was registered later counts from the next batch on"
)
NOT_REDUCED = "after its last backward pass .grad was not reduced over the ranks (no_sync?)"
DISJOINT = (
    "no two backward passes have a parameter in common. Losses of different parts of a model are one sub-batch: "
    "`with handle.sub_batch(1): ...`"
)


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
    :meth:`moments` is dropped and counted in ``dropped``. The moments are NaN, which :class:`SNRAdaptiveLR` counts as
    invalid, where ``.grad`` was not empty before the first backward pass, was changed between two of them, by
    post-accumulate hooks too, is not what the hooks saw or was freed while ``backward()`` ran; where a parameter got
    its gradient in pieces, or a backward pass failed; and where no two backward passes have a parameter in common
    (losses of different parts: put them into one :meth:`sub_batch`). ``torch.autograd.grad`` leaves ``.grad`` alone
    and does not count. What other hooks on a parameter make of its gradient, whenever they were registered, is what is
    measured, as it is what is added to ``.grad``.

    **Several processes**: under DDP and ``fully_shard`` every backward pass of every rank is a sub-batch, and
    :meth:`moments` ends with one all-reduce of a few numbers: every rank must call it equally often.

    Args:
        model: its parameters that require grad now are watched; no change to model or loss.
        param_groups: the parameters to watch instead, in groups; :meth:`parameter_group_moments` tells them apart.
        norm: the norm of a gradient: :func:`euclidean`, or an :class:`AdamNorm`.

    Raises:
        ValueError: no parameter requires grad.
        RuntimeError: the model is parallelised in a way that cannot be measured (FSDP1, tensor or pipeline
            parallelism), or several processes run and the model is neither in ``DistributedDataParallel`` nor sharded
            by ``fully_shard``.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> source = AccumulationSource(model)
        >>> for x in (3.0, 1.0):
        ...     (model(torch.tensor([[x]])).sum() / 2).backward()
        >>> moments = source.moments()
        >>> moments.sq_norm_of_mean.item(), moments.mean_of_sq_norms.item(), moments.num_sub_batches
        (4.0, 5.0, 2)
    """

    def __init__(
        self, model: nn.Module, param_groups: Iterable[Iterable[Tensor]] | None = None, *, norm: Norm = euclidean
    ) -> None:
        groups = [model.parameters()] if param_groups is None else param_groups
        watched = [[p for p in group if p.requires_grad] for group in groups]
        parameters = [p for group in watched for p in group]
        if not parameters:
            raise ValueError("model: expected at least one parameter with requires_grad")
        self._squares = SquaresByGroup([len(group) for group in watched], parameters[0].device)
        self._gradients: LocalGradients = gradients_of(model, parameters)
        self._tracker = BatchTracker(self._gradients, norm, self._squares)
        self._warned = False

    # -- what a source yields -----------------------------------------------------------------------

    def moments(self) -> GradientMoments:
        """Moments of the batch accumulated since the last call; starts the next batch.

        Call it at any time between the last backward pass and the next: clipping, unscaling and the optimizer do
        not matter. With no backward pass ``num_sub_batches`` is 1; what cannot be measured is NaN.
        """
        return GradientMoments.of_parts(self.parameter_group_moments())

    @torch.no_grad()
    def parameter_group_moments(self) -> list[GradientMoments]:
        """The same, one for each parameter group."""
        batch = self._tracker.finish()
        sums = self._add_up(batch)
        sums, fault = self._gradients.sum_over_ranks(sums, stated=batch.stated, measured=bool(batch.of_grad))
        if fault is not None and batch.fault is None:
            self._warn(fault)
        return self._to_moments(sums)

    @contextmanager
    def sub_batch(self, size: float) -> Iterator[None]:
        """States the size of the backward pass within: its number of prompts, or its share of the batch.

        For micro-batches of unequal size whose gradients are sums over their prompts, all scaled alike. Either all
        sub-batches of a batch have their sizes stated, or none. Several backward passes within, of losses that have no
        parameter in common, are one sub-batch; none at all is one without gradient (a micro-batch of flat rewards that
        was skipped).

        Args:
            size: positive, in the same unit for the whole batch.

        Raises:
            ValueError: ``size`` is not positive and finite.
            RuntimeError: sub-batches are nested, a parameter got its gradient in pieces, or the source was removed.
        """
        if not 0 < size < float("inf"):
            raise ValueError(f"size: expected a positive number of prompts, or a share, got {size!r}")
        self._tracker.begin_stated(float(size))
        try:
            yield
            self._tracker.end_stated()
        finally:
            self._tracker.leave_stated()

    @property
    def dropped(self) -> int:
        """Batches that were dropped, as their ``.grad`` was cleared, since :meth:`take_dropped`."""
        return self._tracker.dropped

    def was_cleared(self) -> bool:
        """Whether a ``.grad`` has gone since the last backward pass, so that the batch will be dropped."""
        return self._tracker.was_cleared()

    def take_dropped(self) -> int:
        """Their number, which begins anew; after :meth:`moments`, which has settled whether there is one more."""
        dropped, self._tracker.dropped = self._tracker.dropped, 0
        return dropped

    def on_cleared(self) -> None:
        """``.grad`` was cleared: drop the batch, even one without gradients, unless :meth:`moments` has been called."""
        self._tracker.on_cleared()

    @property
    def spans_processes(self) -> bool:
        """Whether the moments are those of all data-parallel processes."""
        return self._gradients.spans_processes

    def remove(self) -> None:
        """Take the hooks off; the source yields nothing any more."""
        self._tracker.hooks.remove()

    # -- sums ---------------------------------------------------------------------------------------

    def _add_up(self, batch: Accumulated) -> SubBatchSums:
        """The sums of this process; NaN where they cannot be known, after one warning that says why."""
        scaled, of_grad = self._squares({}), self._squares(batch.of_grad)
        for sub_batch in batch.scaled:
            scaled = scaled + sub_batch
        more_must_be_zero, fault = self._gradients.check(batch.of_grad)
        batch.fault = fault or batch.fault
        must_be_zero = sum_of_squares(batch.must_be_zero + more_must_be_zero, scaled.device)
        scaled = torch.where(must_be_zero == 0, scaled, torch.nan)
        if scaled.device.type == "cpu" and must_be_zero != 0:  # elsewhere it would wait
            batch.fault = batch.fault or NOT_EMPTY
        if not batch.reduced:
            batch.fault = batch.fault or NOT_REDUCED
        if len(batch.sizes) > 1 and not batch.overlap and not batch.stated:
            batch.fault = batch.fault or DISJOINT
        if batch.fault is not None:
            self._warn(batch.fault)
            scaled = scaled * torch.nan
        return SubBatchSums(scaled, of_grad, sum(batch.sizes), len(batch.sizes))

    def _warn(self, fault: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"A batch could not be measured, and counts as invalid: {fault}.", stacklevel=2)

    def _to_moments(self, sums: SubBatchSums) -> list[GradientMoments]:
        mean_of_sq_norms, num = sums.size * sums.scaled, sums.num
        if isinstance(num, int) and num == 0:
            mean_of_sq_norms, num = mean_of_sq_norms * torch.nan, 1
        possible = mean_of_sq_norms >= (1 - ROUNDING) * sums.of_grad
        mean_of_sq_norms = torch.where(possible, mean_of_sq_norms, torch.nan)
        pairs = zip(sums.of_grad.unbind(), mean_of_sq_norms.unbind(), strict=True)
        return [GradientMoments(*pair, num) for pair in pairs]
