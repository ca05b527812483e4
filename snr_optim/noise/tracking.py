"""The batch whose gradients are arriving: what its backward passes add up to, and whether that can be trusted.

All that makes a batch safe to measure is here: which runs of the autograd engine are one ``backward()``, which failed,
whether ``.grad`` was cleared, changed or freed meanwhile. Norms and versions are kept, never a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from snr_optim._torch import accumulates_into, at_end_of_backward, current_backward, is_nested_backward
from snr_optim.noise.gradients import GradState, LocalGradients, Origin
from snr_optim.noise.hooks import LeafHooks
from snr_optim.noise.norms import Norm

FAILED = "a backward pass failed half-way"
LATE_HOOK = "somebody else's hook on a parameter was registered after ours; it counts from the next batch on"
FREED = "a .grad was gone when its backward pass was over: freed, or used for a step, while backward() ran"
IN_PIECES = "a parameter got its gradient in pieces: reentrant checkpointing of a shared module?"
SOME_SIZES = (
    "some sub-batches have their sizes stated and some have not: put every backward() of the batch into a "
    "sub_batch(), with size=1 for equal means, or none"
)


@dataclass
class EngineRun:
    """A run of the autograd engine."""

    nested: bool  # in the backward of a Function, as reentrant checkpoints do
    states: list[GradState]  # of every .grad when it began
    arrived: set[int] = field(default_factory=set)  # parameters that have got a gradient


@dataclass
class SubBatch:
    """The gradients of one ``backward()``, as they arrive."""

    size: float | None  # as stated
    norms: dict[int, Tensor] = field(default_factory=dict)  # ||h_k|| by parameter
    origins: dict[int, Origin | None] = field(default_factory=dict)  # where .grad was still empty
    in_pieces: bool = False


@dataclass
class Accumulated:
    """What is kept of the sub-batches since ``.grad`` was empty."""

    sizes: list[float] = field(default_factory=list)  # n_k
    stated: bool = False  # the sizes
    scaled: list[Tensor] = field(default_factory=list)  # ||h_k||^2 / n_k, by parameter group
    of_grad: dict[int, Tensor] = field(default_factory=dict)  # ||.grad|| by parameter, after the last backward pass
    reduced: bool = True  # .grad, over the ranks, after it
    must_be_zero: list[Tensor] = field(default_factory=list)  # or .grad holds something else
    seen: set[int] = field(default_factory=set)  # parameters that got a gradient
    overlap: bool = False  # some of them from two sub-batches
    fault: str | None = None

    def add(self, sub_batch: SubBatch, squares: Tensor) -> None:
        """Fold a sub-batch in, whose squared norms by parameter group are ``squares``."""
        if self.sizes and self.stated != (sub_batch.size is not None):
            self.fault = self.fault or SOME_SIZES
        if sub_batch.in_pieces:
            self.fault = self.fault or IN_PIECES
        self.stated = sub_batch.size is not None
        self.sizes.append(sub_batch.size or 1.0)
        self.scaled.append(squares / self.sizes[-1])
        self.overlap |= not self.seen.isdisjoint(sub_batch.norms)
        self.seen |= sub_batch.norms.keys()


class BatchTracker:
    """Follows the backward passes of one batch after the other.

    Args:
        gradients: where they lie.
        norm: the norm that is taken of them.
        squares: sums of the squares of norms, given by parameter, for each parameter group.
    """

    def __init__(self, gradients: LocalGradients, norm: Norm, squares: Callable[[dict[int, Tensor]], Tensor]) -> None:
        self.gradients, self._norm, self._squares = gradients, norm, squares
        self.hooks = LeafHooks(self.on_gradient, self._norm_if_any, self._on_change)
        # The gradients say at which leaves they arrive, now or in a forward pass; the hooks go there.
        self.hooks.add(gradients.watch(self.hooks.watch))
        self.dropped = 0
        self._batch = Accumulated()
        self._sub_batch: SubBatch | None = None  # the one whose gradients are arriving
        self._stated_size: float | None = None  # of the stated sub-batch that is open
        self._cleared_within = False  # what came within it was cleared
        self._running: dict[int, EngineRun] = {}  # runs that have begun and not ended
        self._latest = -1  # the one that began last
        self._ignored = -1  # one that is torch.autograd.grad's
        self._states: list[GradState] = []  # how the last one left every .grad

    # -- gradients arriving -------------------------------------------------------------------------

    @torch.no_grad()
    def on_gradient(self, index: int, gradient: Tensor) -> None:
        """The gradient of a parameter has arrived at its leaf, and will be added to ``.grad``."""
        number = current_backward()
        if number == self._ignored:
            return
        run = self._running.get(number) or self._on_begin(number, index)
        if run is None:
            return
        sub_batch = self._sub_batch or self._open()
        if index in sub_batch.norms:
            # Within checkpoints a parameter's next gradient belongs to the next backward(), unless that around them,
            # which was seen, is still running.
            if run.nested and self._stated_size is None and all(one.nested for one in self._running.values()):
                sub_batch = self._open()
            else:
                sub_batch.in_pieces = True  # ||a + b||^2 is not ||a||^2 + ||b||^2
        parameter = self.gradients.parameters[index]
        sub_batch.norms[index] = self._norm(parameter, gradient)
        if parameter.grad is None:
            sub_batch.origins[index] = Origin.of(gradient)  # which is likely to become .grad as it is
        run.arrived.add(index)

    def _on_begin(self, number: int, index: int) -> EngineRun | None:
        """The first gradient of a run, that of parameter ``index``, has come; None if it is not for ``.grad``."""
        if not accumulates_into(self.gradients.leaf(index)):
            self._ignored = number
            return None
        nested = is_nested_backward()
        if self._running and not nested:  # its end never came
            self._running.clear()
            self._drop()
        # A run that began before the latest one is that around a checkpoint's: both are one backward().
        another = not nested and number > self._latest
        self._latest = max(self._latest, number)
        if self._sub_batch is None or (another and self._stated_size is None):
            self._open()
        run = self._running[number] = EngineRun(nested, self.gradients.states())
        late = self.hooks.keep_order(index, self.gradients.parameters)
        # In a first sub-batch .grad tells whether it mattered.
        if late and (self._batch.sizes or not self.gradients.grad_is_what_arrived):
            self._batch.fault = LATE_HOOK
        at_end_of_backward(partial(self._on_end, number))
        return run

    @torch.no_grad()
    def _on_end(self, number: int) -> None:
        """A run is over, and its gradients are in ``.grad``."""
        run, sub_batch, batch = self._running.pop(number, None), self._sub_batch, self._batch
        if run is None or sub_batch is None:
            return
        batch.reduced = self.gradients.is_reduced(run.states)
        if batch.reduced and any(self.gradients.parameters[i].grad is None for i in run.arrived):
            batch.fault = FREED
        self._measure_grad(sub_batch, run)
        self._states = self.gradients.states()

    def _measure_grad(self, sub_batch: SubBatch, run: EngineRun) -> None:
        batch, comparable = self._batch, self.gradients.grad_is_what_arrived
        for i in self.gradients.to_measure(run.arrived):
            parameter = self.gradients.parameters[i]
            if parameter.grad is None:
                continue
            seen, origin = sub_batch.norms.get(i), sub_batch.origins.get(i)
            if comparable and seen is not None and origin is not None and origin == Origin.of(parameter.grad):
                batch.of_grad[i] = seen  # the very tensor that the hook saw, untouched: no need to read it again
                continue
            batch.of_grad[i] = self.norm_of_grad(parameter)
            if comparable and not batch.sizes and seen is not None and not sub_batch.in_pieces:
                batch.must_be_zero.append(difference(batch.of_grad[i], seen))

    def norm_of_grad(self, parameter: Tensor) -> Tensor:
        """The norm of what is in this process's part of a ``.grad`` now."""
        gradient = self.gradients.grad_of(parameter)
        assert gradient is not None  # every caller has looked
        return self._norm(parameter, gradient)

    @torch.no_grad()
    def _norm_if_any(self, parameter: Tensor) -> Tensor | None:
        return None if parameter.grad is None else self.norm_of_grad(parameter)

    def _on_change(self, before: Tensor | None, after: Tensor | None) -> None:
        """Others' post-accumulate hooks have run on a ``.grad`` of these norms."""
        if before is None or after is None:
            self._batch.fault = FREED
        else:
            self._batch.must_be_zero.append(difference(after, before))

    # -- sub-batches and batches --------------------------------------------------------------------

    def begin_stated(self, size: float) -> None:
        """Open a sub-batch of a stated size.

        Raises:
            RuntimeError: the previous one is still open, or the hooks were removed.
        """
        if self._stated_size is not None:
            raise RuntimeError("sub_batch: the previous sub-batch is still open")
        if not self.hooks:
            raise RuntimeError("sub_batch: the source was removed")
        if self._running:  # a pass failed: whether it was cleared away, the norm of .grad tells in the next batch
            self.on_cleared()
        self._close()
        self._stated_size, self._cleared_within = size, False

    def end_stated(self) -> None:
        """Close it, also where no gradient has come.

        Raises:
            RuntimeError: a parameter got its gradient in pieces.
        """
        if not self._cleared_within or self._sub_batch is not None:
            self._sub_batch = self._sub_batch or self._open()
            if self._sub_batch.in_pieces:
                raise RuntimeError(
                    "sub_batch: a parameter got a gradient twice; add up the losses of a sub_batch "
                    "and call backward() once"
                )
        self._close()

    def leave_stated(self) -> None:
        """It was left, by an exception too, as a backward pass that fails raises one."""
        if self._running:
            self._fail()
        self._stated_size = None

    def on_cleared(self) -> None:
        """``.grad`` was cleared: drop the batch, even one without gradients, unless it was finished."""
        if self._running or self._sub_batch is not None or self._batch.sizes:
            self._cleared_within = self._sub_batch is not None
            self._running.clear()
            self._drop()

    def was_cleared(self) -> bool:
        """Whether a ``.grad`` has gone since the last backward pass, so that the batch will be dropped."""
        pending = bool(self._batch.sizes) or self._sub_batch is not None
        return pending and self.gradients.gone_since(self._states)

    def finish(self) -> Accumulated:
        """The batch so far; the next one begins."""
        if self._running:
            self._fail()
        self._close()
        batch, self._batch, self._states = self._batch, Accumulated(), []
        return batch

    def _fail(self) -> None:
        """A backward pass has begun, and its end will not come."""
        self._running.clear()
        self._batch.fault = FAILED
        self._states = self.gradients.states()  # when they are cleared, the batch goes

    def _open(self) -> SubBatch:
        """A sub-batch begins; and a new batch with it, where ``.grad`` was cleared since the last one."""
        if self.gradients.changed_since(self._states):
            self._drop()
        self._close()
        batch, parameters = self._batch, self.gradients.parameters
        if batch.sizes:  # .grad is still what the last pass left, even where no version tells: some of it shows
            left = [(parameters[i], batch.of_grad[i]) for i in self.gradients.undisturbed() if i in batch.of_grad]
            batch.must_be_zero += [difference(self.norm_of_grad(p), norm) for p, norm in left if p.grad is not None]
        else:
            batch.must_be_zero = [self.norm_of_grad(p) for p in parameters if p.grad is not None]
        self._sub_batch = SubBatch(self._stated_size)
        return self._sub_batch

    def _close(self) -> None:
        """Fold the sub-batch that is open into the batch."""
        sub_batch, self._sub_batch = self._sub_batch, None
        if sub_batch is not None and (sub_batch.norms or sub_batch.size):
            self._batch.add(sub_batch, self._squares(sub_batch.norms))

    def _drop(self) -> None:
        self.dropped += 1
        self._batch, self._sub_batch, self._states = Accumulated(), None, []


def difference(norm: Tensor, other: Tensor) -> Tensor:
    """Zero where two norms agree up to the order of their sums; also where one is not finite, which tells by itself."""
    return ((norm - other).abs() - 1e-3 * other).clamp_min(0).nan_to_num(0.0)
