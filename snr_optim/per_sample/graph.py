"""A backward pass that stops before the weights: gradients of activations alone, half the work of a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_OBSERVED = "snr_optim: which of the outputs of this node a hook waits at"


def mark_as_observed(output: Tensor) -> None:
    """Note in the graph that the gradient of this tensor is wanted."""
    node: Any = output.grad_fn
    node.metadata.setdefault(_OBSERVED, set()).add(output.output_nr)


def run_without_weight_gradients(loss: Tensor, retain_graph: bool) -> None:
    """Bring gradients to all tensors that are observed, and to nothing below them.

    Raises:
        ValueError: ``loss`` is no scalar with a graph behind it.
    """
    if loss.numel() != 1 or loss.grad_fn is None:
        raise ValueError(f"log_prob_sum: expected a scalar with a graph, got shape {list(loss.shape)}")
    edges = list(_deepest(loss.grad_fn))
    if edges:
        torch.autograd.grad(loss, edges, retain_graph=retain_graph, allow_unused=True)


def _deepest(root: Node) -> Iterator[GradientEdge]:
    """What is observed and has nothing observed below it: on the way there, autograd passes all the rest."""
    below: dict[Any, bool] = {}  # is anything observed there?
    stack: list[Any] = [root]
    while stack:
        node = stack[-1]
        children = [child for child, _ in node.next_functions if child is not None]
        waiting = [] if node in below else [child for child in children if child not in below]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node in below:
            continue
        below[node] = any(below[child] or _OBSERVED in child.metadata for child in children)
        if not below[node]:
            yield from (GradientEdge(node, number) for number in node.metadata.get(_OBSERVED, ()))
