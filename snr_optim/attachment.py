"""From ``backward()`` to the learning rate of the very next ``optimizer.step()``: what ``attach()`` puts on a loop.

An :class:`AccumulationSource` puts hooks on the gradients; one hook runs when ``optimizer.step()`` begins, and hands
the moments of the batch over once; and ``zero_grad()`` is wrapped, as it tells that a batch is given up where no
gradient had come that could tell it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from snr_kernels.precision import widest_dtype
from snr_optim._torch import current_backward, is_nested_step, loss_scale, runs_several_processes
from snr_optim.noise import AccumulationSource, Norm
from snr_optim.noise.moments import GradientMoments

NEVER_STEPPED = 10  # batches cleared without any step: more than a GradScaler skips at first


class MeasuredBatch(NamedTuple):
    """What is handed over when ``optimizer.step()`` begins.

    Attributes:
        whole: the moments of the whole gradient.
        by_parameter_group: the moments of each parameter group.
        dropped: batches before it whose gradients were cleared without a step.
    """

    whole: GradientMoments
    by_parameter_group: list[GradientMoments]
    dropped: int


class Attachment:
    """Measures every batch and lets its moments set the learning rate of its own step; made by ``attach()``.

    Attributes:
        moments: those of the last batch, neither averaged nor clamped; None before the first step.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> from snr_optim import SNRAdaptiveLR
        >>> scheduler = SNRAdaptiveLR(torch.optim.SGD(model.parameters(), lr=1.0))
        >>> with scheduler.attach(model):  # or keep the handle, and .remove() it
        ...     for x in (3.0, 1.0):
        ...         (model(torch.tensor([[x]])).sum() / 2).backward()
        ...     scheduler.optimizer.step()
        >>> scheduler.factor
        0.75
    """

    def __init__(
        self, optimizer: Optimizer, model: nn.Module, norm: Norm, hand_over: Callable[[MeasuredBatch], None]
    ) -> None:
        self._optimizer, self._model, self._norm, self._hand_over = optimizer, model, norm, hand_over
        if not getattr(type(self._optimizer).step, "hooked", False) or isinstance(self._optimizer, torch.optim.LBFGS):
            raise TypeError(
                f"optimizer: {type(self._optimizer).__name__} runs no step hooks, or takes several gradients per step; "
                "use observe()"
            )
        self._expect_parameters_of_model()
        self._watch()
        # Not traced: a compiled step() would take the lr for a constant.
        self._hook = self._optimizer.register_step_pre_hook(
            torch.compiler.disable(self._on_step)  # type: ignore[no-untyped-call]
        )
        self._hook_zero_grad()
        self._attached = True
        self.moments: GradientMoments | None = None
        self._warned = self._warned_never_stepped = False

    def sub_batch(self, size: float) -> AbstractContextManager[None]:
        """``with handle.sub_batch(size=n): loss.backward()`` states the size of an unequal micro-batch.

        The loss must be scaled like the others: a sum over its prompts over one number for the whole batch. Means of
        unequal micro-batches, each divided by their number, are right without a size. See
        :meth:`AccumulationSource.sub_batch`.
        """
        if not self._attached:
            raise RuntimeError("sub_batch: the handle was removed")
        return self._source.sub_batch(size)

    def remove(self) -> None:
        """Take all hooks off; the scheduler keeps its factor. With several processes, do it in all of them."""
        if self._attached:
            self._attached = False
            self._source.remove()
            self._hook.remove()
            if vars(self._optimizer).get("zero_grad") is self._zero_grad:
                del self._optimizer.zero_grad  # the method of its class shows again, or what somebody had put there
                if self._theirs is not None:
                    self._optimizer.zero_grad = self._theirs  # type: ignore[method-assign]

    @property
    def dropped(self) -> int:
        """Batches whose gradients were cleared without a step, since the last step."""
        return self._source.dropped + self._source.was_cleared()

    def warn_if_never_stepped(self) -> None:
        """Say once that gradients come and go, and ``optimizer.step()`` is never called."""
        if self._attached and self.moments is None and not self._warned_never_stepped:
            dropped = self.dropped
            if dropped >= NEVER_STEPPED:
                self._warned_never_stepped = True
                warnings.warn(
                    f"attach: the gradients of {dropped} batches were cleared, and step() of "
                    f"{type(self._optimizer).__name__} was never called, so that nothing is measured. An optimizer "
                    "that moves by other methods (first_step() and second_step(), ...) is not seen: build "
                    "SNRAdaptiveLR on the one whose step() does the update, such as optimizer.base_optimizer.",
                    stacklevel=4,
                )

    @property
    def attached(self) -> bool:
        """False once removed."""
        return self._attached

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _hook_zero_grad(self) -> None:
        """There are hooks for ``step()`` alone: so this is an attribute of the optimizer, which no copy inherits."""
        original = self._optimizer.zero_grad
        self._theirs = vars(self._optimizer).get("zero_grad")

        @functools.wraps(original)
        def zero_grad(*args: Any, **kwargs: Any) -> Any:
            returned = original(*args, **kwargs)
            if self._attached and current_backward() < 0:
                self._source.on_cleared()
                self.warn_if_never_stepped()
            return returned

        self._zero_grad = zero_grad
        self._optimizer.zero_grad = zero_grad  # type: ignore[method-assign]

    def _watch(self) -> None:
        groups = [group["params"] for group in self._optimizer.param_groups]
        self._source = AccumulationSource(self._model, groups, norm=self._norm)
        self._watched = self._trainable()

    def _trainable(self) -> list[int]:
        return [id(p) for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _expect_parameters_of_model(self) -> None:
        ours = {id(p) for p in self._model.parameters()}
        strangers = sum(id(p) not in ours for group in self._optimizer.param_groups for p in group["params"])
        if strangers:
            raise ValueError(
                f"model: {strangers} parameters of the optimizer are not in it. Attach the module that holds them all, "
                "such as nn.ModuleList([policy, value_head]); after wrapping or sharding, build the optimizer anew"
            )

    def _on_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if current_backward() >= 0:
            raise RuntimeError("attach: optimizer.step() ran inside backward(), where .grad is not complete yet")
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "attach: optimizer.step() is being captured into a CUDA graph, which replays no hook. Use a tensor lr, "
                "and observe() outside the graph"
            )
        if is_nested_step(optimizer):
            return None  # that of a base class: the batch was measured when the outer one began
        # A closure holds the backward pass, and every optimizer that calls it once reads its lr after it.
        if kwargs.get("closure") is not None:
            return args, {**kwargs, "closure": self._then_measure(kwargs["closure"])}
        if len(args) > 1 and args[1] is not None:  # args[0] is the optimizer
            return (args[0], self._then_measure(args[1]), *args[2:]), kwargs
        self._measure()
        return None

    def _then_measure(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def measured() -> Any:
            loss = closure()
            self._measure()
            return loss

        return measured

    def _measure(self) -> None:
        if runs_several_processes() and not self._source.spans_processes:
            raise RuntimeError(
                "attach: several processes run now, but the model was attached before: attach it wrapped"
            )
        scale = loss_scale()
        parts = self._source.parameter_group_moments()
        if scale is not None:
            parts = [_unscaled(part, scale) for part in parts]
        dropped = self._source.take_dropped()
        if self._trainable() != self._watched:  # parameters were added, or unfrozen: watched from the next batch on
            self._watched = self._trainable()
            if self._watched:
                self._source.remove()
                self._watch()
            warnings.warn(
                "attach: parameters were added to the optimizer, frozen or unfrozen. This batch counts as invalid; "
                "from the next on all are watched.",
                stacklevel=4,
            )
            parts = [GradientMoments(math.nan, math.nan, parts[0].num_sub_batches)] * len(self._optimizer.param_groups)
        self.moments = GradientMoments.of_parts(parts)
        if isinstance(self.moments.num_sub_batches, int) and self.moments.num_sub_batches == 1 and not self._warned:
            self._warned = True
            warnings.warn(
                "attach: at most one backward() since .grad was last cleared or changed, so the noise is unknown and "
                "the factor stays as it is (1 at first: the full ceiling). Split the batch into micro-batches.",
                stacklevel=4,
            )
        self._hand_over(MeasuredBatch(self.moments, parts, dropped))


def _unscaled(moments: GradientMoments, scale: torch.Tensor) -> GradientMoments:
    """Moments of the gradients before a ``GradScaler`` scaled the loss."""
    square = scale.to(widest_dtype(scale.device)).square()
    return GradientMoments(moments.sq_norm_of_mean / square, moments.mean_of_sq_norms / square, moments.num_sub_batches)
