"""Our hooks on a model: on every call of a layer, on the gradient of its output, and on the gradients of parameters.

They only look. What they see in a backward pass they hand down to the :class:`BackwardPass` that is measured.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import ensure_runs_last
from snr_optim.grad_norms.backward_pass import BackwardPass
from snr_optim.grad_norms.capture import AutocastCopies, ForwardCall
from snr_optim.grad_norms.coverage import mark_our_hook, our_hooks_at
from snr_optim.grad_norms.layers import Layer, ParameterNames
from snr_optim.grad_norms.replay import is_observed, replaying, without_hooks

Hook: TypeAlias = Callable[..., Any]


class ModelHooks:
    """All our hooks on one model, and what they share. It does not hold the object that made it, which may go first.

    Args:
        model: the model.
        layers: its layers that are measured.
        names: the names of their parameters, to be noted here.

    Attributes:
        backward_pass: the hooks report to it; None while nothing is measured.
        names: the names of the parameters.
        autocast_copies: inputs in the precision of autocast.
        handles: remove the hooks.
        see_all_gradients: whether every measured parameter is hooked: a shard gets its gradient by other ways.
    """

    def __init__(self, model: nn.Module, layers: list[Layer], names: ParameterNames) -> None:
        self.backward_pass: BackwardPass | None = None
        self.autocast_copies = AutocastCopies()
        self.see_all_gradients = True
        self.names = names
        self.handles: list[RemovableHandle] = [
            layer.module.register_forward_hook(_ForwardHook(self, layer), prepend=True, with_kwargs=True)
            for layer in layers
        ]
        measured = {name for layer in layers for name in layer.names.values()}
        for name, p in model.named_parameters():
            if name in measured:
                names.note(p, name)
                if hasattr(p, "placements"):
                    self.see_all_gradients = False
                else:
                    self.handles.append(p.register_hook(_ParameterHook(self, name)))  # type: ignore[no-untyped-call]


# -------------------------------------------------------------------------------------------------- the forward pass
class _ForwardHook:
    """Hooks the output of every call of a layer from which a gradient may come.

    It is put before other hooks of the layer, so that they can do to the output what they like.

    A copy of the model, for an average or as a reference, is not observed: copies of the hook do nothing.
    """

    def __init__(self, hooks: ModelHooks, layer: Layer) -> None:
        self._hooks, self._layer = hooks, layer
        self._named: tuple[int, ...] = ()  # parameters whose names were noted
        self._tried: list[Callable[[], Hook | None]] = []  # hooks before this one for which the verdict is known
        self._verdict: str | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Hook:
        return _nothing

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _do_nothing, ()

    def __call__(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        layer = self._layer
        if not torch.is_grad_enabled() or not is_observed(module):
            return
        if not isinstance(output, Tensor):
            layer.returned = type(output).__name__
            return
        layer.returned = None
        if not output.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(output):
            return  # torch.func differentiates by its own ways
        own = {local: p for local, p in module._parameters.items() if local in layer.names and p is not None}
        trained = [local for local, p in own.items() if p.requires_grad]
        if not trained:
            return
        if (named := tuple(map(id, own.values()))) != self._named:
            self._named = named
            for local, p in own.items():
                self._hooks.names.note(p, layer.names[local])
        given = args[0] if args else kwargs.get(layer.input_name)
        others = [*args[1:], *(value for name, value in kwargs.items() if args or name != layer.input_name)]
        changed_by = self._changed_by(module, args, kwargs, output)
        kind = output.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        inputs = given if isinstance(given, Tensor) and layer.wants_inputs(trained) else None
        if inputs is not None and autocast is not None and layer.casts_inputs:
            inputs = self._hooks.autocast_copies.of(inputs, autocast)
        call = ForwardCall(
            trained,
            output.shape,
            input_alone=isinstance(given, Tensor) and all(value is None for value in others),
            autocast=autocast,
            changed_by=changed_by,
            inputs=inputs,
            waiting=layer.waiting,
        )
        _OutputHook(self._hooks, layer, call, _whole_of(output))

    def _changed_by(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: Tensor
    ) -> str | None:
        """Hooks that ran before this one and changed the output; None where there are none, as is the rule.

        The layer's own forward is called again to see whether they changed it: once for the same hooks, as a profiler
        that hooks all modules would otherwise count every layer twice.
        """
        if not _global_forward_hooks and next(iter(module._forward_hooks.values())) is self:
            return None
        before = takewhile(lambda hook: hook is not self, module._forward_hooks.values())
        foreign = [hook for hook in (*_global_forward_hooks.values(), *before) if not isinstance(hook, _ForwardHook)]
        if not foreign:
            return None
        if [reference() for reference in self._tried] == foreign:
            return self._verdict
        self._tried = [_weakly(hook) for hook in foreign]
        self._verdict = self._try_without(foreign, module, args, kwargs, output)
        return self._verdict

    def _try_without(
        self,
        foreign: list[Hook],
        module: nn.Module,
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
        output: Tensor,
    ) -> str | None:
        """The names of the hooks, if the layer's own forward returns something else than they left."""
        hooks: Any = module._forward_hooks
        place = next(number for number, hook in hooks.items() if hook is self)
        hooks.move_to_end(place, last=False)  # ours runs before theirs from the next call on
        with torch.random.fork_rng(), torch.no_grad(), replaying():
            own: Tensor = without_hooks(module, module._parameters).forward(*args, **kwargs)
        if own.shape == output.shape and torch.allclose(own, output.to(own.dtype), rtol=0.0, atol=0.0, equal_nan=True):
            return None
        return ", ".join(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in foreign)


def _whole_of(output: Tensor) -> Tensor:
    """The tensor of which an output is another shape: the output's own hooks are lost if that is changed in place."""
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel():
        return output
    return base if base.is_contiguous() and output.is_contiguous() else output


def _weakly(hook: Hook) -> Callable[[], Hook | None]:
    """A weak reference to a function or a method; a strong one to what allows no weak reference."""
    try:
        return weakref.WeakMethod(hook) if hasattr(hook, "__self__") else weakref.ref(hook)
    except TypeError:
        return lambda: hook


def _nothing(*arguments: object, **keywords: object) -> None:
    """Stands in place of our hook in a copy of the model."""


def _do_nothing() -> Hook:
    return _nothing


# ------------------------------------------------------------------------------------------------- the backward pass
class _OutputHook:
    """Reports the gradient that goes on into a layer, of one of its calls.

    It looks after all other hooks of the same tensor, which may change the gradient, were they registered before this
    one or later.
    """

    changes_nothing = True  # so that two of ours do not each want to be the last

    def __init__(self, hooks: ModelHooks, layer: Layer, call: ForwardCall, output: Tensor) -> None:
        self._hooks, self._layer, self._call = hooks, layer, call
        self._handle: RemovableHandle = output.register_hook(self)  # type: ignore[no-untyped-call]
        mark_our_hook(output, self._handle)

    def __call__(self, gradient: Tensor) -> None:
        if ensure_runs_last(self._handle):
            self._report(gradient)
        else:  # others' hooks run after this call; hooks of the node come after all those of its tensors
            node: Any = torch._C._current_autograd_node()
            self._report_at(node)

    def _report_at(self, node: Node) -> None:
        number = next(n for n, handles in our_hooks_at(node).items() if self._handle in handles)

        def report(gradients: tuple[Tensor, ...]) -> None:
            handle.remove()
            self._report(gradients[number])

        handle = node.register_prehook(report)

    def _report(self, gradient: Tensor) -> None:
        if self._hooks.backward_pass is not None:
            self._hooks.backward_pass.take_output_gradient(self._layer, self._call, gradient)
        self._call.release()


class _ParameterHook:
    """Reports the gradient of a parameter that autograd is about to accumulate."""

    changes_nothing = True  # so that a tracker of moments does not wonder what comes after it

    def __init__(self, hooks: ModelHooks, name: str) -> None:
        self._hooks, self._name = hooks, name

    def __call__(self, gradient: Tensor) -> None:
        if self._hooks.backward_pass is not None:
            self._hooks.backward_pass.take_parameter_gradient(self._name, gradient)
