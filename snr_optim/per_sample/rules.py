"""A rule per kind of layer: from its input and the gradient of its output to the uses of its parameters.

Layers of torch are known by their code. Others are tried out: a norm or a scaled embedding of any library is taken if a
copy of it, with random weights, has the very gradients that the rule says.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from snr_optim.kernels.norm_embedding_grad_norms_torch import normalised
from snr_optim.per_sample.layout import Layout
from snr_optim.per_sample.uses import BiasUse, MatrixUse, PerUnitUse, ScaleUse, Source, Use

Uses: TypeAlias = dict[str, Use]  # by the name of the parameter within its module


@dataclass(frozen=True)
class Call:
    """One call of a layer, seen from its backward pass."""

    module: nn.Module
    inputs: Tensor
    grad_output: Tensor
    layout: Layout
    trained: Collection[str]  # names of the parameters, within the module, whose uses are wanted


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
        if inputs.dtype.itemsize > gradient.dtype.itemsize:
            inputs = inputs.to(gradient.dtype)  # as autocast did
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
            eps = torch.finfo(torch.promote_types(inputs.dtype, torch.float32)).eps if self.eps is None else self.eps
            uses["weight"] = ScaleUse(inputs, gradient, segments, eps, self.center)
        if "bias" in call.trained:
            uses["bias"] = BiasUse(gradient, segments)
        return uses


def by_autograd(call: Call) -> Uses:
    """For any layer that treats the sequences of a batch one by one: exact, one sequence after another.

    The layer runs again for each unit, and the gradients of all units are in memory at once: for layers with few
    parameters. It must do the same each time: no dropout.

    Raises:
        RuntimeError: units are groups whose sequences are not neighbours.
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
        with torch.enable_grad():
            y = _without_hooks(module, module._parameters | parameters).forward(x)
        found = torch.autograd.grad(y, list(parameters.values()), g, materialize_grads=True, allow_unused=True)
        of_unit.append(found)
    return {name: PerUnitUse(torch.stack(gs)) for name, gs in zip(parameters, zip(*of_unit, strict=True), strict=True)}


# -------------------------------------------------------------------------------------------------- which rule for whom
def rule_of(module: nn.Module, own: Mapping[type[nn.Module], Rule]) -> Rule | None:
    """The rule for a module, by the user's own rules first; None where there is none."""
    for cls, rule in own.items():
        if isinstance(module, cls):
            return rule
    forward = None if "forward" in vars(module) else _code(type(module))
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
        return _scaled_embedding(module)
    return _norm_alike(module)


def _code(cls: type[nn.Module]) -> Any:
    """The function behind ``forward``, also where ``fully_shard`` made a class of its own."""
    return cls.forward


def _without_hooks(module: nn.Module, parameters: Mapping[str, Any]) -> Any:
    """A copy that shares everything but has no hooks, and other parameters."""
    other = copy.copy(module)
    other._parameters = dict(parameters)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(other, name, OrderedDict())
    return other


def _scaled_embedding(module: nn.Embedding) -> Rule | None:
    """Gemma's: the rows times a constant."""
    if module.scale_grad_by_freq:
        return None
    ids = torch.tensor([[0, 2, 1]])
    try:
        with torch.no_grad():
            found = []
            for table in (torch.ones(3, 4), torch.randn(3, 4)):
                weight = nn.Parameter(table.to(module.weight.dtype), requires_grad=False)
                trial = _without_hooks(_on_cpu(module), {"weight": weight})
                trial.padding_idx = None
                found.append((trial.forward(ids), weight[ids]))
    except Exception:  # whatever it is, it is not an embedding that a rule knows
        return None
    scale = float(found[0][0].flatten()[0])
    alike = all(y.shape == x.shape and torch.allclose(y, scale * x, rtol=1e-2) for y, x in found)
    return Embedding(scale) if alike else None


def _norm_alike(module: nn.Module) -> Rule | None:
    """RMSNorm and LayerNorm of other libraries, Gemma's ``1 + w`` too."""
    names = [name for name, p in module._parameters.items() if p is not None]
    weight = module._parameters.get("weight")
    if names not in (["weight"], ["weight", "bias"]) or weight is None or weight.dim() != 1 or any(module.children()):
        return None
    eps = next((getattr(module, name) for name in EPS if isinstance(getattr(module, name, None), float)), None)
    if eps is None:
        return None
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(2, 3, len(weight), dtype=torch.float64, generator=generator) for _ in range(2))
    drawn = {name: nn.Parameter(torch.randn(len(weight), dtype=torch.float64, generator=generator)) for name in names}
    try:
        with torch.enable_grad():
            y = _without_hooks(_on_cpu(module), drawn).forward(0.01 * x)  # small, so that eps counts
            gradients = torch.autograd.grad(y, list(drawn.values()), g.to(y.dtype))
    except Exception:
        return None
    if len(gradients) == 2 and not torch.allclose(gradients[1], g.sum((0, 1))):
        return None
    for center in (False, True):
        for in_float32 in (False, True):
            z = normalised((0.01 * x).to(torch.float32) if in_float32 else 0.01 * x, eps, center)
            if torch.allclose(gradients[0].double(), (g * z).sum((0, 1)), rtol=1e-11, atol=1e-11):
                return Norm(center, eps, in_float32)
        if torch.allclose(
            gradients[0].double(), (g * normalised(0.01 * x, eps, center)).sum((0, 1)), rtol=1e-4, atol=1e-5
        ):
            return Norm(center, eps, in_float32=True)
    return None


EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def _on_cpu(module: nn.Module) -> nn.Module:
    """A copy whose buffers are on the CPU."""
    other = copy.copy(module)
    other._buffers = {name: None if b is None else b.to("cpu") for name, b in module._buffers.items()}
    return other
