"""The hooks on calls of layers: what a layer was given, kept from its forward pass to its backward pass.

Kept the way autograd keeps its own tensors: checkpoints recompute it, offloading brings it back, a change in place is
noticed, and it goes with the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from snr_optim.backward import current_backward, keeps_graph
from snr_optim.per_sample.graph import mark_as_observed
from snr_optim.per_sample.rules import casts_inputs, wants_inputs

if TYPE_CHECKING:
    from snr_optim.per_sample.layers import Layer


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

    Args:
        waiting: the calls of the layer whose gradient has not come yet.
        inputs: what the layer was given; None where its rule does not want it.
        on_gradient: called with the input and the gradient of the output.
    """

    def __init__(
        self,
        waiting: weakref.WeakSet[Observation],
        inputs: Tensor | None,
        on_gradient: Callable[[Observation, Tensor], None],
    ) -> None:
        self._on_gradient, self._waiting = on_gradient, waiting
        self._wants_inputs = inputs is not None
        self._node: Any = None
        if inputs is not None:
            self._node = _Keep.apply(inputs.detach(), _ANCHOR).grad_fn  # type: ignore[no-untyped-call]
        if current_backward() == -1:  # what a checkpoint recomputes is no further call: its first one waits already
            waiting.add(self)

    def __call__(self, gradient: Tensor) -> None:
        self._on_gradient(self, gradient)
        if not keeps_graph():
            self._node = None
            self._waiting.discard(self)

    def inputs(self) -> Tensor | None:
        """What the layer was given.

        Raises:
            RuntimeError: a backward pass was here before and has freed it.
        """
        if self._wants_inputs and self._node is None:
            raise RuntimeError(
                "a second backward pass through a graph whose activations the first one freed; "
                "call the first one with retain_graph=True"
            )
        return None if self._node is None else self._node.saved_tensors[0]

    def others_wait(self) -> bool:
        """Whether other calls of the layer wait for their gradient, as when a module is called twice."""
        return len(self._waiting) > (self in self._waiting)


@dataclass(frozen=True)
class CallRecord:
    """What is known of a call when it is made."""

    trained: list[str]  # parameters, by their names within the layer
    shape: torch.Size  # of the output
    alone: bool  # its input was all that it was given
    autocast: torch.dtype | None


class Recorder(Protocol):
    """Who is told."""

    _names: WeakIdKeyDictionary  # of parameters
    _casts: Casts

    def _on_gradient(self, layer: Layer, record: CallRecord, observed: Observation, gradient: Tensor) -> None: ...


class ForwardHook:
    """Hooks the output of every call of a layer from which a gradient may come; its recorder is a weak reference.

    A copy of the model, for an average or as a reference, is not observed: copies of the hook do nothing.
    """

    def __init__(self, recorder: Callable[[], Recorder | None], layer: Layer) -> None:
        self.recorder, self.layer = recorder, layer

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _do_nothing, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or not output.requires_grad:
            return
        me, layer = self.recorder(), self.layer
        if me is None or torch._C._functorch.is_functorch_wrapped_tensor(output):
            return  # torch.func differentiates by its own ways
        own = {local: p for local, p in module._parameters.items() if local in layer.names and p is not None}
        trained = [local for local, p in own.items() if p.requires_grad]
        if not trained:
            return
        if (known := tuple(map(id, own.values()))) != layer.known:
            layer.known = known
            me._names.update((p, layer.names[local]) for local, p in own.items())
        given = args[0] if args else kwargs.get(layer.input_name)
        others = [*args[1:], *(value for name, value in kwargs.items() if args or name != layer.input_name)]
        kind = output.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        alone = isinstance(given, Tensor) and all(value is None for value in others)
        record = CallRecord(trained, output.shape, alone, autocast)
        inputs = given if isinstance(given, Tensor) and wants_inputs(layer.rule, trained) else None
        if inputs is not None and autocast is not None and casts_inputs(layer.rule):
            inputs = me._casts.of(inputs, autocast)
        hooked = whole_of(output)
        mark_as_observed(hooked)
        hooked.register_hook(  # type: ignore[no-untyped-call]
            Observation(layer.waiting, inputs, partial(_pass_on, self.recorder, layer, record))
        )


def whole_of(output: Tensor) -> Tensor:
    """The tensor that an output is another shape of: its own hooks would be lost if it were changed in place."""
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """What is left of a hook in a copy of the model."""


def _do_nothing() -> Any:
    return _nothing


def _pass_on(
    recorder: Callable[[], Recorder | None], layer: Layer, record: CallRecord, observed: Observation, gradient: Tensor
) -> None:
    me = recorder()
    if me is not None:
        me._on_gradient(layer, record, observed, gradient)
