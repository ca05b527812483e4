"""Moments from the backward passes of one process: every ``backward()`` between two optimizer steps is a sub-batch."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import (
    accumulates_into,
    at_end_of_backward,
    current_backward,
    ensure_runs_last,
    is_nested_backward,
)
from snr_optim.noise.moments import ROUNDING, GradientMoments
from snr_optim.noise.norms import Norm, euclidean
from snr_optim.noise.tracking import (
    BackwardPass,
    Batch,
    GradientHook,
    GradState,
    Origin,
    PostAccumulateGuard,
    SubBatch,
    difference,
    sum_of_squares,
)

FAILED = "a backward pass failed half-way"
LATE_HOOK = "somebody else's hook on a parameter was registered after ours; it counts from the next batch on"
FREED = "a .grad was gone when its backward pass was over: freed, or used for a step, while backward() ran"


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

    Args:
        model: its parameters that require grad now are watched; no change to model or loss.
        param_groups: the parameters to watch instead, in groups; :meth:`parameter_group_moments` tells them apart.
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
        >>> moments.sq_norm_of_mean.item(), moments.mean_of_sq_norms.item(), moments.num_sub_batches
        (4.0, 5.0, 2)
    """

    _compares = True  # the gradients of a first sub-batch with .grad

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
        self._canaries = _smallest(self.parameters)
        self._norm = norm
        self.dropped = 0
        self._batch = Batch()
        self._sub_batch: SubBatch | None = None  # the one whose gradients are arriving
        self._stated_size: float | None = None  # of the sub_batch() that is open
        self._running: dict[int, BackwardPass] = {}  # backward passes that have begun and not ended
        self._latest = -1  # the one that began last
        self._states: list[GradState] = []  # how the last one left every .grad
        self._warned = False
        self._ignored = -1  # a run of the engine that is torch.autograd.grad's
        self._given_up = False  # what came within the sub_batch() that is open was cleared
        self._handles: list[RemovableHandle] = []
        self._hooks: dict[int, RemovableHandle] = {}  # those on gradients, by parameter
        self._guards: dict[int, PostAccumulateGuard] = {}  # where others have post-accumulate hooks
        self._watch()

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
        if self._running:
            self._fail()
        self._close()
        batch, self._batch, self._states = self._batch, Batch(), []
        return self._to_moments(*self._sums(batch))

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
        if self._stated_size is not None:
            raise RuntimeError("sub_batch: the previous sub-batch is still open")
        if not self._handles:
            raise RuntimeError("sub_batch: the source was removed")
        if self._running:  # a pass failed: whether it was cleared away, the norm of .grad tells in the next batch
            self.on_cleared()
        self._close()
        self._stated_size, self._given_up = float(size), False
        try:
            yield
            if not self._given_up or self._sub_batch is not None:
                self._sub_batch = self._sub_batch or self._open()
                if self._sub_batch.in_pieces:
                    raise RuntimeError(
                        "sub_batch: a parameter got a gradient twice; add up the losses of a sub_batch "
                        "and call backward() once"
                    )
            self._close()
        finally:
            if self._running:
                self._fail()
            self._stated_size = None

    def on_cleared(self) -> None:
        """``.grad`` was cleared: drop the batch, even one without gradients, unless :meth:`moments` has been called."""
        if self._running or self._sub_batch is not None or self._batch.sizes:
            self._given_up = self._sub_batch is not None
            self._running.clear()
            self._drop()

    def was_cleared(self) -> bool:
        """Whether a ``.grad`` has gone since the last backward pass, so that the batch will be dropped."""
        return bool(self._batch.sizes or self._sub_batch is not None) and self._gone()

    def remove(self) -> None:
        """Take the hooks off; the source yields nothing any more."""
        for handle in self._handles:
            handle.remove()
        for guard in self._guards.values():
            guard.remove()
        self._handles.clear()
        self._hooks.clear()
        self._guards.clear()

    # -- gradients arriving -------------------------------------------------------------------------

    def _watch(self) -> None:
        if any(hasattr(p, "placements") for p in self.parameters):
            raise RuntimeError("model: sharded (DTensor) parameters are not supported by AccumulationSource")
        for index, parameter in enumerate(self.parameters):
            self._watch_parameter(index, parameter)

    def _watch_parameter(self, index: int, parameter: Tensor) -> None:
        hook = GradientHook(self._on_gradient, index)
        self._hooks[index] = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
        self._handles.append(self._hooks[index])

    @torch.no_grad()
    def _on_gradient(self, index: int, gradient: Tensor) -> None:
        number = current_backward()
        if number == self._ignored:
            return
        backward = self._running.get(number) or self._on_begin(number, index)
        if backward is None:
            return
        sub_batch = self._sub_batch or self._open()
        if index in sub_batch.norms:
            # Within checkpoints a parameter's next gradient belongs to the next backward(), unless that around them,
            # which was seen, is still running.
            if backward.nested and self._stated_size is None and all(one.nested for one in self._running.values()):
                sub_batch = self._open()
            else:
                sub_batch.in_pieces = True  # ||a + b||^2 is not ||a||^2 + ||b||^2
        sub_batch.norms[index] = self._norm(self.parameters[index], gradient)
        if self.parameters[index].grad is None:
            sub_batch.origins[index] = Origin.of(gradient)  # which is likely to become .grad as it is
        backward.arrived.add(index)

    def _on_begin(self, number: int, index: int) -> BackwardPass | None:
        """The first gradient of a backward pass, that of parameter ``index``, has come; None if it is not for .grad."""
        if not accumulates_into(self._hooked(index)):
            self._ignored = number
            return None
        nested = is_nested_backward()
        if self._running and not nested:  # its end never came
            self._running.clear()
            self._drop()
        # A pass that began before the latest one is that around a checkpoint's: both are one backward().
        another = not nested and number > self._latest
        self._latest = max(self._latest, number)
        if self._sub_batch is None or (another and self._stated_size is None):
            self._open()
        backward = self._running[number] = BackwardPass(nested, self._grad_states())
        self._keep_order(index)
        at_end_of_backward(partial(self._on_end, number))
        return backward

    @torch.no_grad()
    def _on_end(self, number: int) -> None:
        """A backward pass is over, and its gradients are in ``.grad``."""
        backward, sub_batch = self._running.pop(number, None), self._sub_batch
        if backward is None or sub_batch is None:
            return
        self._batch.reduced = self._reduced(backward)
        if self._batch.reduced and any(self.parameters[i].grad is None for i in backward.arrived):
            self._batch.fault = FREED
        self._measure(sub_batch, backward.arrived)
        self._states = self._grad_states()

    def _keep_order(self, arriving: int) -> None:
        """Others may register hooks at any time: ours run after theirs on gradients, and around theirs on ``.grad``."""
        for index, handle in self._hooks.items():
            moved = not ensure_runs_last(handle)
            # For the gradient that is arriving the order stood. In a first sub-batch .grad tells whether it mattered.
            if moved and index == arriving and (self._batch.sizes or not self._compares):
                self._batch.fault = LATE_HOOK
        for index, parameter in enumerate(self.parameters):
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                guard = self._guards.get(index)
                if guard is None:
                    guard = self._guards[index] = PostAccumulateGuard(self._norm_if_any, self._on_change)
                guard.surround(parameter)

    @torch.no_grad()
    def _norm_if_any(self, parameter: Tensor) -> Tensor | None:
        return None if parameter.grad is None else self._norm_of_grad(parameter)

    def _on_change(self, change: Tensor | None) -> None:
        """Post-accumulate hooks have run: how far they changed the norm of a ``.grad``; None where it is gone."""
        if change is None:
            self._batch.fault = FREED
        else:
            self._batch.must_be_zero.append(change)

    def _fail(self) -> None:
        """A backward pass has begun, and its end will not come."""
        self._running.clear()
        self._batch.fault = FAILED
        self._states = self._grad_states()  # when they are cleared, the batch goes

    def _open(self) -> SubBatch:
        """A sub-batch begins; and a new batch with it, where ``.grad`` was cleared since the last one."""
        if self._changed():
            self._drop()
        self._close()
        batch = self._batch
        if batch.sizes:  # .grad is still what the last pass left, even where no version tells: some of it shows
            left = [(self.parameters[i], batch.of_grad[i]) for i in self._undisturbed() if i in batch.of_grad]
            batch.must_be_zero += [difference(self._norm_of_grad(p), norm) for p, norm in left if p.grad is not None]
        else:
            batch.must_be_zero = [self._norm_of_grad(p) for p in self.parameters if p.grad is not None]
        self._sub_batch = SubBatch(self._stated_size)
        return self._sub_batch

    def _undisturbed(self) -> list[int]:
        """Parameters whose ``.grad`` is as the last backward pass has left it, if nobody has changed it."""
        return self._canaries

    def _drop(self) -> None:
        self.dropped += 1
        self._batch, self._sub_batch, self._states = Batch(), None, []

    def _close(self) -> None:
        """Fold the sub-batch that is open into the batch."""
        sub_batch, self._sub_batch = self._sub_batch, None
        if sub_batch is None or not (sub_batch.norms or sub_batch.size):
            return
        batch, size = self._batch, sub_batch.size
        if batch.sizes and batch.stated != (size is not None):
            batch.fault = batch.fault or (
                "some sub-batches have their sizes stated and some have not: put every backward() of the batch into a "
                "sub_batch(), with size=1 for equal means, or none"
            )
        if sub_batch.in_pieces:
            batch.fault = (
                batch.fault or "a parameter got its gradient in pieces: reentrant checkpointing of a shared module?"
            )
        batch.stated = size is not None
        batch.sizes.append(size or 1.0)
        batch.scaled.append(self._by_group(sub_batch.norms) / batch.sizes[-1])
        batch.overlap |= not batch.seen.isdisjoint(sub_batch.norms)
        batch.seen |= sub_batch.norms.keys()

    # -- what lies in .grad -------------------------------------------------------------------------

    def _grad_states(self) -> list[GradState]:
        return [GradState(p) for p in self.parameters]

    def _gone(self) -> bool:
        """Is there no ``.grad`` where the last backward pass has left one?"""
        return any(p.grad is None and not state.empty for state, p in zip(self._states, self.parameters, strict=False))

    def _changed(self) -> bool:
        """Has anyone cleared or replaced ``.grad`` since the last backward pass?"""
        return not all(state.holds(p) for state, p in zip(self._states, self.parameters, strict=False))

    def _reduced(self, backward: BackwardPass) -> bool:
        """Is ``.grad`` now the gradient of all ranks?"""
        return True

    def _measure(self, sub_batch: SubBatch, arrived: Iterable[int]) -> None:
        """Take the norm of ``.grad`` where the backward pass that is over has added to it."""
        batch = self._batch
        for i in arrived:
            gradient, seen, origin = self.parameters[i].grad, sub_batch.norms.get(i), sub_batch.origins.get(i)
            if gradient is None:
                continue
            if seen is not None and origin is not None and origin == Origin.of(gradient):
                batch.of_grad[i] = seen  # the very tensor that the hook saw, untouched: no need to read it again
                continue
            batch.of_grad[i] = self._norm_of_grad(self.parameters[i])
            if not batch.sizes and seen is not None and not sub_batch.in_pieces:  # .grad is what the hook saw
                batch.must_be_zero.append(difference(batch.of_grad[i], seen))

    def _hooked(self, index: int) -> Tensor:
        """The tensor that our hook is on."""
        return self.parameters[index]

    def _norm_of_grad(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None  # every caller has looked
        return self._norm(parameter, parameter.grad)

    # -- sums ---------------------------------------------------------------------------------------

    def _by_group(self, norms: dict[int, Tensor]) -> Tensor:
        """Squared norms summed over the parameters of each group."""
        groups: list[list[Tensor]] = [[] for _ in range(self._num_groups)]
        for i, norm in norms.items():
            groups[self._group_of[i]].append(norm)
        return torch.stack([sum_of_squares(group, self.parameters[0].device) for group in groups])

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        """Over the batch, by group: ``sum_k ||h_k||^2 / n_k`` and ``||.grad||^2``; then ``sum_k n_k`` and ``m``."""
        scaled, of_grad = self._by_group({}), self._by_group(batch.of_grad)
        for sub_batch in batch.scaled:
            scaled = scaled + sub_batch
        must_be_zero = sum_of_squares(batch.must_be_zero, scaled.device)
        scaled = torch.where(must_be_zero == 0, scaled, torch.nan)
        if scaled.device.type == "cpu" and must_be_zero != 0:  # elsewhere it would wait
            batch.fault = batch.fault or (
                ".grad was not empty before its first backward pass (zero_grad() forgotten?), was changed between "
                "two of them or by a post-accumulate hook (clip after the last one, or by register_hook), or is not "
                "what our hooks saw: a hook that was registered later counts from the next batch on"
            )
        if not batch.reduced:
            batch.fault = batch.fault or "after its last backward pass .grad was not reduced over the ranks (no_sync?)"
        if len(batch.sizes) > 1 and not batch.overlap and not batch.stated:
            batch.fault = batch.fault or (
                "no two backward passes have a parameter in common. Losses of different parts of a model are one "
                "sub-batch: `with handle.sub_batch(1): ...`"
            )
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


def _smallest(parameters: list[Tensor], elements: int = 1 << 20) -> list[int]:
    """The smallest parameters, of so many elements together; one at least."""
    chosen: list[int] = []
    for index in sorted(range(len(parameters)), key=lambda i: parameters[i].numel()):
        elements -= parameters[index].numel()
        if chosen and elements < 0:
            break
        chosen.append(index)
    return chosen
