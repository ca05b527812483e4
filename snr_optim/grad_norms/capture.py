"""Keeps what the backward pass needs of the forward pass: a record of every call of a layer, with the layer's input.

The input is kept the way autograd keeps its own tensors: checkpoints recompute it, offloading brings it back, autograd
notices a change in place, and the input goes when the graph goes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from snr_optim._torch import current_backward, keeps_graph


class _SavesInput(torch.autograd.Function):
    """A node that only has saved tensors: no gradient goes through it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


_ANCHOR = torch.empty(0, requires_grad=True)  # autograd makes a node only where an input wants a gradient


class AutocastCopies:
    """Copies of inputs in the precision of autocast: layers that were given the same input share one copy.

    It keeps no copy alive: what the graph does not hold any more has gone.
    """

    def __init__(self) -> None:
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def of(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor in ``dtype``, as autocast brings it there: float64 stays as it is."""
        if tensor.dtype == dtype or tensor.dtype == torch.float64:
            return tensor
        if self._last is not None:
            source, version, last = self._last
            known = last()
            if known is not None and source() is tensor and version == tensor._version and known.dtype == dtype:
                return known
        copied = tensor.detach().to(dtype)
        self._last = (weakref.ref(tensor), tensor._version, weakref.ref(copied))
        return copied


class ForwardCall:
    """One call of a layer, as its forward pass saw it. It lives in the graph, and nowhere else.

    Args:
        trained: parameters that get a gradient, by their names within the layer.
        output_shape: the shape of what the layer returned.
        input_alone: whether the layer was given its input and nothing else.
        autocast: the precision of autocast; None outside of it.
        changed_by: hooks of others that ran before ours and changed the output of the layer's own forward; or None.
        inputs: what the layer was given; None where its rule does not want it.
        waiting: calls of the layer whose gradient has not come yet; this one joins them.
    """

    def __init__(
        self,
        trained: list[str],
        output_shape: torch.Size,
        *,
        input_alone: bool,
        autocast: torch.dtype | None,
        changed_by: str | None,
        inputs: Tensor | None,
        waiting: weakref.WeakSet[ForwardCall],
    ) -> None:
        self.trained, self.output_shape = trained, output_shape
        self.input_alone, self.autocast, self.changed_by = input_alone, autocast, changed_by
        self._waiting = waiting
        self._wants_inputs = inputs is not None
        self._saved: Tensor | None = None  # torch 2.11 frees what a node has saved when the node's output goes
        if inputs is not None:
            self._saved = _SavesInput.apply(inputs.detach(), _ANCHOR)  # type: ignore[no-untyped-call]
        if current_backward() == -1:  # a checkpoint that recomputes makes no further call: the first one waits already
            waiting.add(self)

    def inputs(self) -> Tensor | None:
        """What the layer was given.

        Raises:
            RuntimeError: an earlier backward pass has freed it.
        """
        if self._saved is None:
            if self._wants_inputs:
                raise RuntimeError(
                    "a second backward pass through a graph whose activations the first one freed; "
                    "call the first one with retain_graph=True"
                )
            return None
        node: Any = self._saved.grad_fn
        tensor: Tensor = node.saved_tensors[0]
        return tensor

    def others_wait(self) -> bool:
        """Whether other calls of the layer wait for their gradient, as when a module is called twice."""
        return len(self._waiting) > (self in self._waiting)

    def release(self) -> None:
        """Let the input go after its gradient was taken, unless the running backward pass retains the graph."""
        if not keeps_graph():
            self._saved = None
            self._waiting.discard(self)
