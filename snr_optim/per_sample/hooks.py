"""The forward hook: from every call of a layer to a hook on the gradient of its output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from snr_optim.per_sample.capture import Casts, Observation
from snr_optim.per_sample.graph import mark_as_observed
from snr_optim.per_sample.layers import Layer
from snr_optim.per_sample.rules import casts_inputs, wants_inputs


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
        if module in _unobserved:
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


_unobserved: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def unobserved(module: nn.Module) -> Iterator[None]:
    """Calls that do not do what the layer's rule says: where its parameters are to be measured, they are refused."""
    _unobserved.add(module)
    try:
        yield
    finally:
        _unobserved.discard(module)


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
