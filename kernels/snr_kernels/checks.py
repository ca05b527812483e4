"""Checks of arguments that several ops take; each names the argument and what was expected of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def expect_integers(name: str, x: Tensor) -> None:
    """Raise a TypeError unless ``x`` holds integers."""
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {x.dtype}")


def expect_names(argument: str, names: Collection[str], known: Sequence[str]) -> tuple[str, ...]:
    """Some of the ``known`` names, or a ValueError."""
    if isinstance(names, str):
        raise ValueError(f"{argument}: expected a list of names, got the string {names!r}")
    if unknown := set(names) - set(known):
        raise ValueError(f"{argument}: expected some of {list(known)}, got {sorted(unknown)}")
    return tuple(names)  # dynamo of torch 2.6 cannot go on after a graph break with a frozenset at hand
