"""The learning rates in an optimizer: reading, writing, telling them apart, and whether the optimizer heeds them."""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

LR: TypeAlias = float | Tensor


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The optimizer that does the step, within wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def lrs_of(optimizer: Optimizer) -> list[LR]:
    """The live lr of each parameter group."""
    return [group["lr"] for group in optimizer.param_groups]


def copies_of(lrs: list[LR]) -> list[LR]:
    """Numbers, and tensors that nobody else holds."""
    copies: list[LR] = copied(lrs)
    return copies


def copied(value: Any) -> Any:
    """A state with tensors that nobody else holds."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(each) for each in value)
    return value


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
    seen = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and _place(group["lr"]) in seen:
            group["lr"] = group["lr"].detach().clone()
        seen.add(_place(group["lr"]))
    default = optimizer.defaults.get("lr")
    if isinstance(default, Tensor) and _place(default) in seen:
        optimizer.defaults["lr"] = default.detach().clone()


def share_lrs(optimizer: Optimizer) -> bool:
    """Whether several parameter groups have one tensor for their lr."""
    places = [_place(group["lr"]) for group in optimizer.param_groups if isinstance(group["lr"], Tensor)]
    return len(set(places)) < len(places)


def _place(lr: LR) -> tuple[int, int] | None:
    """Where a tensor's value lies: views of it are the same lr."""
    return (lr.untyped_storage().data_ptr(), int(lr.storage_offset())) if isinstance(lr, Tensor) else None


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

    Tried out on another instance, with a parameter of its own, and without the hooks of steps. The steps of
    ``torch.optim`` are known; where one cannot be tried out, or may talk to other processes, the answer is False.
    """
    if isinstance(optimizer, torch.optim.Rprop):
        return True
    known = type(optimizer).step.__module__.startswith("torch.optim.")
    hookless = not hasattr(optimizer, "_optimizer_step_pre_hooks")  # made in another way than torch does it
    if known or hookless or (dist.is_available() and dist.is_initialized()):
        return False
    try:
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng(devices=[]), _nothing_compiled():
            warnings.simplefilter("ignore")
            return _lengths_of_steps(optimizer, 1.0) == _lengths_of_steps(optimizer, 1e-3)
    except Exception:  # whatever went wrong: nothing is known of it
        return False


def _nothing_compiled() -> AbstractContextManager[Any]:
    """A step that holds compiled functions runs them as they were written, which takes no time to compile."""
    if "torch._dynamo" not in sys.modules:  # nothing can be compiled, and to import it takes seconds
        return nullcontext()
    context: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return context


def _lengths_of_steps(optimizer: Optimizer, scale: float) -> list[float]:
    """Of three steps after a first one: ``scale`` times the lr from the second of them on."""
    parameter = nn.Parameter(torch.linspace(-1.0, 1.0, 16, device="cpu").view(4, 4))
    twin: Any = object.__new__(type(optimizer))
    step: Any = type(optimizer).step
    step = getattr(step, "__wrapped__", step)  # without the hooks that others have put on the steps of all optimizers
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
        step(twin)
        lengths.append(float((parameter.detach() - before).norm()))
    if not all(length > 0 for length in lengths):
        raise RuntimeError("nothing moved")
    return lengths
