"""What one block of ``with norms.sequences(...)`` has seen of its backward pass, and what it expects of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from snr_optim._torch import current_backward, is_nested_backward
from snr_optim.grad_norms.accumulate import Totals
from snr_optim.grad_norms.check import GradientCheck
from snr_optim.grad_norms.coverage import Survey
from snr_optim.grad_norms.layers import Layer
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.rules import Uses


class Block:
    """From the first gradient of a backward pass to the last."""

    def __init__(
        self, layout: Layout, totals: Totals, survey: Survey, check: GradientCheck | None, opaque: Collection[str]
    ) -> None:
        self.layout, self.totals, self.survey, self.check = layout, totals, survey, check
        self._opaque = opaque  # parameters that their layer may use as often as it likes
        self.norms_alone = False  # no parameter gets a gradient
        self.ran = False  # the backward pass for norms alone, whether or not it came to any layer
        self.reported: Counter[str] = Counter()  # uses of parameters, by their names
        self.lowest = torch.float64  # precision among the gradients
        self._backward: int | None = None  # the pass that is no checkpoint's
        self._passes: set[int] = set()
        self._counted: set[Layer] = set()  # layers whose norms are in the totals
        self._kept: set[Layer] = set()

    def enter(self) -> None:
        """A gradient has come.

        Raises:
            RuntimeError: in another backward pass than before, or in one that is not for all parameters.
        """
        if not self.norms_alone:
            for _ in self.survey.visit(torch._C._current_autograd_node()):
                pass
        number = current_backward()
        if number in self._passes:
            return
        self._passes.add(number)
        if is_nested_backward():
            return
        if self._backward is not None:
            raise RuntimeError("sequences: a second backward pass within one block; take a block for each")
        self._backward = number
        if not self.norms_alone and not self.survey.runs_whole():
            raise RuntimeError(
                "sequences: the backward pass is for some tensors only; expected loss.backward(), "
                "or norms.backward(log_prob_sum) for no gradients at all"
            )

    def report(self, layer: Layer, uses: Uses, once: bool, tied: Callable[[Layer, str], Tensor | None]) -> None:
        """Count the uses of a call; or keep them, where their parameters have others."""
        if layer in self._counted:
            raise RuntimeError(
                f"{layer.name!r} is called several times under a reentrant checkpoint, which does not tell before it "
                "is too late; use_reentrant=False"
            )
        named = {layer.names[local]: use for local, use in uses.items()}
        self.reported.update(named.keys())
        if self.check is not None:
            self.check.expect(named)
        once = once and layer not in self._kept
        (self._counted if once else self._kept).add(layer)
        kept = {local for local in uses if not once or layer.names[local] in layer.shared}
        self.totals.add(layer.names, {local: use for local, use in uses.items() if local not in kept})
        for local in kept:
            ids = tied(layer, layer.names[local]) if once else None
            self.totals.keep(layer.names[local], uses[local], None if ids is None else self.layout.cut_ids(ids))

    def expect_every_use(self, why_not_called: Callable[[str], str]) -> None:
        """Compare what the layers reported with what the graph holds.

        Args:
            why_not_called: what may be the reason that no layer reported a use of a parameter, by its name.

        Raises:
            RuntimeError: there was no backward pass, or a parameter is also used where no layer reports it.
        """
        if self._backward is None and not (self.ran and self.survey.uses):
            raise RuntimeError(
                "backward: log_prob_sum depends on none of the parameters that are measured"
                if self.ran
                else "sequences: no backward pass through the model within the block"
            )
        for name, uses in self.survey.uses.items():
            if not self.reported[name]:
                raise RuntimeError(
                    f"{name!r} is used {uses} times in the graph, and 0 times by the layers that own it: "
                    f"{why_not_called(name)}. Leave it out by parameters="
                )
            if uses != self.reported[name] and name not in self._opaque:
                raise RuntimeError(
                    f"{name!r} is used {uses} times in the graph, and {self.reported[name]} times by the layers that "
                    "own it: also elsewhere, by a functional call or a fused loss, where no hook sees it; "
                    "leave it out by parameters=, and add head_grad_norms if it is an untied head; with a tied one "
                    "take the logits"
                )
