"""The learning rates in an optimizer: reading, writing, telling them apart, and whether the optimizer heeds them."""

from __future__ import annotations

import warnings
from collections import defaultdict
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

LR: TypeAlias = float | Tensor


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that does the step, within wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def lrs_of(optimizer: Optimizer) -> list[LR]:
    """The live lr of each parameter group."""
    return [group["lr"] for group in optimizer.param_groups]


def copies_of(lrs: list[LR]) -> list[LR]:
    """Numbers, and tensors that nobody else holds."""
    return [lr.detach().clone() if isinstance(lr, Tensor) else lr for lr in lrs]


def write_lrs(optimizer: Optimizer, lrs: list[LR]) -> None:
    """Put one lr into each parameter group."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(lr))  # never replaced: compiled and captured steps hold it
        else:
            group["lr"] = lr


def separate_lrs(optimizer: Optimizer) -> None:
    """Give every parameter group a tensor of its own, where several share one.

    torch puts the one tensor that it was given into all groups and into ``defaults``: what is written for one group
    would be the lr of all others, and of groups that are added later. The first group keeps its tensor.
    """
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].detach().clone()
        seen.add(id(group["lr"]))
    default = optimizer.defaults.get("lr")
    if isinstance(default, Tensor) and id(default) in seen:
        optimizer.defaults["lr"] = default.detach().clone()


class Mark(NamedTuple):
    """An lr as it was written: the very object, and how often a tensor had been written in place."""

    lr: LR
    version: int

    @classmethod
    def of(cls, lr: LR) -> Mark:
        return cls(lr, lr._version if isinstance(lr, Tensor) else 0)

    def is_on(self, lr: LR) -> bool:
        return lr is self.lr and Mark.of(lr).version == self.version


def expect_lrs(optimizer: Optimizer) -> None:
    """Raise a TypeError that names the first parameter group without a learning rate."""
    for number, group in enumerate(optimizer.param_groups):
        lr = group.get("lr")
        if isinstance(lr, bool) or not isinstance(lr, (int, float, Tensor)):
            raise TypeError(
                f"optimizer: expected a learning rate in every parameter group, group {number} of "
                f"{type(optimizer).__name__} has {lr!r}. An optimizer that chooses its own step sizes leaves none to "
                "scale: give it an lr (for Adafactor: lr=1e-3, relative_step=False)"
            )


def ignores_lr(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps stay the same at another lr, as Rprop's do, which has its step sizes in its state.

    Tried out on another instance, with a parameter of its own. The classes of ``torch.optim`` are known; where an
    optimizer cannot be tried out, or its steps may talk to other processes, the answer is False.
    """
    if isinstance(optimizer, torch.optim.Rprop):
        return True
    known = type(optimizer).__module__.startswith("torch.optim.")
    hookless = not hasattr(optimizer, "_optimizer_step_pre_hooks")  # made in another way than torch does it
    if known or hookless or (dist.is_available() and dist.is_initialized()):
        return False
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return _lengths_of_steps(optimizer, 1.0) == _lengths_of_steps(optimizer, 0.5)
    except Exception:  # whatever went wrong: nothing is known of it
        return False


def _lengths_of_steps(optimizer: Optimizer, scale: float) -> list[float]:
    """Of three steps after a first one: ``scale`` times the lr from the second of them on."""
    parameter = nn.Parameter(torch.linspace(-1.0, 1.0, 16, device="cpu").view(4, 4))
    twin: Any = object.__new__(type(optimizer))
    settings = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    lr = float(settings["lr"]) or 1e-3
    # Nothing else of the optimizer: an inner one that it may hold would step the parameters of the user.
    state = {
        "defaults": dict(optimizer.defaults),
        "state": defaultdict(dict),
        "param_groups": [{**settings, "params": [parameter]}],
    }
    Optimizer.__setstate__(twin, state)
    lengths = []
    for factor in (1.0, 1.0, scale, scale):
        if isinstance(settings["lr"], Tensor):
            twin.param_groups[0]["lr"] = torch.as_tensor(factor * lr, device="cpu")
        else:
            twin.param_groups[0]["lr"] = factor * lr
        before = parameter.detach().clone()
        parameter.grad = torch.linspace(0.5, 1.0, 16, device="cpu").view(4, 4)
        type(optimizer).step(twin)
        lengths.append(float((parameter.detach() - before).norm()))
    if not all(length > 0 for length in lengths):
        raise RuntimeError("nothing moved")
    return lengths
