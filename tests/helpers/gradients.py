"""Small models, and the gradients of their sub-batches one by one: what moments are compared with."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def tied_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 7, bias=False))
    model[4].weight = model[0].weight
    model[2].bias.requires_grad_(False)
    return model.double()


def explicit_gradients(model, losses):
    """One list of gradients per loss, from backward passes of their own."""
    gradients = []
    for loss in losses:
        model.zero_grad()
        loss().backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    model.zero_grad()
    return gradients


def is_invalid(moments):
    return moments.num_sub_batches > 1 and math.isnan(moments.mean_of_sq_norms)


class OutOfMemory(torch.autograd.Function):
    """Its backward pass fails half-way."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise MemoryError


class Blocks(nn.Module):
    """Three blocks, checkpointed one by one; the head outside of them trainable or not."""

    def __init__(self, use_reentrant, frozen=()):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4, 1)
        self.use_reentrant = use_reentrant
        self.double()
        for name in frozen:
            getattr(self, name).requires_grad_(False)

    def forward(self, x):
        x = self.first(x).requires_grad_()
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)
