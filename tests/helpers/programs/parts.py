"""What the library and brute force both run on: small float64 models, optimizers as torch has them, schedules.

The models are built alike on both sides; only the library's has checkpoints, which change no gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    SequentialLR,
)
from torch.utils.checkpoint import checkpoint

from .language import Backward, Setting

CHECKPOINTED = {"checkpointed": False, "reentrant": True}  # use_reentrant

KINDS = {"loss": 1.0, "flat": 0.0, "nan": math.nan, "inf": math.inf}

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, eps=1e-6),
    "adamw": partial(torch.optim.AdamW, amsgrad=True, eps=1e-6),
    "adamax": partial(torch.optim.Adamax, eps=1e-6),
    "adagrad": partial(torch.optim.Adagrad, eps=1e-6),
    "rmsprop": partial(torch.optim.RMSprop, eps=1e-3),
}


class Failure(Exception):
    """What a backward pass raises half-way."""


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise Failure


def same(x: Tensor) -> Tensor:
    return x


class Net(nn.Module):
    """Three layers and a head; with tied weights, a layer used twice, experts, or two parts without a common layer.

    ``wall`` stands before the last layers: what a failing backward pass does not get through.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "parts":
            self.parts = nn.ModuleList(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]) for _ in range(2))
        else:
            self.first = nn.Linear(3, 4)
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            if kind == "shared":
                self.blocks[1] = self.blocks[0]
            if kind == "experts":
                self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, 3)
            if kind == "tied":
                self.head.weight = nn.Parameter(torch.empty(0))  # the weight of the first layer in its place
                del self.head.weight
        self.spare = nn.Linear(3, 3)
        self.double()
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            p.data.copy_(0.7 * torch.randn(p.shape, dtype=torch.float64, generator=generator))

    def forward(
        self,
        x: Tensor,
        route: int = 0,
        spare: bool = False,
        wall: Callable[[Tensor], Tensor] = same,
        plain: bool = True,
    ) -> Tensor:
        if self.kind == "parts":
            used = [0, 1] if route == 2 else [route]
            out = torch.stack([self.parts[i][1](wall(self.parts[i][0](x).tanh())) for i in used]).sum(0)
        else:
            h = self.first(x).tanh()
            use_reentrant = None if plain else CHECKPOINTED.get(self.kind)
            if use_reentrant:
                h = h.requires_grad_()
            for block in self.blocks:
                if use_reentrant is None:
                    h = block(h).tanh()
                else:
                    h = checkpoint(block, h, use_reentrant=use_reentrant).tanh()
            if self.kind == "experts":
                h = h + self.experts[route](h)
            h = wall(h)
            out = h @ self.first.weight + self.head.bias if self.kind == "tied" else self.head(h)
        return out + self.spare(x) if spare else out

    def freezable(self) -> list[nn.Parameter]:
        """The parameters that ``Freeze`` toggles; a gradient always reaches others."""
        return list((self.parts[0][0] if self.kind == "parts" else self.first).parameters())

    def before_the_wall(self) -> set[str]:
        """Names of the parameters whose gradient is not complete when a backward pass fails at the wall."""
        last = ("head.", "spare.") if self.kind != "parts" else ("parts.0.1.", "parts.1.1.", "spare.")
        return {name for name, _ in self.named_parameters() if not name.startswith(last)}


def of_rank(one: Backward, rank: int, setting: Setting) -> Backward:
    """The micro-batch that a process computes: data of its own, and what is not finite on the first one only."""
    if setting.wrapper is None:
        return one
    rows = 1 + (one.rows - 1 + rank) % 4
    return replace(
        one,
        data=one.data + 31 * rank,
        rows=rows,
        size=None if one.size is None else float(rows),
        route=(one.route + rank) % 3 if setting.wrapper.startswith("ddp") else one.route,
        kind="loss" if rank and one.kind in ("nan", "inf") else one.kind,
    )


def loss_of(model: nn.Module, one: Backward, **options: Any) -> Tensor:
    """The mean over the rows; or, where their number is stated, their sum over a number that is the same for all."""
    generator = torch.Generator().manual_seed(one.data)
    x, y = torch.randn(2, one.rows, 3, dtype=torch.float64, generator=generator)
    out = model(x + 1, one.route, one.spare, **options)
    return (out - y - 1).square().sum() / (one.rows if one.size is None else 8) * KINDS[one.kind]


def group_names(model: Net, groups: int) -> list[list[str]]:
    """The parameters of every group, by name; those of the spare layer are in none."""
    names = [name for name, _ in model.named_parameters() if not name.startswith("spare.")]
    cuts = [len(names) * i // groups for i in range(groups + 1)]
    return [names[a:b] for a, b in itertools.pairwise(cuts)]


def base_lr(group: int) -> float:
    return 0.02 * (group + 1)


def base_lrs(setting: Setting) -> list[float]:
    return [base_lr(0 if setting.lr == "shared" else group) for group in range(setting.groups)]


def as_lr(lr: float, kind: str) -> float | Tensor:
    return lr if kind == "float" else torch.tensor(lr, dtype=torch.float64)


def linear(epoch: int) -> float:
    return 1 / (1 + 0.3 * epoch)


def warm_up_then_cosine(optimizer: Optimizer) -> LRScheduler:
    parts = [LinearLR(optimizer, 0.25, total_iters=3), CosineAnnealingLR(optimizer, 8)]
    return SequentialLR(optimizer, parts, milestones=[3])


WARM_UP = 4  # calls of step() until the scheduler behind it is in charge


def warm_up(optimizer: Optimizer) -> LRScheduler:
    return LinearLR(optimizer, start_factor=0.25, total_iters=WARM_UP)


SCHEDULES: dict[str, Callable[[Optimizer], LRScheduler]] = {
    "warm-up": partial(LinearLR, start_factor=0.2, total_iters=4),
    "cosine": partial(CosineAnnealingLR, T_max=9, eta_min=1e-3),
    "lambda": partial(LambdaLR, lr_lambda=linear),
    "exponential": partial(ExponentialLR, gamma=0.8),
    "sequential": warm_up_then_cosine,
}
