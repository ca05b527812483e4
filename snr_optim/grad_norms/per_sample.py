"""``PerSampleGradNorms``: what users hold; from the gradients of outputs to norms per sequence."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from snr_kernels.dispatch import exactly
from snr_optim.grad_norms.accumulate import ExactTotals, SketchTotals, Totals, next_size
from snr_optim.grad_norms.backward_pass import Block
from snr_optim.grad_norms.capture import Casts, Observation
from snr_optim.grad_norms.check import GradientCheck
from snr_optim.grad_norms.coverage import Survey, run_without_weight_gradients
from snr_optim.grad_norms.hooks import CallRecord, ForwardHook
from snr_optim.grad_norms.layers import (
    Layer,
    device_of,
    layers_of,
    not_called,
    refuse_compiled,
    refuse_old_backward_hooks,
    refuse_tensor_parallel,
    some,
)
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.rules import Call, Embedding, Rule, counts_uses

FIRST_SKETCH = 16  # columns, before any error is known


class PerSampleGradNorms:
    r"""Squared gradient norm of every sequence of a batch, over all parameters of the model, from one backward pass.

    .. math::
        w_s = \sum_\theta \Big\| \sum_{t \in s} \nabla_\theta \ell_t \Big\|^2, \qquad
        \nabla_W = \sum_t g_t a_t^\top \;\Rightarrow\;
        \|\nabla_W\|_F^2 = \sum_{t,u} (a_t \cdot a_u)(g_t \cdot g_u)

    Hooks see what each layer was given, ``a``, and the gradient of its output, ``g``; the gradients of single
    sequences are never formed (ghost norms: arXiv 1510.01799, 2205.10683; here with packed sequences, weights used
    more than once, and the cheaper side of the formula for each layer and length). Model, loss, ``.grad`` and the
    number of backward passes stay as they are. The weights ``w`` of OBLR-PO (arXiv 2511.23310, theorem 7) for
    ``l = log pi``.

    **Layers**: ``Linear``, ``Embedding`` (scaled ones too), ``LayerNorm``, ``RMSNorm`` of torch and, tried out on
    construction, of any library (Llama, Qwen3 with q/k-norm, Gemma's ``1 + w``), GPT-2's ``Conv1D``, hence peft's LoRA.
    Tied embeddings and modules that are called several times get their cross terms. Frozen parameters do not count.
    Any other trainable parameter is refused by name, unless ``rules`` covers it.

    **Hooks of others**, of layers or of tensors, that change outputs or gradients are part of the model: norms are of
    what ``backward()`` computes for each sequence. What runs before our own forward hook, the first of its layer, and
    changes the output is refused. Hooks of a parameter are not counted: norms are of the gradient that comes to it.
    Hooks of a node of the graph are found by the ``check`` of a training backward pass alone.

    **Scale.** The norms are those of the gradient of what ``backward()`` is called on. For ``log_prob_sum``, a sum over
    sequences, each is that of its own log-probability. A loss ``sum_s c_s log pi(o_s)``, such as a mean
    (``c = 1 / B``), with advantages, scaled by a ``GradScaler``, has norms ``c_s^2 w_s``: ``squared(scale=c)``
    divides that out.

    **Works with** micro-batches (a block each), gradient checkpointing, offloading of saved tensors, autocast, DDP and
    ``fully_shard`` (norms of the rank's own sequences), dropout, ``eval()``. Checkpoints that are reentrant must not
    hold a module that is called twice. Blocks compiled by ``torch.compile`` are refused; compiling *after* this
    object was made works, with a graph break at every layer.

    **Must hold**: the first dimension of every activation is the batch, or it holds the packed tokens; and sequences do
    not meet within a layer, as in batch norms or in experts that are given tokens of all sequences. Other shapes are
    refused, but one that happens to fit cannot be told apart. While another graph of the model is alive (a loss of
    before that is still referenced), its calls seem to wait for gradients, and inputs are kept until the block ends.

    Args:
        model: as it will be trained: wrapped, frozen and with its adapters. It is hooked until :meth:`remove`, or until
            this object goes.
        method: ``"exact"``; or ``"sketch"``, random projections of the gradients, linear in the tokens and
            unbiased, for sequences so long that they are cheaper.
        parameters: which to count, by their names; all by default. ``lambda name: "norm" in name`` counts norms alone.
        rules: for other layers, by class: ``by_autograd`` works for any layer that maps one tensor to another and has
            few parameters of its own; also for a block around other layers, or the model itself.
        relative_error: wanted standard error of a sketch, relative to the norm; each block is sketched as finely
            as the errors of the one before suggest, with 4 columns or more, and exact where that is cheaper (sequences
            of twice as many tokens as columns). ``sketch_size`` is the number of columns; set it to start elsewhere.
        seed: of the sketches. Ranks with the same seed draw the same signs.
        check: when to compare, in a block with a training backward pass, every parameter's gradient with what the
            layers account for: the ``"first"`` time that it has one, as this takes about as long as the weight
            gradients, ``"always"`` or ``"never"``. Besides, the uses of every parameter are counted in the graph each
            time: in all of it by :meth:`backward`; in a training backward pass, which does not tell where it began, in
            what is below the layers. A functional use beside or above them is found by the comparison alone.

    Raises:
        ValueError: a trainable parameter without a rule, none at all, several devices, compiled modules, options
            that do not exist.

    Example:
        >>> model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 1, bias=False))
        >>> for p in model.parameters():
        ...     _ = nn.init.ones_(p)
        >>> norms = PerSampleGradNorms(model)
        >>> output = model(torch.tensor([[0, 1], [2, 2]]))
        >>> with norms.sequences(batch_size=2):
        ...     output.sum().backward()
        >>> norms.squared()     # the second sequence uses one row twice
        tensor([18., 24.])
        >>> model[1].weight.grad
        tensor([[4., 4., 4.]])
    """

    def __init__(
        self,
        model: nn.Module,
        method: Literal["exact", "sketch"] = "exact",
        *,
        parameters: Callable[[str], bool] | None = None,
        rules: Mapping[type[nn.Module], Rule] | None = None,
        relative_error: float = 0.1,
        seed: int = 0,
        check: Literal["first", "always", "never"] = "first",
    ) -> None:
        if method not in ("exact", "sketch"):
            raise ValueError(f"method: expected 'exact' or 'sketch', got {method!r}")
        if not 0 < relative_error < 1:
            raise ValueError(f"relative_error: expected a number between 0 and 1, got {relative_error!r}")
        if check not in ("first", "always", "never"):
            raise ValueError(f"check: expected 'first', 'always' or 'never', got {check!r}")
        if parameters is not None and not callable(parameters):
            raise TypeError(f"parameters: expected a function of a name, got {type(parameters).__name__}")
        if rules is not None and not (isinstance(rules, Mapping) and all(isinstance(cls, type) for cls in rules)):
            raise TypeError(f"rules: expected rules by the layers' classes, got {rules!r}")
        self.method, self.relative_error, self.seed = method, relative_error, seed
        self.sketch_size = FIRST_SKETCH
        self._model = model
        self._wanted = parameters or (lambda name: True)
        refuse_compiled(model)
        refuse_tensor_parallel(model)
        self._layers = layers_of(model, self._wanted, rules or {})
        self._covered = {name for layer in self._layers for name in layer.names.values()}
        self._opaque = {name for layer in self._layers if not counts_uses(layer.rule) for name in layer.names.values()}
        self._device = device_of(model, self._covered)
        self._check_when, self._confirmed = check, set[str]()
        self._block: Block | None = None
        self._blocks = 0
        self._result: tuple[Tensor, Tensor | None] | None = None
        self._casts = Casts()
        self._names = WeakIdKeyDictionary()  # of parameters, those too that fully_shard puts in place
        me = weakref.ref(self)
        handles = [
            layer.module.register_forward_hook(ForwardHook(me, layer), prepend=True, with_kwargs=True)
            for layer in self._layers
        ]
        for name, p in model.named_parameters():
            if name in self._covered:
                self._names[p] = name
                if hasattr(p, "placements"):  # a shard gets its gradient by other ways
                    self._check_when = "never"
                else:
                    hook: Any = partial(_on_parameter, me, name)
                    hook.changes_nothing = True  # so that a source of moments does not wonder what comes after it
                    handles.append(p.register_hook(hook))  # type: ignore[no-untyped-call]
        self._remove = weakref.finalize(self, _remove_all, handles)

    # -- what the user calls ------------------------------------------------------------------------

    @contextmanager
    def sequences(
        self,
        batch_size: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        groups: int | Tensor | None = None,
    ) -> Iterator[None]:
        """The backward pass within is measured; exactly one, of a forward pass before or within.

        Args:
            batch_size: of a padded batch, whose activations are ``[batch_size, ...]``. Padding needs no mask: it has no
                gradient.
            cu_seqlens: of a packed batch, whose activations are ``[1, N, ...]`` or ``[N, ...]``: ``0`` and the
                end of each sequence, ``[S + 1]`` integers. Brought to the host once.
            groups: take several sequences as one unit, the prompt's: a number of neighbours, or an id per sequence
                (then units are in ascending order of ids). The norm is that of the sum of their gradients.

        Raises:
            TypeError, ValueError: bad arguments; or activations, in the backward pass, that have other sequences.
            RuntimeError: no backward pass within, or a second one; a graph that an earlier one has freed; gradients of
                parameters that no layer accounts for; outputs that other hooks changed before ours; backward hooks of
                the old kind; parameters that became trainable meanwhile; blocks within
                blocks. An error, or any exception within the block, leaves no norms and no state behind.
        """
        if (batch_size is None) == (cu_seqlens is None):
            raise ValueError(
                "batch_size, cu_seqlens: expected one of them: batch_size for padded, cu_seqlens for packed"
            )
        if self._block is not None:
            raise RuntimeError("sequences: the previous block is still open")
        if not self._remove.alive:
            raise RuntimeError("sequences: the hooks were removed")
        self._result = None
        self._expect_known_parameters()
        refuse_old_backward_hooks(self._model)
        if cu_seqlens is not None:
            layout = Layout.of_packed(cu_seqlens, groups, self._device)
        else:
            layout = Layout.padded(batch_size, groups, self._device)  # type: ignore[arg-type]
        totals: Totals
        if self.method == "exact":
            totals = ExactTotals(len(layout), self._device)
        else:
            if not isinstance(self.sketch_size, int) or self.sketch_size < 2:
                raise ValueError(f"sketch_size: expected an integer of at least 2 columns, got {self.sketch_size!r}")
            seed = (self.seed, self._blocks)
            totals = SketchTotals(len(layout), self._device, self.sketch_size, seed, self._opaque)
        check = None
        if self._check_when != "never":
            check = GradientCheck(self._confirmed if self._check_when == "first" else set())
        self._block = Block(layout, totals, Survey(self._names.get), check, self._opaque)
        try:
            yield
            block = self._block
            block.expect_every_use(self._why_not_called)
            with exactly(self._device):
                self._result = totals.finish()
        finally:
            self._block = None
        self._blocks += 1
        squared, variances = self._result
        if variances is not None:
            self.sketch_size = next_size(self.sketch_size, squared, variances, self.relative_error)

    def backward(self, log_prob_sum: Tensor, *, retain_graph: bool = False) -> None:
        """A backward pass for the norms alone, within a block: no weight gradient is computed, no ``.grad`` touched.

        Where the loss depends on the norms. With ``retain_graph=True`` the training backward pass follows on the same
        graph. Under DDP, a forward pass for this alone belongs into ``no_sync()``. Not with reentrant checkpoints.

        Args:
            log_prob_sum: a scalar.
            retain_graph: keep the graph for another backward pass.

        Raises:
            ValueError: no scalar, or none with a graph.
            RuntimeError: outside of a block.
        """
        if self._block is None:
            raise RuntimeError("backward: expected within `with norms.sequences(...)`")
        self._block.norms_alone, self._block.check = True, None
        run_without_weight_gradients(log_prob_sum, self._block.survey, retain_graph)
        self._block.ran = True

    def squared(self, scale: float | Tensor = 1.0) -> Tensor:
        """Squared norms of the last block.

        Args:
            scale: what the loss multiplied each ``log pi(o_s)`` by: a number, or one per unit.

        Returns:
            ``[S]``, float32 (float64 for a float64 model), without gradient; NaN where ``scale`` is 0, 0 for
            empty sequences. NaN in one sequence does not touch others.

        Raises:
            RuntimeError: no block has been completed.
            ValueError: ``scale`` of another shape.
        """
        norms, _ = self._finished("squared")
        return norms / _square(scale, norms)

    def standard_error(self, scale: float | Tensor = 1.0) -> Tensor:
        """Estimated standard error of each of the :meth:`squared` norms: 0 where they are exact."""
        norms, variances = self._finished("standard_error")
        if variances is None:
            return torch.zeros_like(norms)
        return variances.sqrt().to(norms.dtype) / _square(scale, norms)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._remove()

    def _finished(self, asked: str) -> tuple[Tensor, Tensor | None]:
        if self._result is None:
            hint = "; leave the block first" if self._block is not None else ""
            raise RuntimeError(f"{asked}: no block of `with norms.sequences(...)` has been completed{hint}")
        return self._result

    def _expect_known_parameters(self) -> None:
        now = {name for name, p in self._model.named_parameters() if p.requires_grad and self._wanted(name)}
        if new := sorted(now - self._covered):
            raise RuntimeError(
                f"model: {some(new)} became trainable after PerSampleGradNorms was made; make it anew, "
                "when the model is wrapped and frozen as it will be trained"
            )

    # -- what the hooks call ------------------------------------------------------------------------

    def _on_gradient(self, layer: Layer, record: CallRecord, observed: Observation, gradient: Tensor) -> None:
        """The gradient of a layer's output has come."""
        block = self._block
        if block is None:
            return
        block.enter()
        if record.changed_by is not None:
            raise RuntimeError(
                f"{layer.name!r}: forward hooks that ran before ours changed its output ({record.changed_by}). "
                "Register them on the module, before PerSampleGradNorms is made or without prepend=True"
            )
        if not record.alone:
            raise RuntimeError(
                f"{layer.name!r} was called with more than its input: no rule tells what that does; "
                "leave its parameters out by parameters="
            )
        inputs = observed.inputs()
        gradient = gradient.view(record.shape)
        with exactly(gradient.device):
            given = gradient if inputs is None else inputs
            call = Call(layer.module, given, gradient, block.layout, record.trained, record.autocast)
            try:
                uses = layer.rule(call)
            except ValueError as error:
                raise ValueError(f"{error} (in {layer.name!r})") from None
            block.report(layer, uses, once=not observed.others_wait(), tied=self._tied_ids)
            block.lowest = min(block.lowest, gradient.dtype, key=lambda dtype: dtype.itemsize)

    def _why_not_called(self, name: str) -> str:
        """Why none of the layers that own this parameter has reported a use of it."""
        owners = [layer for layer in self._layers if name in layer.names.values()]
        return not_called(next((layer for layer in owners if layer.returned is not None), owners[0]))

    def _tied_ids(self, layer: Layer, name: str) -> Tensor | None:
        """What an embedding was given whose weight the layer shares, if there is no further use of it."""
        others = [other for other in self._layers if other is not layer and name in other.names.values()]
        if len(others) != 1 or not isinstance(others[0].rule, Embedding) or len(others[0].waiting) != 1:
            return None
        return next(iter(others[0].waiting)).inputs()

    def _on_parameter(self, name: str, gradient: Tensor) -> None:
        """The gradient of a parameter is about to be accumulated."""
        block = self._block
        if block is None:
            return
        if not block.reported[name]:
            raise RuntimeError(
                f"{name!r} got a gradient, but the layer that owns it was not called in a way that can be observed: "
                f"{self._why_not_called(name)}. Leave it out by parameters="
            )
        if block.check is not None:
            block.check.compare(name, gradient, block.lowest)


def _on_parameter(recorder: weakref.ref[PerSampleGradNorms], name: str, gradient: Tensor) -> None:
    me = recorder()
    if me is not None:
        me._on_parameter(name, gradient)


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _square(scale: float | Tensor, norms: Tensor) -> Tensor:
    """``scale^2``; NaN where it is zero, for then the backward pass knew nothing of the sequence."""
    square = torch.as_tensor(scale, dtype=norms.dtype, device=norms.device).detach().square()
    if square.dim() and square.shape != norms.shape:
        raise ValueError(f"scale: expected a number or one per sequence, {list(norms.shape)}, got {list(square.shape)}")
    return square.masked_fill(square == 0, math.nan)
