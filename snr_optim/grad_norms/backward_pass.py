"""The one backward pass of a block ``with norms.sequences(...)``, from the first gradient to the norms.

The hooks hand it each gradient as it comes; it applies the layer's rule, adds up what the rule finds, and compares all
of it with what the graph holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from snr_kernels.precision import exactly
from snr_optim._torch import current_backward, is_nested_backward
from snr_optim.grad_norms.accumulate import NormAccumulator
from snr_optim.grad_norms.capture import ForwardCall
from snr_optim.grad_norms.contributions import Contributions
from snr_optim.grad_norms.coverage import Coverage
from snr_optim.grad_norms.layers import Layer
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.rules import Call, EmbeddingRule


class BackwardPass:
    """Measures one backward pass.

    Args:
        layers: the layers that are measured.
        layout: cuts activations into the units of the batch.
        norms: adds up what the layers contribute.
        coverage: tells whether nothing was left out.
    """

    def __init__(self, layers: list[Layer], layout: Layout, norms: NormAccumulator, coverage: Coverage) -> None:
        self._layers, self._layout, self._norms, self._coverage = layers, layout, norms, coverage
        self._for_norms_alone = False  # no parameter gets a gradient
        self._ran_for_norms_alone = False  # whether or not it came to any layer
        self._number: int | None = None  # of the pass that is not a checkpoint's
        self._entered: set[int] = set()
        self._added: set[Layer] = set()  # layers whose contributions are in the norms
        self._kept: set[Layer] = set()

    # -- what the user's object calls ---------------------------------------------------------------

    def run_for_norms_alone(self, log_prob_sum: Tensor, retain_graph: bool) -> None:
        """Bring gradients to all tensors at which our hooks wait, and to nothing below them.

        Raises:
            ValueError: ``log_prob_sum`` is not a scalar with a graph behind it.
        """
        self._for_norms_alone, self._coverage.gradients = True, None
        if log_prob_sum.numel() != 1:
            raise ValueError(f"log_prob_sum: expected a scalar, got shape {list(log_prob_sum.shape)}")
        if log_prob_sum.grad_fn is None:
            raise ValueError("log_prob_sum: expected a tensor with a graph behind it, got one without")
        edges = list(self._coverage.graph.visit(log_prob_sum.grad_fn))
        if edges:
            try:
                torch.autograd.grad(log_prob_sum, edges, retain_graph=retain_graph, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                raise RuntimeError(
                    "backward: norms alone do not get through reentrant checkpoints; use_reentrant=False, or measure "
                    "the training backward pass"
                ) from error
        self._ran_for_norms_alone = True

    def finish(self) -> tuple[Tensor, Tensor | None]:
        """Squared norms, ``[S]``, and the variances of their estimates; None where the norms are exact.

        Raises:
            RuntimeError: there was no backward pass, or a parameter is also used where no layer reports it.
        """
        if self._number is None and not (self._ran_for_norms_alone and self._coverage.graph.uses):
            raise RuntimeError(
                "backward: log_prob_sum depends on none of the parameters that are measured"
                if self._ran_for_norms_alone
                else "sequences: no backward pass through the model within the block"
            )
        self._coverage.expect_every_use()
        with exactly(self._layout.device):
            return self._norms.finish()

    # -- what the hooks call ------------------------------------------------------------------------

    def take_output_gradient(self, layer: Layer, call: ForwardCall, gradient: Tensor) -> None:
        """The gradient of a layer's output has come, for one of its calls.

        Raises:
            RuntimeError: it comes in a second backward pass, or in one that is not for all parameters; or the call is
                one that no rule covers.
            ValueError: an activation does not have the sequences of the batch.
        """
        self._enter()
        _expect_a_call_that_rules_cover(layer, call)
        inputs = call.inputs()
        gradient = gradient.view(call.output_shape)
        with exactly(gradient.device):
            given = gradient if inputs is None else inputs
            try:
                contributions = layer.rule(
                    Call(layer.module, given, gradient, self._layout, call.trained, call.autocast)
                )
            except ValueError as error:
                raise ValueError(f"{error} (in {layer.name!r})") from None
            self._take(layer, contributions, is_only_call=not call.others_wait(), dtype=gradient.dtype)

    def take_parameter_gradient(self, name: str, gradient: Tensor) -> None:
        """The gradient of a parameter is about to be accumulated.

        Raises:
            RuntimeError: it is not what the layers account for.
        """
        self._coverage.expect_gradient(name, gradient)

    # -- how it goes on from there ------------------------------------------------------------------

    def _enter(self) -> None:
        if not self._for_norms_alone:
            for _ in self._coverage.graph.visit(torch._C._current_autograd_node()):
                pass
        number = current_backward()
        if number in self._entered:
            return
        self._entered.add(number)
        if is_nested_backward():
            return
        if self._number is not None:
            raise RuntimeError("sequences: a second backward pass within one block; take a block for each")
        self._number = number
        if not self._for_norms_alone and not self._coverage.graph.all_leaves_run():
            raise RuntimeError(
                "sequences: the backward pass is for some tensors only; expected loss.backward(), "
                "or norms.backward(log_prob_sum) for no gradients at all"
            )

    def _take(self, layer: Layer, contributions: Contributions, is_only_call: bool, dtype: torch.dtype) -> None:
        """Add the contributions to the norms, or keep those whose parameters get others too."""
        if layer in self._added:
            raise RuntimeError(
                f"{layer.name!r} is called several times under a reentrant checkpoint, which does not tell before it "
                "is too late; use_reentrant=False"
            )
        self._coverage.report({layer.names[local]: each for local, each in contributions.items()}, dtype)
        is_only_call = is_only_call and layer not in self._kept
        (self._added if is_only_call else self._kept).add(layer)
        kept = [local for local in contributions if not is_only_call or layer.names[local] in layer.shared]
        self._norms.add(layer.names, {local: each for local, each in contributions.items() if local not in kept})
        for local in kept:
            name = layer.names[local]
            ids = self._ids_of_tied_embedding(layer, name) if is_only_call else None
            self._norms.keep(name, contributions[local], None if ids is None else self._layout.cut_ids(ids))

    def _ids_of_tied_embedding(self, layer: Layer, name: str) -> Tensor | None:
        """What an embedding was given whose weight the layer shares, if nothing else uses that weight."""
        others = [other for other in self._layers if other is not layer and name in other.names.values()]
        if len(others) != 1 or not isinstance(others[0].rule, EmbeddingRule) or len(others[0].waiting) != 1:
            return None
        return next(iter(others[0].waiting)).inputs()


def _expect_a_call_that_rules_cover(layer: Layer, call: ForwardCall) -> None:
    if call.changed_by is not None:
        raise RuntimeError(
            f"{layer.name!r}: forward hooks that ran before ours changed its output ({call.changed_by}). "
            "Register them on the module, before PerSampleGradNorms is made or without prepend=True"
        )
    if not call.input_alone:
        raise RuntimeError(
            f"{layer.name!r} was called with more than its input: no rule tells what that does; "
            "leave its parameters out by parameters="
        )
