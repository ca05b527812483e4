"""A backward pass that stops before the weights: gradients of activations alone, half the work of a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

_DEEPEST = "snr_optim: the output of a layer, below which there is nothing but weights"


def mark_as_deepest(output: Tensor) -> None:
    """Note in the graph that the layer that made this output was given nothing that wants a gradient."""
    node: Any = output.grad_fn
    node.metadata[_DEEPEST] = output.output_nr


def run_without_weight_gradients(loss: Tensor, retain_graph: bool) -> None:
    """Bring gradients to the outputs of all layers, and to no weight.

    Raises:
        ValueError: ``loss`` is no scalar with a graph behind it.
    """
    if loss.numel() != 1 or loss.grad_fn is None:
        raise ValueError(f"log_prob_sum: expected a scalar with a graph, got shape {list(loss.shape)}")
    edges = list(_deepest(loss.grad_fn))
    if edges:
        torch.autograd.grad(loss, edges, retain_graph=retain_graph, allow_unused=True)


def _deepest(root: Node) -> Iterator[GradientEdge]:
    """Outputs that were marked, and leaves that are no weights: embeddings that were made to want a gradient."""
    seen, stack = {root}, [root]
    while stack:
        node: Any = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and not isinstance(leaf, nn.Parameter):
            yield GradientEdge(node, 0)
        if _DEEPEST in node.metadata:
            yield GradientEdge(node, node.metadata[_DEEPEST])
            continue
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
