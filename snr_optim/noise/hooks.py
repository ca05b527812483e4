"""Our hooks on leaves among those of others: the last hook leaves what is added to ``.grad``, and that is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import ensure_runs_last


class GradientHook:
    """Our hook on a leaf, by the number of its parameter; :func:`ensure_runs_last` keeps it behind those of others."""

    changes_nothing = True
    __torch_unserializable__ = True  # torch would warn that a pickled parameter has lost it, as it should

    def __init__(self, on_gradient: Callable[[int, Tensor], None], index: int) -> None:
        self._on_gradient, self._index = on_gradient, index

    def __call__(self, gradient: Tensor) -> None:
        self._on_gradient(self._index, gradient)


class LeafHooks:
    """All hooks of a source.

    Args:
        on_gradient: called with the number of a parameter and the gradient that arrives at its leaf.
        norm_of_grad: the norm of a parameter's ``.grad``; None where there is none.
        on_change: called with the norms of a ``.grad`` before and after others' post-accumulate hooks on it have run.
    """

    def __init__(
        self,
        on_gradient: Callable[[int, Tensor], None],
        norm_of_grad: Callable[[Tensor], Tensor | None],
        on_change: Callable[[Tensor | None, Tensor | None], None],
    ) -> None:
        self._on_gradient, self._norm_of_grad, self._on_change = on_gradient, norm_of_grad, on_change
        self._handles: list[RemovableHandle] = []
        self._latest: dict[int, RemovableHandle] = {}  # on gradients, by parameter
        self._guards: dict[int, PostAccumulateGuard] = {}  # where others have post-accumulate hooks

    def __bool__(self) -> bool:
        return bool(self._handles)

    def watch(self, index: int, leaf: Tensor) -> None:
        """Put a hook on a leaf."""
        self._latest[index] = leaf.register_hook(GradientHook(self._on_gradient, index))  # type: ignore[no-untyped-call]
        self._handles.append(self._latest[index])

    def add(self, handles: list[RemovableHandle]) -> None:
        """Take over hooks that others have put on modules for us."""
        self._handles += handles

    def remove(self) -> None:
        """Take all of them off, for good."""
        for handle in self._handles:
            handle.remove()
        for guard in self._guards.values():
            guard.remove()
        self._handles.clear()
        self._latest.clear()
        self._guards.clear()
        # Whoever is called holds the parameters, and us: without this they would wait for the garbage collector.
        self._on_gradient = self._norm_of_grad = self._on_change = _nobody

    def keep_order(self, arriving: int, parameters: list[Tensor]) -> bool:
        """Go behind hooks on gradients, and around hooks on ``.grad``, that others have registered meanwhile.

        Returns:
            Whether ours was not the last one at the leaf where a gradient is arriving: for that one the order stood.
        """
        moved = [index for index, handle in self._latest.items() if not ensure_runs_last(handle)]
        for index, parameter in enumerate(parameters):
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                guard = self._guards.get(index)
                if guard is None:
                    guard = self._guards[index] = PostAccumulateGuard(self._norm_of_grad, self._on_change)
                guard.surround(parameter)
        return arriving in moved


class PostAccumulateGuard:
    """Two hooks around somebody else's hooks that run when a gradient was added to ``.grad``."""

    __torch_unserializable__ = True

    def __init__(
        self,
        norm_of_grad: Callable[[Tensor], Tensor | None],
        on_change: Callable[[Tensor | None, Tensor | None], None],
    ) -> None:
        self._norm_of_grad, self._on_change = norm_of_grad, on_change
        self._norm: Tensor | None = None
        self._handles: list[RemovableHandle] = []

    def surround(self, parameter: Any) -> None:
        """Be the first and the last of the parameter's hooks, where there are others."""
        hooks = parameter._post_accumulate_grad_hooks or {}
        others = [
            number for number, hook in hooks.items() if not isinstance(getattr(hook, "__self__", None), type(self))
        ]
        if not others:
            return
        order = list(hooks)
        ours = [handle.id for handle in self._handles]
        if ours and order.index(ours[0]) < order.index(others[0]) and order.index(ours[1]) > order.index(others[-1]):
            return
        self.remove()
        others_first = dict(hooks)
        hooks.clear()  # in place: the engine holds this very dict, and goes by its order of insertion
        self._handles = [parameter.register_post_accumulate_grad_hook(self._before)]
        hooks.update(others_first)
        self._handles.append(parameter.register_post_accumulate_grad_hook(self._after))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before(self, parameter: Tensor) -> None:
        self._norm = self._norm_of_grad(parameter)

    def _after(self, parameter: Tensor) -> None:
        before, self._norm = self._norm, None
        self._on_change(before, self._norm_of_grad(parameter))


def _nobody(*_: Any) -> None:
    raise RuntimeError("the hooks were removed")
