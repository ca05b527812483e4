"""What the autograd graph tells: how often each parameter is used, where hooks wait, and what a backward pass runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import ensure_runs_last

_OBSERVED = "snr_optim: our hooks at the outputs of this node, by the number of the output"


def mark_as_observed(output: Tensor, handle: RemovableHandle) -> None:
    """Note in the graph that our hook waits for the gradient of this tensor."""
    node: Any = output.grad_fn
    node.metadata.setdefault(_OBSERVED, {}).setdefault(output.output_nr, []).append(handle)


def observed_at(node: Any) -> dict[int, list[RemovableHandle]]:
    """Our hooks at the outputs of a node."""
    found: dict[int, list[RemovableHandle]] = node.metadata.get(_OBSERVED, {})
    return found


class Survey:
    """Counts the uses of parameters below nodes of the graph, whoever made them: a layer, or a call of ``F.linear``.

    A use is an edge into what depends on one parameter alone: itself, its transpose, its cast to another precision.

    Args:
        name_of: the name of a parameter that counts; None for other leaves.
    """

    def __init__(self, name_of: Callable[[Tensor], str | None]) -> None:
        self.uses: Counter[str] = Counter()
        self._name_of = name_of
        self._alone: dict[Any, str | None] = {}  # the parameter that all below a node depends on, if it is just one
        self._observed: dict[Any, bool] = {}  # does a hook wait at or below a node?
        self._leaves: list[Any] = []

    def visit(self, root: Node) -> Iterator[GradientEdge]:
        """Look at all below a node, once; yields where hooks wait that have none below them."""
        stack: list[Any] = [root]
        while stack:
            node = stack[-1]
            children = [child for child, _ in node.next_functions if child is not None]
            waiting = [] if node in self._alone else [child for child in children if child not in self._alone]
            if waiting:
                stack += waiting
                continue
            stack.pop()
            if node not in self._alone:
                yield from self._close(node, children)

    def _close(self, node: Any, children: list[Any]) -> Iterator[GradientEdge]:
        here = observed_at(node)
        for handles in here.values():
            for handle in handles:
                ensure_runs_last(handle)
        below = any(self._observed[child] for child in children)
        self._observed[node] = below or bool(here)
        if hasattr(node, "variable"):
            self._leaves.append(node)
            self._alone[node] = self._name_of(node.variable)
        else:
            names = {self._alone[child] for child in children}
            self._alone[node] = names.pop() if len(names) == 1 and not here else None
            if self._alone[node] is None:
                self.uses.update(name for child in children if (name := self._alone[child]) is not None)
        if here and not below:
            yield from (GradientEdge(node, number) for number in here)

    def runs_whole(self) -> bool:
        """Whether the running backward pass brings a gradient to every leaf that was seen."""
        try:
            return all(torch._C._will_engine_execute_node(leaf) for leaf in self._leaves)
        except RuntimeError:  # torch.autograd.grad
            return False


def run_without_weight_gradients(loss: Tensor, survey: Survey, retain_graph: bool) -> None:
    """Bring gradients to all tensors at which hooks wait, and to nothing below them.

    Raises:
        ValueError: ``loss`` is no scalar with a graph behind it.
    """
    if loss.numel() != 1:
        raise ValueError(f"log_prob_sum: expected a scalar, got shape {list(loss.shape)}")
    if loss.grad_fn is None:
        raise ValueError("log_prob_sum: expected a tensor with a graph behind it, got one without")
    edges = list(survey.visit(loss.grad_fn))
    if not edges:
        return
    try:
        torch.autograd.grad(loss, edges, retain_graph=retain_graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "backward: norms alone do not get through reentrant checkpoints; use_reentrant=False, or measure the "
            "training backward pass"
        ) from error
