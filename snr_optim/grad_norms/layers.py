"""The layers of a model: which parameters each of them owns, which of those others own too, and its rule."""

from __future__ import annotations

import inspect
from collections import Counter as Counts
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules import module as _modules

from snr_optim._torch import is_fully_shard
from snr_optim.grad_norms.capture import Observation
from snr_optim.grad_norms.rules import Rule, counts_uses, rule_of


@dataclass(eq=False)
class Layer:
    """A module with parameters of its own that are covered."""

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]  # of its parameters: within the module, and within the model
    shared: set[str]  # those, by their names within the model, that other modules own too
    input_name: str  # of the first argument of its forward
    known: tuple[int, ...] = ()  # parameters whose names were noted
    returned: str | None = None  # what a call returned last that was no tensor
    waiting: WeakSet[Observation] = field(default_factory=WeakSet)  # calls whose gradient has not come yet


def layers_of(model: nn.Module, wanted: Callable[[str], bool], rules: Mapping[type[nn.Module], Rule]) -> list[Layer]:
    names: dict[int, str] = {}  # a parameter's first name
    owners: Counts[str] = Counts()
    for name, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and p.requires_grad:
                full = names.setdefault(id(p), f"{name}.{local}" if name else local)
                owners[full] += 1
    layers, missing = [], []
    for name, module in model.named_modules():
        own = {local: names[id(p)] for local, p in module._parameters.items() if p is not None and id(p) in names}
        own = {local: full for local, full in own.items() if wanted(full)}
        if not own:
            continue
        rule = rule_of(module, rules)
        if rule is None or (counts_uses(rule) and not own.keys() <= {"weight", "bias"}):  # reparametrised
            missing += [f"{full!r} ({_described(name, module)})" for full in own.values()]
        else:
            shared = {full for full in own.values() if owners[full] > 1}
            layers.append(Layer(name, module, rule, own, shared, _input_name(module)))
    if missing:
        raise ValueError(
            f"model: no rule for {some(missing)}. Freeze them, leave them out on purpose by parameters=, "
            "or give a rule: rules={the layer's class: by_autograd} for layers that map one tensor to another, "
            "which experts and routers do not"
        )
    if not names:
        raise ValueError("model: expected at least one parameter with requires_grad")
    if not layers:
        raise ValueError(f"parameters: none is wanted of {some(sorted(set(names.values())))} (tied ones have one name)")
    return layers


def _described(name: str, module: nn.Module) -> str:
    """The class of a module, and what stands in the way of a rule."""
    described = type(module).__name__
    if "forward" in vars(module):
        return f"{described} at {name!r}, whose forward was replaced"
    parameters = inspect.signature(module.forward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return described if len(wanted) < 2 else f"{described}, which takes {' and '.join(wanted)}"


def _input_name(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters), "")


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise a ValueError that names the first parameter that is sharded, but not by ``fully_shard``."""
    sharded = any(map(is_fully_shard, model.modules()))
    for name, parameter in model.named_parameters():
        shards = sum(placement.is_shard() for placement in getattr(parameter, "placements", ()))
        if hasattr(parameter, "placements") and (not sharded or shards > 1):
            raise ValueError(f"model: {name!r} is sharded by tensor parallelism, which is not supported")


def device_of(model: nn.Module, names: set[str]) -> torch.device:
    """The device of these parameters.

    Raises:
        ValueError: there are several.
    """
    devices = {p.device for name, p in model.named_parameters() if name in names}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: expected all parameters on one device, got {found}")
    return devices.pop()


def refuse_old_backward_hooks(model: nn.Module) -> None:
    """Raise a RuntimeError that names the first module with a hook that may change gradients of parameters."""
    if _modules._global_backward_hooks and not _modules._global_is_full_backward_hook:
        raise RuntimeError(
            "model: hooks of register_module_backward_hook may change gradients of parameters; "
            "use register_module_full_backward_hook"
        )
    for name, module in model.named_modules():
        if module._backward_hooks and not module._is_full_backward_hook:
            raise RuntimeError(
                f"model: a hook of register_backward_hook on {name or 'it'!r} may change gradients of parameters; "
                "use register_full_backward_hook"
            )


def refuse_compiled(model: nn.Module) -> None:
    """Raise a ValueError that names the first module that is compiled."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(
                f"model: {name or 'it'} is compiled by torch.compile, which hooks cannot look into; compile it later"
            )


def not_called(layer: Layer) -> str:
    """Why no call of a layer was seen that a gradient came to."""
    if layer.returned is not None:
        return f"{layer.name!r} returns a {layer.returned}, not one tensor"
    return (
        "its weight is used elsewhere, by a functional call, an adapter of parameters or a fused loss, where no hook "
        "sees it; or the forward pass ran before PerSampleGradNorms was made"
    )


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
