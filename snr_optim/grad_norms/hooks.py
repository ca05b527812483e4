"""The forward hook: from every call of a layer to a hook on the gradient of its output."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.weak import WeakIdKeyDictionary

from snr_optim.grad_norms.capture import Casts, Observation
from snr_optim.grad_norms.layers import Layer
from snr_optim.grad_norms.probe import without_hooks
from snr_optim.grad_norms.rules import casts_inputs, is_replaying, replaying, wants_inputs


@dataclass(frozen=True)
class CallRecord:
    """What is known of a call when it is made."""

    trained: list[str]  # parameters, by their names within the layer
    shape: torch.Size  # of the output
    alone: bool  # its input was all that it was given
    autocast: torch.dtype | None
    changed_by: str | None  # somebody's hook, where the output is not what the layer's own forward returned


class Recorder(Protocol):
    """Who is told."""

    _names: WeakIdKeyDictionary  # of parameters
    _casts: Casts

    def _on_gradient(self, layer: Layer, record: CallRecord, observed: Observation, gradient: Tensor) -> None: ...


class ForwardHook:
    """Hooks the output of every call of a layer from which a gradient may come; its recorder is a weak reference.

    It is put before other hooks of the layer, so that they can do to the output what they like.

    A copy of the model, for an average or as a reference, is not observed: copies of the hook do nothing.
    """

    def __init__(self, recorder: Callable[[], Recorder | None], layer: Layer) -> None:
        self.recorder, self.layer = recorder, layer
        self.tried: list[Callable[[], Any]] = []  # hooks before this one, whose verdict is known
        self.verdict: str | None = None

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        return _do_nothing, ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        me, layer = self.recorder(), self.layer
        if not torch.is_grad_enabled() or module in _unobserved or is_replaying():
            return
        if not isinstance(output, Tensor):
            layer.returned = type(output).__name__
            return
        layer.returned = None
        if not output.requires_grad:
            return
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
        record = CallRecord(trained, output.shape, alone, autocast, self._changed_by(module, args, kwargs, output))
        inputs = given if isinstance(given, Tensor) and wants_inputs(layer.rule, trained) else None
        if inputs is not None and autocast is not None and casts_inputs(layer.rule):
            inputs = me._casts.of(inputs, autocast)
        observation = Observation(layer.waiting, inputs, partial(_pass_on, self.recorder, layer, record))
        observation.wait_at(whole_of(output))

    def _changed_by(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> str | None:
        """Hooks that ran before this one and changed the output; None where there are none, the rule.

        Whether they changed it is seen by what the layer's own forward returns when it is called again: once for the
        same hooks, or a profiler that hooks all modules would count every layer twice.
        """
        if not _global_forward_hooks and next(iter(module._forward_hooks.values())) is self:
            return None
        own = [*takewhile(lambda hook: hook is not self, module._forward_hooks.values())]
        strangers = [hook for hook in (*_global_forward_hooks.values(), *own) if not isinstance(hook, ForwardHook)]
        if not strangers:
            return None
        if [reference() for reference in self.tried] == strangers:
            return self.verdict
        self.tried = [_weakly(hook) for hook in strangers]
        self.verdict = self._verdict(module, args, kwargs, output, strangers)
        return self.verdict

    def _verdict(
        self, module: nn.Module, args: Any, kwargs: Any, output: Tensor, strangers: list[Callable[..., Any]]
    ) -> str | None:
        hooks: Any = module._forward_hooks
        place = next(number for number, hook in hooks.items() if hook is self)
        hooks.move_to_end(place, last=False)  # before theirs, from the next call on
        with torch.random.fork_rng(), torch.no_grad(), replaying():
            again = without_hooks(module, module._parameters).forward(*args, **kwargs)
        if again.shape == output.shape and torch.allclose(
            again, output.to(again.dtype), rtol=0.0, atol=0.0, equal_nan=True
        ):
            return None
        return ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in strangers)


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


def _weakly(hook: Any) -> Callable[[], Any]:
    """A weak reference, also to a method; what takes none is held."""
    try:
        return weakref.WeakMethod(hook) if hasattr(hook, "__self__") else weakref.ref(hook)
    except TypeError:
        return lambda: hook


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
