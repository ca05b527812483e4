"""``PerSampleGradNorms``: the object that users hold. It hooks their model, opens blocks and hands out the norms."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snr_optim.grad_norms.accumulate import ExactNorms, NormAccumulator, SketchedNorms, next_num_columns
from snr_optim.grad_norms.backward_pass import BackwardPass
from snr_optim.grad_norms.coverage import Coverage, GradientCheck
from snr_optim.grad_norms.hooks import ModelHooks
from snr_optim.grad_norms.layers import (
    ParameterNames,
    common_device,
    layers_of,
    refuse_compiled,
    refuse_old_backward_hooks,
    refuse_tensor_parallel,
    shortened,
)
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.rules import Rule

Method: TypeAlias = Literal["exact", "sketch"]
WhenToCheck: TypeAlias = Literal["first", "always", "never"]

FIRST_SKETCH_SIZE = 16  # columns, before any error is known


class PerSampleGradNorms:
    r"""Squared gradient norm of every sequence of a batch, over all parameters of the model, from one backward pass.

    .. math::
        w_s = \sum_\theta \Big\| \sum_{t \in s} \nabla_\theta \ell_t \Big\|^2, \qquad
        \nabla_W = \sum_t g_t a_t^\top \;\Rightarrow\;
        \|\nabla_W\|_F^2 = \sum_{t,u} (a_t \cdot a_u)(g_t \cdot g_u)

    Hooks see what each layer was given, ``a``, and the gradient of its output, ``g``; the gradients of single
    sequences are never formed (ghost norms: arXiv 1510.01799, 2205.10683; here with packed sequences, weights used
    more than once, and the cheaper side of the formula for each layer and length). Model, loss, ``.grad`` and the
    number of backward passes stay as they are. With ``l = log pi``, these are the weights ``w`` of OBLR-PO
    (arXiv 2511.23310, theorem 7).

    **Layers.** ``Linear``, ``Embedding`` (scaled ones too), GPT-2's ``Conv1D``, and hence peft's LoRA; ``LayerNorm``
    and ``RMSNorm`` of torch and of any library (Llama, Qwen3 with q/k-norm, Gemma's ``1 + w``), which are tried out on
    construction. Tied embeddings and modules that are called several times get their cross terms. Frozen parameters do
    not count. Any other trainable parameter is refused by name, unless ``rules`` covers it.

    **Hooks of others** on layers or tensors that change outputs or gradients are part of the model: the norms are those
    of what ``backward()`` computes for each sequence. Our forward hook is the first of its layer; if a hook that runs
    before it changes the output, the backward pass is refused. Hooks on a parameter do not affect the norms, which are
    those of the gradient that comes to it. Only the ``check`` of a training backward pass finds hooks on a node of the
    graph.

    **Scale.** The norms are those of the gradient of what ``backward()`` is called on. For ``log_prob_sum``, a sum over
    sequences, each sequence gets the norm of its own log-probability's gradient. A loss ``sum_s c_s log pi(o_s)``, such
    as a mean (``c = 1 / B``), one with advantages, or one scaled by a ``GradScaler``, has norms ``c_s^2 w_s``:
    ``squared(scale=c)`` divides that out.

    **Works with** micro-batches (a block each), gradient checkpointing, offloading of saved tensors, autocast, DDP and
    ``fully_shard`` (norms of the rank's own sequences), dropout, ``eval()``. A reentrant checkpoint must not hold a
    module that is called twice. Blocks compiled by ``torch.compile`` are refused; compiling *after* this object was
    made works, with a graph break at every layer.

    **Must hold.** The first dimension of every activation is the batch, or it holds the packed tokens. Sequences do not
    meet within a layer, as they do in a batch norm, or in experts that are given tokens of all sequences. Other shapes
    are refused, but a wrong one that happens to fit goes unnoticed. While another graph of the model is alive (an
    earlier loss that is still referenced), its calls seem to wait for gradients: inputs and output gradients are kept
    until the block ends, no products of inputs are shared, and a tied head is not narrowed to the rows that are used.
    The norms stay exact.

    Args:
        model: the model as it will be trained: wrapped, frozen and with its adapters. It is hooked until
            :meth:`remove`, or until this object goes.
        method: ``"exact"``; or ``"sketch"``, random projections of the gradients, linear in the tokens and
            unbiased, for sequences so long that they are cheaper.
        parameters: which parameters to measure, by their names; all by default. ``lambda name: "norm" in name``
            measures only those of normalization layers.
        rules: rules for other layers, by class: ``by_autograd`` works for any layer that maps one tensor to another and
            has few parameters of its own; also for a block around other layers, or the model itself.
        relative_error: wanted standard error of a sketch, relative to the norm. Each block is sketched as finely as the
            errors of the block before suggest, with 4 columns or more; sequences of at most twice as many tokens as
            columns are measured exactly, which is cheaper. ``sketch_size`` is the number of columns; set it to start
            elsewhere.
        seed: the seed of the sketches. Ranks with the same seed draw the same signs.
        check: when to compare, in a block with a training backward pass, every parameter's gradient with what the
            layers account for: the ``"first"`` time that it has one, as this takes about as long as the weight
            gradients, ``"always"`` or ``"never"``. Besides, the uses of every parameter are counted in the graph each
            time: in all of it by :meth:`backward`; in a training backward pass, which does not tell where it began,
            only below the layers. Only the comparison finds a functional use beside or above the layers.

    Raises:
        ValueError: a trainable parameter has no rule, there is no such parameter, parameters are on several devices,
            a module is compiled, or an option does not exist.

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
        method: Method = "exact",
        *,
        parameters: Callable[[str], bool] | None = None,
        rules: Mapping[type[nn.Module], Rule] | None = None,
        relative_error: float = 0.1,
        seed: int = 0,
        check: WhenToCheck = "first",
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
        self.sketch_size = FIRST_SKETCH_SIZE
        self._model = model
        self._wanted = parameters or (lambda name: True)
        refuse_compiled(model)
        refuse_tensor_parallel(model)
        self._layers = layers_of(model, self._wanted, rules or {})
        self._measured = {name for layer in self._layers for name in layer.names.values()}
        self._device = common_device(model, self._measured)
        self._num_blocks = 0
        self._result: tuple[Tensor, Tensor | None] | None = None
        self._hooks = ModelHooks(model, self._layers, ParameterNames())
        self._check: WhenToCheck = check if self._hooks.see_all_gradients else "never"
        self._confirmed = set[str]()  # parameters that the first check has passed
        self._remove = weakref.finalize(self, _remove_all, self._hooks.handles)  # the handles do not hold the model

    @contextmanager
    def sequences(
        self,
        batch_size: int | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        groups: int | Tensor | None = None,
    ) -> Iterator[None]:
        """Measure the backward pass within: exactly one, of a forward pass before the block or within it.

        Args:
            batch_size: for a padded batch, whose activations are ``[batch_size, ...]``. Padding needs no mask: it has
                no gradient.
            cu_seqlens: for a packed batch, whose activations are ``[1, N, ...]`` or ``[N, ...]``: ``0`` and the
                end of each sequence, ``[S + 1]`` integers. They are brought to the host once.
            groups: to take several sequences as one unit, such as those of a prompt: a number of neighbours, or an id
                per sequence (then units are in ascending order of ids). A unit has the norm of the sum of its
                sequences' gradients.

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
        if self._hooks.backward_pass is not None:
            raise RuntimeError("sequences: the previous block is still open")
        if not self._remove.alive:
            raise RuntimeError("sequences: the hooks were removed")
        self._result = None
        self._expect_known_parameters()
        refuse_old_backward_hooks(self._model)
        if batch_size is not None:
            layout = Layout.of_padded(batch_size, groups, self._device)
        else:
            assert cu_seqlens is not None
            layout = Layout.of_packed(cu_seqlens, groups, self._device)
        norms, coverage = self._accumulator(len(layout)), self._coverage()
        self._hooks.backward_pass = measured = BackwardPass(self._layers, layout, norms, coverage)
        try:
            yield
            self._result = measured.finish()
        finally:
            self._hooks.backward_pass = None
        self._num_blocks += 1
        squared, variances = self._result
        if variances is not None:
            self.sketch_size = next_num_columns(self.sketch_size, squared, variances, self.relative_error)

    def backward(self, log_prob_sum: Tensor, *, retain_graph: bool = False) -> None:
        """Run a backward pass for the norms alone, within a block: no weight gradient, and nothing in ``.grad``.

        This is for losses that depend on the norms. With ``retain_graph=True`` the training backward pass can follow on
        the same graph. Under DDP, a forward pass for this alone belongs into ``no_sync()``. Reentrant checkpoints do
        not allow it.

        Args:
            log_prob_sum: a scalar.
            retain_graph: keep the graph for another backward pass.

        Raises:
            ValueError: ``log_prob_sum`` is not a scalar, or has no graph.
            RuntimeError: this is called outside of a block.
        """
        if self._hooks.backward_pass is None:
            raise RuntimeError("backward: expected within `with norms.sequences(...)`")
        self._hooks.backward_pass.run_for_norms_alone(log_prob_sum, retain_graph)

    def squared(self, scale: float | Tensor = 1.0) -> Tensor:
        """The squared norms that the last block measured.

        Args:
            scale: the factor of each ``log pi(o_s)`` in the loss: a number, or one per unit.

        Returns:
            ``[S]``, float32 (float64 for a float64 model), without gradient: NaN where ``scale`` is 0, and 0 for
            empty sequences. NaN in one sequence does not affect others.

        Raises:
            RuntimeError: no block has been completed.
            ValueError: ``scale`` has another shape.
        """
        norms, _ = self._finished("squared")
        return norms / _square(scale, norms)

    def standard_error(self, scale: float | Tensor = 1.0) -> Tensor:
        """The estimated standard error of each of the :meth:`squared` norms: 0 where they are exact."""
        norms, variances = self._finished("standard_error")
        if variances is None:
            return torch.zeros_like(norms)
        return variances.sqrt().to(norms.dtype) / _square(scale, norms)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._remove()

    def _accumulator(self, num_units: int) -> NormAccumulator:
        if self.method == "exact":
            return ExactNorms(num_units, self._device)
        if not isinstance(self.sketch_size, int) or self.sketch_size < 2:
            raise ValueError(f"sketch_size: expected an integer of at least 2 columns, got {self.sketch_size!r}")
        seed = (self.seed, self._num_blocks)
        exact = {name for layer in self._layers if not layer.counts_uses for name in layer.names.values()}
        return SketchedNorms(num_units, self._device, self.sketch_size, seed, exact)

    def _coverage(self) -> Coverage:
        gradients = None
        if self._check != "never":
            gradients = GradientCheck(self._confirmed if self._check == "first" else set())
        return Coverage(self._layers, self._hooks.names, gradients)

    def _finished(self, asked: str) -> tuple[Tensor, Tensor | None]:
        if self._result is None:
            hint = "; leave the block first" if self._hooks.backward_pass is not None else ""
            raise RuntimeError(f"{asked}: no block of `with norms.sequences(...)` has been completed{hint}")
        return self._result

    def _expect_known_parameters(self) -> None:
        now = {name for name, p in self._model.named_parameters() if p.requires_grad and self._wanted(name)}
        if new := sorted(now - self._measured):
            raise RuntimeError(
                f"model: {shortened(new)} became trainable after PerSampleGradNorms was made; make it anew, "
                "when the model is wrapped and frozen as it will be trained"
            )


def _remove_all(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _square(scale: float | Tensor, norms: Tensor) -> Tensor:
    """``scale^2``; NaN where it is zero, as the backward pass then knew nothing of the sequence."""
    square = torch.as_tensor(scale, dtype=norms.dtype, device=norms.device).detach().square()
    if square.dim() and square.shape != norms.shape:
        raise ValueError(f"scale: expected a number or one per sequence, {list(norms.shape)}, got {list(square.shape)}")
    return square.masked_fill(square == 0, math.nan)
