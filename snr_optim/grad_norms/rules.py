"""A rule tells what a layer adds to the gradients of its parameters, by its input and the gradient of its output.

Layers of torch are known by their code. Normalization layers and embeddings of other libraries are tried out: a copy
with other weights is run, and its gradients are compared with those of the rule. So no list of class names is needed,
and a layer that only looks like a normalization layer is not taken for one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch
from torch import Tensor, nn

from snr_kernels.norm_embedding_grad_norms import normalised
from snr_kernels.precision import exact_dtype, widest_dtype
from snr_optim._torch import leaves_of
from snr_optim.grad_norms.contributions import (
    BiasContribution,
    Contributions,
    InputIdentity,
    MatrixContribution,
    NormalizationScaleContribution,
    PerUnitContribution,
)
from snr_optim.grad_norms.layout import Layout
from snr_optim.grad_norms.replay import replaying, with_parameters, without_hooks

NAMES_OF_EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


@dataclass(frozen=True)
class Call:
    """One call of a layer, as its backward pass sees it.

    Attributes:
        module: the layer.
        inputs: what it was given; ``grad_output`` where :func:`wants_inputs` says that the rule does not look at it.
        grad_output: the gradient of its output.
        layout: cuts activations into the units of the batch.
        trained: names of the parameters, within the module, that get a gradient.
        autocast: the precision of autocast in the forward pass; None outside of it.
    """

    module: nn.Module
    inputs: Tensor
    grad_output: Tensor
    layout: Layout
    trained: Collection[str]
    autocast: torch.dtype | None


Rule: TypeAlias = Callable[[Call], Contributions]


# ----------------------------------------------------------------------------------------------------------- the rules
def linear(call: Call) -> Contributions:
    """``y = x W^T + b``."""
    return _affine(call, transposed=False)


def conv1d(call: Call) -> Contributions:
    """``y = x W + b``, as GPT-2 has it."""
    return _affine(call, transposed=True)


def _affine(call: Call, transposed: bool) -> Contributions:
    gradient, segments = call.layout.cut(call.grad_output)
    contributions: Contributions = {}
    if "weight" in call.trained:
        inputs, _ = call.layout.cut(call.inputs)
        shape, identity = (gradient.shape[1], inputs.shape[1]), InputIdentity(call.inputs)
        contributions["weight"] = MatrixContribution(
            gradient, inputs, segments, shape, transposed, layer_input=identity
        )
    if "bias" in call.trained:
        contributions["bias"] = BiasContribution(gradient, segments)
    return contributions


@dataclass(frozen=True)
class EmbeddingRule:
    """``y_t = scale W[x_t]``."""

    scale: float = 1.0

    def __call__(self, call: Call) -> Contributions:
        gradient, segments = call.layout.cut(call.grad_output)
        if call.inputs.dim() < 2 and not call.layout.packed:
            raise ValueError(
                f"batch_size: ids of shape {list(call.inputs.shape)} could be positions of the whole batch; "
                "expected [batch_size, ...]"
            )
        ids, _ = call.layout.cut_ids(call.inputs)
        if self.scale != 1.0:
            gradient = gradient * self.scale
        module = cast("nn.Embedding", call.module)
        shape = (len(module.weight), gradient.shape[1])
        return {"weight": MatrixContribution(ids, gradient, segments, shape, padding_idx=module.padding_idx)}


@dataclass(frozen=True)
class NormalizationRule:
    """``y = w x^ + b`` or ``(1 + w) x^``, over the last dimension.

    Attributes:
        center: whether the mean is subtracted, as LayerNorm does and RMSNorm does not.
        eps: None is torch's default of RMSNorm.
        in_float32: whether ``x^`` is computed in float32 whatever the input.
    """

    center: bool
    eps: float | None
    in_float32: bool = False

    def __call__(self, call: Call) -> Contributions:
        gradient, segments = call.layout.cut(call.grad_output)
        contributions: Contributions = {}
        if "weight" in call.trained:
            inputs, _ = call.layout.cut(call.inputs)
            inputs = inputs.to(torch.float32) if self.in_float32 else inputs
            eps = torch.finfo(exact_dtype(inputs)).eps if self.eps is None else self.eps
            contributions["weight"] = NormalizationScaleContribution(inputs, gradient, segments, eps, self.center)
        if "bias" in call.trained:
            contributions["bias"] = BiasContribution(gradient, segments)
        return contributions


def by_autograd(call: Call) -> Contributions:
    """For any layer that treats the sequences of a batch one by one: exact, one sequence after another.

    The layer runs again for each unit, and the gradients of all units are in memory at once: this is for layers with
    few parameters of their own. Parameters of layers within it have rules of their own. The layer must do the same each
    time, so it cannot have dropout.

    Raises:
        RuntimeError: units whose sequences are not neighbours; a forward that does not read its parameters off the
            module.
    """
    module, layout = call.module, call.layout
    own = {name: p for name, p in module._parameters.items() if p is not None}
    parameters = {name: own[name].detach().requires_grad_() for name in call.trained}
    inputs, gradient = layout.items_of(call.inputs), layout.items_of(call.grad_output)
    by_unit: list[tuple[Tensor, ...]] = []
    for items in layout.neighbours():
        x, g = inputs[items], gradient[items]
        if layout.packed and call.inputs.shape[0] == 1:
            x, g = x[None], g[None]
        kind, dtype = x.device.type, call.autocast
        with (
            torch.enable_grad(), torch.autocast(kind, dtype, enabled=dtype is not None),
            replaying(), with_parameters(module, parameters),
        ):  # fmt: skip
            y: Tensor = module.forward(x)
        if not by_unit and any(leaf is own[name] for leaf in leaves_of(y) for name in call.trained):
            raise RuntimeError(
                f"by_autograd: the forward of {type(module).__name__} does not read its parameters off the module"
            )
        if not y.requires_grad:
            by_unit.append(tuple(map(torch.zeros_like, parameters.values())))
            continue
        found = torch.autograd.grad(y, list(parameters.values()), g, materialize_grads=True, allow_unused=True)
        by_unit.append(found)
    stacks = map(torch.stack, zip(*by_unit, strict=True))
    return {name: PerUnitContribution(stack) for name, stack in zip(parameters, stacks, strict=True)}


# ----------------------------------------------------------------------------------------------------- what rules want
def casts_inputs(rule: Rule) -> bool:
    """Whether autocast brings the input of such a layer to its own precision."""
    return rule in (linear, conv1d)


def counts_uses(rule: Rule) -> bool:
    """Whether every call of such a layer uses ``weight`` and ``bias`` once each, and nothing else."""
    return rule in (linear, conv1d) or isinstance(rule, EmbeddingRule | NormalizationRule)


def wants_inputs(rule: Rule, trained: Collection[str]) -> bool:
    """Whether a rule looks at the input, which the gradient of a bias alone does not need."""
    return "weight" in trained or not (rule in (linear, conv1d) or isinstance(rule, NormalizationRule))


# -------------------------------------------------------------------------------------------------- which rule for whom
def rule_of(module: nn.Module, own: Mapping[type[nn.Module], Rule]) -> Rule | None:
    """The rule for a module, by the user's own rules first; None where there is none."""
    for cls, rule in own.items():
        if isinstance(module, cls):
            return rule
    forward = None if "forward" in vars(module) else type(module).forward  # also of a class that fully_shard made
    if forward is nn.Linear.forward:
        return linear
    if forward is nn.Embedding.forward:
        return None if module.scale_grad_by_freq else EmbeddingRule()
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return conv1d
    if forward in (nn.LayerNorm.forward, nn.RMSNorm.forward):
        layer = cast("nn.LayerNorm | nn.RMSNorm", module)
        return (
            NormalizationRule(forward is nn.LayerNorm.forward, layer.eps) if len(layer.normalized_shape) == 1 else None
        )
    return _try_embedding(module) if isinstance(module, nn.Embedding) else _try_normalization(module)


def _try_embedding(module: nn.Embedding) -> EmbeddingRule | None:
    """The rule with the constant by which a subclass multiplies its rows, as Gemma's does; or None."""
    if module.scale_grad_by_freq:
        return None
    device, dtype = _device_of(module), module.weight.dtype
    ids = torch.tensor([[0, 2, 1]], device=device)
    found: list[tuple[Tensor, Tensor]] = []
    for table in (torch.ones(3, 4), torch.arange(12.0).view(3, 4).cos()):
        weight = nn.Parameter(table.to(device, dtype), requires_grad=False)
        trial = without_hooks(module, {"weight": weight})
        trial.padding_idx, trial.training = None, True  # so that dropout shows
        try:
            with torch.no_grad():
                found.append((trial.forward(ids), weight[ids]))
        except Exception:  # whatever went wrong, it is not such an embedding
            return None
    scale = float(found[0][0].flatten()[0])
    tolerance = 1e-2 if dtype.itemsize < 4 else 1e-6
    alike = all(y.shape == x.shape and torch.allclose(y, scale * x, rtol=tolerance) for y, x in found)
    return EmbeddingRule(scale) if alike else None


def _try_normalization(module: nn.Module) -> NormalizationRule | None:
    """The rule that gives the gradients of this module, if it is a normalization layer; or None."""
    weight = module._parameters.get("weight")
    names = [name for name, p in module._parameters.items() if p is not None]
    eps = next((value for name in NAMES_OF_EPS if isinstance(value := getattr(module, name, None), float)), None)
    if (
        any(True for _ in module.buffers())
        or names not in (["weight"], ["weight", "bias"])
        or weight is None
        or weight.dim() != 1
        or eps is None
    ):
        return None
    device, shape = _device_of(module), (2, 3, len(weight))
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):  # not every kernel takes float64
        if dtype.itemsize > widest_dtype(device).itemsize:
            continue
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(shape, dtype=dtype, generator=generator).to(device) for _ in range(2))
        x = 0.01 * x  # so small that eps counts
        gradients = _gradients(module, names, x, g)
        if gradients is None or (len(names) == 2 and not torch.allclose(gradients[1], g.sum((0, 1)), rtol=1e-4)):
            continue
        for center in (False, True):
            for inside in (dtype, torch.float32):
                expected = (g * normalised(x.to(inside), eps, center)).sum((0, 1))
                if torch.allclose(gradients[0].to(dtype), expected.to(dtype), rtol=tolerance, atol=tolerance):
                    return NormalizationRule(center, eps, in_float32=inside == torch.float32)
    return None


def _gradients(module: nn.Module, names: list[str], x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
    """The gradients of a module's parameters, on other values of them; None where it cannot be run like that."""
    values = torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype, device=x.device)
    parameters = {name: nn.Parameter(values.clone()) for name in names}
    try:
        with torch.enable_grad():
            trial = without_hooks(module, parameters)
            trial.training = True
            y = trial.forward(x)
            return torch.autograd.grad(y, list(parameters.values()), g.to(y.dtype))
    except Exception:  # whatever went wrong, it is not a normalization layer
        return None


def _device_of(module: nn.Module) -> torch.device:
    device: torch.device = next(module.parameters(recurse=False)).device
    return torch.device("cpu") if device.type == "meta" else device
