"""What a layer was given, kept from its forward pass to its backward pass the way autograd keeps its own tensors.

So checkpoints recompute it, offloading brings it back, a change in place is noticed, and it goes with the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snr_optim._torch import current_backward, ensure_runs_last, keeps_graph
from snr_optim.grad_norms.coverage import mark_as_observed, observed_at


class _Keep(torch.autograd.Function):
    """A node that nobody's gradient goes through; it only has saved tensors."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


_ANCHOR = torch.empty(0, requires_grad=True)  # without an input that wants a gradient there would be no node


class Casts:
    """The last input that autocast brought to a lower precision: once for all layers that were given it."""

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, Tensor] | None = None

    def of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``."""
        if tensor.dtype == dtype or tensor.dtype == torch.float64:
            return tensor
        if self._last is not None:
            source, version, cast = self._last
            if source() is tensor and version == tensor._version and cast.dtype == dtype:
                return cast
        cast = tensor.detach().to(dtype)
        self._last = (weakref.ref(tensor), tensor._version, cast)
        return cast


class Observation:
    """A hook on the output of one call of a layer; it lives in the graph, and nowhere else.

    It reports the gradient that goes on into the layer: after other hooks of the same tensor, which may change it, were
    they registered before or after this one.

    Args:
        waiting: the calls of the layer whose gradient has not come yet.
        inputs: what the layer was given; None where its rule does not want it.
        on_gradient: called with this observation and the gradient of the output.
    """

    changes_nothing = True  # so that two of them do not each want to be the last

    def __init__(
        self,
        waiting: weakref.WeakSet[Observation],
        inputs: Tensor | None,
        on_gradient: Callable[[Observation, Tensor], None],
    ) -> None:
        self._on_gradient, self._waiting = on_gradient, waiting
        self._wants_inputs = inputs is not None
        self._kept: Any = None  # the output of the node, without which torch 2.11 frees what the node has saved
        self._handle: Any = None
        if inputs is not None:
            self._kept = _Keep.apply(inputs.detach(), _ANCHOR)  # type: ignore[no-untyped-call]
        if current_backward() == -1:  # what a checkpoint recomputes is no further call: its first one waits already
            waiting.add(self)

    def wait_at(self, output: Tensor) -> None:
        """Hook the tensor."""
        self._handle = output.register_hook(self)  # type: ignore[no-untyped-call]
        mark_as_observed(output, self._handle)

    def __call__(self, gradient: Tensor) -> None:
        if ensure_runs_last(self._handle):
            self._take(gradient)
        else:  # others' hooks run after this call: hooks of the node come after all those of its tensors
            self._take_later(torch._C._current_autograd_node())

    def _take_later(self, node: Any) -> None:
        number = next(n for n, handles in observed_at(node).items() if self._handle in handles)

        def take(gradients: tuple[Tensor, ...]) -> None:
            handle.remove()
            self._take(gradients[number])

        handle = node.register_prehook(take)

    def _take(self, gradient: Tensor) -> None:
        self._on_gradient(self, gradient)
        if not keeps_graph():
            self._kept = None
            self._waiting.discard(self)

    def inputs(self) -> Tensor | None:
        """What the layer was given.

        Raises:
            RuntimeError: a backward pass was here before and has freed it.
        """
        if self._wants_inputs and self._kept is None:
            raise RuntimeError(
                "a second backward pass through a graph whose activations the first one freed; "
                "call the first one with retain_graph=True"
            )
        return None if self._kept is None else self._kept.grad_fn.saved_tensors[0]

    def others_wait(self) -> bool:
        """Whether other calls of the layer wait for their gradient, as when a module is called twice."""
        return len(self._waiting) > (self in self._waiting)
