"""Norms and embeddings of other libraries, tried out: is a rule true of them?

A copy with random weights is run, and its gradients are compared with what the rule says. So no list of class names is
needed, and a layer that only looks like a norm is not taken for one.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from snr_kernels.norm_embedding_grad_norms._torch import normalised

EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def without_hooks(module: nn.Module, parameters: Mapping[str, Any]) -> Any:
    """A copy that shares everything but has no hooks, and other parameters."""
    other = copy.copy(module)
    other._parameters = dict(parameters)
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(other, name, OrderedDict())
    return other


def scale_of_embedding(module: nn.Embedding) -> float | None:
    """The constant by which a subclass multiplies its rows, as Gemma's; None where it does something else."""
    if module.scale_grad_by_freq:
        return None
    device, dtype = _device(module), module.weight.dtype
    ids = torch.tensor([[0, 2, 1]], device=device)
    found = []
    for table in (torch.ones(3, 4), torch.arange(12.0).view(3, 4).cos()):
        weight = nn.Parameter(table.to(device, dtype), requires_grad=False)
        trial = without_hooks(module, {"weight": weight})
        trial.padding_idx, trial.training = None, True  # so that dropout shows
        try:
            with torch.no_grad():
                found.append((trial.forward(ids), weight[ids]))
        except Exception:  # whatever went wrong: it is no such embedding
            return None
    scale = float(found[0][0].flatten()[0])
    tolerance = 1e-2 if dtype.itemsize < 4 else 1e-6
    alike = all(y.shape == x.shape and torch.allclose(y, scale * x, rtol=tolerance) for y, x in found)
    return scale if alike else None


def kind_of_norm(module: nn.Module) -> tuple[bool, float, bool] | None:
    """Whether it subtracts the mean, its epsilon, and whether it works in float32; None where it is no norm."""
    weight = module._parameters.get("weight")
    names = [name for name, p in module._parameters.items() if p is not None]
    eps = next((getattr(module, name) for name in EPS if isinstance(getattr(module, name, None), float)), None)
    if (
        any(True for _ in module.buffers())
        or names not in (["weight"], ["weight", "bias"])
        or weight is None
        or weight.dim() != 1
        or eps is None
    ):
        return None
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):  # not every kernel has float64
        generator = torch.Generator().manual_seed(0)
        shape = (2, 3, len(weight))
        x, g = (torch.randn(shape, dtype=dtype, generator=generator).to(_device(module)) for _ in range(2))
        x = 0.01 * x  # so small that eps counts
        gradients = _gradients(module, names, x, g)
        if gradients is None or (len(names) == 2 and not torch.allclose(gradients[1], g.sum((0, 1)), rtol=1e-4)):
            continue
        for center in (False, True):
            for inside in (dtype, torch.float32):
                expected = (g * normalised(x.to(inside), eps, center)).sum((0, 1))
                if torch.allclose(gradients[0].to(dtype), expected.to(dtype), rtol=tolerance, atol=tolerance):
                    return center, eps, inside == torch.float32
    return None


def _gradients(module: nn.Module, names: list[str], x: Tensor, g: Tensor) -> tuple[Tensor, ...] | None:
    drawn = {name: nn.Parameter(torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype, device=x.device)) for name in names}
    try:
        with torch.enable_grad():
            trial = without_hooks(module, drawn)
            trial.training = True
            y = trial.forward(x)
            return torch.autograd.grad(y, list(drawn.values()), g.to(y.dtype))
    except Exception:  # whatever went wrong: it is no norm
        return None


def _device(module: nn.Module) -> torch.device:
    device: torch.device = next(module.parameters(recurse=False)).device
    return torch.device("cpu") if device.type == "meta" else device
