"""Finds the layers of a model: the parameters that each owns, alone or with others, and the rule for it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _modules
from torch.utils.weak import WeakIdKeyDictionary

from snr_optim._torch import is_fully_shard
from snr_optim.grad_norms.capture import ForwardCall
from snr_optim.grad_norms.rules import Rule, casts_inputs, counts_uses, rule_of, wants_inputs


@dataclass(eq=False)
class Layer:
    """A module that has measured parameters of its own.

    Attributes:
        name: its name within the model.
        module: the module.
        rule: how its parameters get their gradients.
        names: names of its measured parameters within the model, by their names within the module.
        shared: parameters, by their names within the model, that other modules own too.
        input_name: the name of the first argument of its forward.
        returned: the type that its last call returned, if that was not a tensor.
        waiting: its calls whose gradient has not come yet.
    """

    name: str
    module: nn.Module
    rule: Rule
    names: dict[str, str]
    shared: set[str]
    input_name: str
    returned: str | None = None
    waiting: WeakSet[ForwardCall] = field(default_factory=WeakSet)

    @property
    def counts_uses(self) -> bool:
        """Whether each call uses each parameter once, so that uses in the graph can be counted against calls."""
        return counts_uses(self.rule)

    @property
    def casts_inputs(self) -> bool:
        """Whether autocast brings its input to its own precision."""
        return casts_inputs(self.rule)

    def wants_inputs(self, trained: Collection[str]) -> bool:
        """Whether its rule looks at the input, for these of its parameters."""
        return wants_inputs(self.rule, trained)


class ParameterNames:
    """The names of measured parameters; also of the tensors that ``fully_shard`` puts in place of its shards."""

    def __init__(self) -> None:
        self._names = WeakIdKeyDictionary()

    def note(self, parameter: Tensor, name: str) -> None:
        """A tensor is the measured parameter of this name."""
        self._names[parameter] = name

    def of(self, tensor: Tensor) -> str | None:
        """The name of a measured parameter within the model; None for other tensors."""
        name: str | None = self._names.get(tensor)  # type: ignore[no-untyped-call]
        return name


def layers_of(model: nn.Module, wanted: Callable[[str], bool], rules: Mapping[type[nn.Module], Rule]) -> list[Layer]:
    """The layers that own the trainable parameters of a model.

    Args:
        model: the model.
        wanted: whether a parameter is to be measured, by its name.
        rules: the user's own rules, by class.

    Raises:
        ValueError: a wanted parameter has no rule, or there is no such parameter.
    """
    names: dict[int, str] = {}  # the first name of each parameter
    num_owners: Counter[str] = Counter()
    for name, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None and p.requires_grad:
                full = names.setdefault(id(p), f"{name}.{local}" if name else local)
                num_owners[full] += 1
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
            shared = {full for full in own.values() if num_owners[full] > 1}
            layers.append(Layer(name, module, rule, own, shared, _input_name(module)))
    if missing:
        raise ValueError(
            f"model: no rule for {shortened(missing)}. Freeze them, leave them out on purpose by parameters=, "
            "or give a rule: rules={the layer's class: by_autograd} for layers that map one tensor to another, "
            "which experts and routers do not"
        )
    if not names:
        raise ValueError("model: expected at least one parameter with requires_grad")
    if not layers:
        found = shortened(sorted(set(names.values())))
        raise ValueError(f"parameters: none is wanted of {found} (tied ones have one name)")
    return layers


def _described(name: str, module: nn.Module) -> str:
    """The class of a module, and why it has no rule if that can be told."""
    described = type(module).__name__
    if "forward" in vars(module):
        return f"{described} at {name!r}, whose forward was replaced"
    parameters = inspect.signature(module.forward).parameters.values()
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return described if len(wanted) < 2 else f"{described}, which takes {' and '.join(wanted)}"


def _input_name(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters), "")


def common_device(model: nn.Module, names: set[str]) -> torch.device:
    """The device of the parameters with these names.

    Raises:
        ValueError: they are on several.
    """
    devices = {p.device for name, p in model.named_parameters() if name in names}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"model: expected all parameters on one device, got {found}")
    return devices.pop()


def why_not_reported(layers: list[Layer], name: str) -> str:
    """Why none of the layers that own a parameter has reported a use of it."""
    for layer in layers:
        if name in layer.names.values() and layer.returned is not None:
            return f"{layer.name!r} returns a {layer.returned}, not one tensor"
    return (
        "its weight is used elsewhere, by a functional call, an adapter of parameters or a fused loss, where no hook "
        "sees it; or the forward pass ran before PerSampleGradNorms was made"
    )


def shortened(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# -------------------------------------------------------------------------------------------- models that are refused
def refuse_tensor_parallel(model: nn.Module) -> None:
    """Raise a ValueError that names the first parameter that is sharded otherwise than by ``fully_shard``."""
    fully_sharded = any(map(is_fully_shard, model.modules()))
    for name, parameter in model.named_parameters():
        shards = sum(placement.is_shard() for placement in getattr(parameter, "placements", ()))
        if hasattr(parameter, "placements") and (not fully_sharded or shards > 1):
            raise ValueError(f"model: {name!r} is sharded by tensor parallelism, which is not supported")


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
