"""Runs a layer's forward again to look into it, and marks the calls of layers that our hooks pass over."""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

_thread = threading.local()
_unobserved: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def replaying() -> Iterator[None]:
    """Within, a layer runs again so that we can look into it: our hooks pass over its calls and over those within."""
    before, _thread.replaying = is_replaying(), True
    try:
        yield
    finally:
        _thread.replaying = before


def is_replaying() -> bool:
    found: bool = getattr(_thread, "replaying", False)
    return found


@contextmanager
def unobserved(module: nn.Module) -> Iterator[None]:
    """Within, calls of this layer do not do what its rule says, and our hooks pass over them.

    A backward pass that is to measure the layer's parameters is then refused.
    """
    _unobserved.add(module)
    try:
        yield
    finally:
        _unobserved.discard(module)


def is_observed(module: nn.Module) -> bool:
    """Whether our hooks look at what the layer is doing now."""
    return module not in _unobserved and not is_replaying()


def without_hooks(module: Module, parameters: Mapping[str, Tensor | None]) -> Module:
    """A copy with other parameters and without hooks; it shares all else with the module."""
    other = copy.copy(module)
    other._parameters = dict(parameters)  # type: ignore[arg-type]
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(other, name, OrderedDict())
    return other


@contextmanager
def with_parameters(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, tensors stand in place of the module's own parameters, also for a replaced forward that reads them."""
    before = dict(module._parameters)
    module._parameters.update(parameters)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module._parameters.update(before)
