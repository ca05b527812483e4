"""A rule per kind of layer: from its input and the gradient of its output to the uses of its parameters.

Layers of torch are known by their code; norms and embeddings of other libraries are tried out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from snr_kernels.dispatch import exact_dtype
from snr_optim._torch import leaves_of
from snr_optim.grad_norms.contributions import BiasUse, MatrixUse, PerUnitUse, ScaleUse, Source, Use
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.probe import kind_of_norm, scale_of_embedding

Uses: TypeAlias = dict[str, Use]  # by the name of the parameter within its module


@dataclass(frozen=True)
class Call:
    """One call of a layer, seen from its backward pass."""

    module: nn.Module
    inputs: Tensor
    grad_output: Tensor
    layout: Layout
    trained: Collection[str]  # names of the parameters, within the module, whose uses are wanted
    autocast: torch.dtype | None  # of the forward pass


Rule: TypeAlias = Callable[[Call], Uses]


# ----------------------------------------------------------------------------------------------------------- the rules
def linear(call: Call) -> Uses:
    """``y = x W^T + b``."""
    return _affine(call, transposed=False)


def conv1d(call: Call) -> Uses:
    """``y = x W + b``, GPT-2's."""
    return _affine(call, transposed=True)


def _affine(call: Call, transposed: bool) -> Uses:
    gradient, segments = call.layout.cut(call.grad_output)
    uses: Uses = {}
    if "weight" in call.trained:
        inputs, _ = call.layout.cut(call.inputs)
        shape = (gradient.shape[1], inputs.shape[1])
        uses["weight"] = MatrixUse(gradient, inputs, segments, shape, transposed, source=Source(call.inputs))
    if "bias" in call.trained:
        uses["bias"] = BiasUse(gradient, segments)
    return uses


@dataclass(frozen=True)
class Embedding:
    """``y_t = scale W[x_t]``."""

    scale: float = 1.0

    def __call__(self, call: Call) -> Uses:
        gradient, segments = call.layout.cut(call.grad_output)
        if call.inputs.dim() < 2 and not call.layout.packed:
            raise ValueError(
                f"batch_size: ids of shape {list(call.inputs.shape)} could be positions of the whole batch; "
                "expected [batch_size, ...]"
            )
        ids, _ = call.layout.cut_ids(call.inputs)
        if self.scale != 1.0:
            gradient = gradient * self.scale
        module: Any = call.module
        shape = (len(module.weight), gradient.shape[1])
        return {"weight": MatrixUse(ids, gradient, segments, shape, padding_idx=module.padding_idx)}


@dataclass(frozen=True)
class Norm:
    """``y = w x^ + b`` or ``(1 + w) x^``, over the last dimension.

    Attributes:
        center: LayerNorm, not RMSNorm.
        eps: None is torch's default of RMSNorm.
        in_float32: whether ``x^`` is computed in float32 whatever the input.
    """

    center: bool
    eps: float | None
    in_float32: bool = False

    def __call__(self, call: Call) -> Uses:
        gradient, segments = call.layout.cut(call.grad_output)
        uses: Uses = {}
        if "weight" in call.trained:
            inputs, _ = call.layout.cut(call.inputs)
            inputs = inputs.to(torch.float32) if self.in_float32 else inputs
            eps = torch.finfo(exact_dtype(inputs)).eps if self.eps is None else self.eps
            uses["weight"] = ScaleUse(inputs, gradient, segments, eps, self.center)
        if "bias" in call.trained:
            uses["bias"] = BiasUse(gradient, segments)
        return uses


def by_autograd(call: Call) -> Uses:
    """For any layer that treats the sequences of a batch one by one: exact, one sequence after another.

    The layer runs again for each unit, and the gradients of all units are in memory at once: for layers with few
    parameters of their own. Those of layers within it have rules of their own. It must do the same each time: no
    dropout.

    Raises:
        RuntimeError: units are groups whose sequences are not neighbours; a forward that has its parameters from
            elsewhere than the module.
    """
    module, layout = call.module, call.layout
    parameters: dict[str, Any] = {
        name: module._parameters[name].detach().requires_grad_()  # type: ignore[union-attr]
        for name in call.trained
    }
    inputs, gradient = layout.items_of(call.inputs), layout.items_of(call.grad_output)
    of_unit: list[tuple[Tensor, ...]] = []
    for items in layout.neighbours():
        x, g = inputs[items], gradient[items]
        if layout.packed and call.inputs.shape[0] == 1:
            x, g = x[None], g[None]
        kind, dtype = x.device.type, call.autocast
        with (
            torch.enable_grad(), torch.autocast(kind, dtype, enabled=dtype is not None),
            replaying(), _with_parameters(module, parameters),
        ):  # fmt: skip
            y = module.forward(x)
        if not of_unit and any(leaf is module._parameters[name] for leaf in leaves_of(y) for name in call.trained):
            raise RuntimeError(
                f"by_autograd: the forward of {type(module).__name__} does not read its parameters off the module"
            )
        if not y.requires_grad:
            of_unit.append(tuple(map(torch.zeros_like, parameters.values())))
            continue
        found = torch.autograd.grad(y, list(parameters.values()), g, materialize_grads=True, allow_unused=True)
        of_unit.append(found)
    return {name: PerUnitUse(torch.stack(gs)) for name, gs in zip(parameters, zip(*of_unit, strict=True), strict=True)}


# ------------------------------------------------------------------------------------------------ layers that run again
_running = threading.local()


@contextmanager
def replaying() -> Iterator[None]:
    """Layers run again, to look into one of them: not to be observed, nor those within it."""
    before, _running.again = is_replaying(), True
    try:
        yield
    finally:
        _running.again = before


def is_replaying() -> bool:
    again: bool = getattr(_running, "again", False)
    return again


@contextmanager
def _with_parameters(module: nn.Module, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Put tensors in place of a module's own parameters, for whoever reads them off it: a replaced forward, too."""
    before = dict(module._parameters)
    module._parameters.update(parameters)
    try:
        yield
    finally:
        module._parameters.update(before)


# -------------------------------------------------------------------------------------------------- which rule for whom
def casts_inputs(rule: Rule) -> bool:
    """Whether autocast brings the input of such a layer to its own precision."""
    return rule in (linear, conv1d)


def counts_uses(rule: Rule) -> bool:
    """Whether every call of such a layer is one use of ``weight`` and ``bias`` each, and there is nothing else."""
    return rule in (linear, conv1d) or isinstance(rule, Embedding | Norm)


def wants_inputs(rule: Rule, trained: Collection[str]) -> bool:
    """Whether a rule looks at the input: not for the gradient of a bias alone."""
    return "weight" in trained or not (rule in (linear, conv1d) or isinstance(rule, Norm))


def rule_of(module: nn.Module, own: Mapping[type[nn.Module], Rule]) -> Rule | None:
    """The rule for a module, by the user's own rules first; None where there is none."""
    for cls, rule in own.items():
        if isinstance(module, cls):
            return rule
    forward = None if "forward" in vars(module) else type(module).forward  # also of a class that fully_shard made
    if forward is nn.Linear.forward:
        return linear
    if forward is nn.Embedding.forward:
        return None if module.scale_grad_by_freq else Embedding()
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return conv1d
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        shape = module.normalized_shape
        center = forward is nn.LayerNorm.forward
        return Norm(center, module.eps) if len(shape) == 1 else None  # type: ignore[arg-type]
    if isinstance(module, nn.Embedding):
        scale = scale_of_embedding(module)
        return None if scale is None else Embedding(scale)
    kind = kind_of_norm(module)
    return None if kind is None else Norm(*kind)
