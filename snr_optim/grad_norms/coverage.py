"""Checks that nothing was left out: the layers must account for all that a backward pass does with the parameters.

Two things tell: how often the autograd graph uses each parameter, and the gradient that autograd finds for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import ensure_runs_last
from snr_optim.grad_norms.contributions import Contribution
from snr_optim.grad_norms.layers import Layer, ParameterNames, why_not_reported

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative to the norm of the gradient
LOW_PRECISION = 5e-2  # ... where products were rounded; a gradient that was summed in low precision tells nothing
ROUNDING = 16  # units in the last place of what a gradient is a sum of, where little of it is left

_OUR_HOOKS = "snr_optim: our hooks at the outputs of this node, by the number of the output"


class Coverage:
    """Compares what the layers report in one backward pass with the graph and, where there are any, the gradients.

    Args:
        layers: the layers that are measured.
        names: the names of their parameters.
        gradients: compares gradients; None to compare none.
    """

    def __init__(self, layers: list[Layer], names: ParameterNames, gradients: GradientCheck | None) -> None:
        self.graph = ParameterUses(names)
        self.gradients = gradients
        self._layers = layers
        self._uncounted = {name for layer in layers if not layer.counts_uses for name in layer.names.values()}
        self._reported: Counter[str] = Counter()  # uses of each parameter
        self._lowest = torch.float64  # precision among the gradients of outputs

    def report(self, contributions: Mapping[str, Contribution], dtype: torch.dtype) -> None:
        """One call of a layer makes these contributions to parameters, by their names within the model."""
        self._reported.update(contributions.keys())
        self._lowest = min(self._lowest, dtype, key=lambda each: each.itemsize)
        if self.gradients is not None:
            self.gradients.expect(contributions)

    def expect_gradient(self, name: str, gradient: Tensor) -> None:
        """Compare the gradient that autograd is about to accumulate with what the layers reported.

        Raises:
            RuntimeError: no layer reported a use of the parameter, or the gradient differs.
        """
        if not self._reported[name]:
            raise RuntimeError(
                f"{name!r} got a gradient, but the layer that owns it was not called in a way that can be observed: "
                f"{why_not_reported(self._layers, name)}. Leave it out by parameters="
            )
        if self.gradients is not None:
            self.gradients.compare(name, gradient, self._lowest)

    def expect_every_use(self) -> None:
        """Compare the uses that the layers reported with those that are in the graph.

        Raises:
            RuntimeError: a parameter is also used where no layer reports it.
        """
        for name, uses in self.graph.uses.items():
            if not self._reported[name]:
                raise RuntimeError(
                    f"{name!r} is used {uses} times in the graph, and 0 times by the layers that own it: "
                    f"{why_not_reported(self._layers, name)}. Leave it out by parameters="
                )
            if uses != self._reported[name] and name not in self._uncounted:
                raise RuntimeError(
                    f"{name!r} is used {uses} times in the graph, and {self._reported[name]} times by the layers that "
                    "own it: also elsewhere, by a functional call or a fused loss, where no hook sees it; "
                    "leave it out by parameters=, and add head_grad_norms if it is an untied head; with a tied one "
                    "take the logits"
                )


# ---------------------------------------------------------------------------------------------- what the graph tells
def mark_our_hook(output: Tensor, handle: RemovableHandle) -> None:
    """Note in the graph that our hook waits for the gradient of this tensor."""
    node: Any = output.grad_fn
    node.metadata.setdefault(_OUR_HOOKS, {}).setdefault(output.output_nr, []).append(handle)


def our_hooks_at(node: Node) -> dict[int, list[RemovableHandle]]:
    """Our hooks at the outputs of a node, by the number of the output."""
    metadata: Any = node.metadata  # a dictionary, though torch's types call it a method
    found: dict[int, list[RemovableHandle]] = metadata.get(_OUR_HOOKS, {})
    return found


class ParameterUses:
    """Counts how often the graph uses each parameter, whoever does it: a layer, or a call of ``F.linear``.

    A use is an edge into what depends on one parameter alone: itself, its transpose, its cast to another precision.

    Args:
        names: the names of the parameters that are measured; other leaves do not count.

    Attributes:
        uses: how often each parameter is used below the nodes that were visited, by its name.
    """

    def __init__(self, names: ParameterNames) -> None:
        self.uses: Counter[str] = Counter()
        self._names = names
        self._only: dict[Node, str | None] = {}  # the parameter that all below a node depends on, if it is just one
        self._is_hooked: dict[Node, bool] = {}  # whether a hook of ours waits at or below a node
        self._leaves: list[Node] = []

    def visit(self, root: Node) -> Iterator[GradientEdge]:
        """Look at all below a node, once; yields where our hooks wait that have none of ours below them."""
        stack = [root]
        while stack:
            node = stack[-1]
            children = [child for child, _ in node.next_functions if child is not None]
            waiting = [] if node in self._only else [child for child in children if child not in self._only]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if node not in self._only:
                yield from self._account_for(node, children)

    def _account_for(self, node: Node, children: list[Node]) -> Iterator[GradientEdge]:
        here = our_hooks_at(node)
        for handles in here.values():
            for handle in handles:
                ensure_runs_last(handle)
        below = any(self._is_hooked[child] for child in children)
        self._is_hooked[node] = below or bool(here)
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            self._leaves.append(node)
            self._only[node] = self._names.of(leaf)
        else:
            names = {self._only[child] for child in children}
            self._only[node] = names.pop() if len(names) == 1 and not here else None
            if self._only[node] is None:
                self.uses.update(name for child in children if (name := self._only[child]) is not None)
        if here and not below:
            yield from (GradientEdge(node, number) for number in here)

    def all_leaves_run(self) -> bool:
        """Whether the running backward pass brings a gradient to every leaf that was visited."""
        try:
            return all(torch._C._will_engine_execute_node(leaf) for leaf in self._leaves)
        except RuntimeError:  # torch.autograd.grad
            return False


# ------------------------------------------------------------------------------------------ what the gradients tell
class GradientCheck:
    """Compares, in a training backward pass, the gradient of a parameter with the sum of the contributions to it.

    Args:
        confirmed: parameters that need no comparison any more; those that pass the comparison are added. A gradient
            that is zero or not finite confirms nothing.
    """

    def __init__(self, confirmed: set[str]) -> None:
        self._confirmed = confirmed
        self._done: Collection[str] = frozenset(confirmed)
        self._sums: dict[str, Tensor] = {}
        self._norm_bounds: dict[str, Tensor] = {}

    def expect(self, contributions: Mapping[str, Contribution]) -> None:
        """Add up contributions to parameters, by name."""
        for name, each in contributions.items():
            if name not in self._done:
                gradient, bound = each.gradient(), each.norm_bound()
                self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient
                self._norm_bounds[name] = self._norm_bounds[name] + bound if name in self._norm_bounds else bound

    def compare(self, name: str, gradient: Tensor, lowest: torch.dtype) -> None:
        """Compare the sum with the gradient that autograd is about to accumulate.

        Args:
            name: the parameter.
            gradient: its gradient.
            lowest: the lowest precision among the gradients of outputs.

        Raises:
            RuntimeError: the contributions do not add up to the gradient.
        """
        expected = self._sums.pop(name, None)
        if expected is None or gradient.layout != torch.strided or gradient.dtype not in TOLERANCE:
            return
        size = torch.linalg.vector_norm(gradient.to(expected.dtype))
        difference = torch.linalg.vector_norm(gradient.to(expected.dtype) - expected.view_as(gradient))
        rounding = ROUNDING * torch.finfo(lowest).eps * self._norm_bounds[name]
        if difference > TOLERANCE.get(lowest, LOW_PRECISION) * size + rounding:  # False where either is NaN
            raise RuntimeError(
                f"{name!r}: its gradient, of norm {float(size):.3g}, differs by {float(difference):.3g} from what "
                "the layers that own it account for. Is it also used elsewhere, outside of a layer's own forward, or "
                "does a hook of the parameter change it?"
            )
        if 0 < size < torch.inf:
            self._confirmed.add(name)
