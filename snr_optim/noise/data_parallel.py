r"""Gradients that several processes share: replicated by ``DistributedDataParallel``, or sharded by ``fully_shard``.

Both see the local gradients before they are reduced, and end with one all-reduce of a few numbers: every backward pass
of every rank is a sub-batch. The ranks' gradients are averaged: rank ``r`` adds ``h_rk / W`` to the gradient of ``W``
ranks, so that

.. math::
    \sum_{rk} c_{rk} \|g_{rk}\|^2 = \frac{1}{W^2} \Big(\sum_{rk} n_{rk}\Big) \sum_{rk} \frac{\|h_{rk}\|^2}{n_{rk}}

Every rank must ask for moments equally often, with or without data, and all get the same numbers. What is NaN on one
is NaN on all; so are moments where ranks with data have unequal numbers of sub-batches whose sizes are not stated, and
where ranks that should have the same ``.grad`` do not (no reduction, or a comm hook that does not).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from snr_optim._torch import is_fully_shard, runs_several_processes
from snr_optim.noise.gradients import GradState, LocalGradients, SubBatchSums

DISAGREE = (
    "the ranks disagree. Unequal numbers of backward passes need `with handle.sub_batch(size=...)` on every rank; and "
    "all must have the same .grad after the last one"
)


def gradients_of(model: nn.Module, parameters: list[Tensor]) -> LocalGradients:
    """Where the gradients of these parameters lie, by how the model is parallelised.

    Raises:
        RuntimeError: it is parallelised in a way that cannot be measured.
    """
    modules = list(model.modules())
    kinds = {cls.__name__ for module in modules for cls in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise RuntimeError("model: FullyShardedDataParallel (FSDP1) flattens its parameters; use fully_shard (FSDP2)")
    if any(is_fully_shard(module) for module in modules):
        return ShardedGradients(model, parameters)
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        return ReplicatedGradients(model, parameters)
    if runs_several_processes():
        raise RuntimeError(
            f"model: {dist.get_world_size()} processes run, but it is neither in DistributedDataParallel nor sharded "
            "by fully_shard. Attach the wrapped model, after wrapping it"
        )
    return LocalGradients(model, parameters)


class DataParallelGradients(LocalGradients):
    """What both kinds share: one sum over the ranks for each batch."""

    grad_is_what_arrived = False  # .grad is that of all ranks
    spans_processes = True
    replicated: bool  # whether every rank has the whole .grad, and not a shard of it

    def divisor(self) -> float:
        """The number by which the sum of the ranks' gradients is divided."""
        return float(dist.get_world_size())

    def weight_of_grad(self, measured: bool) -> float:
        """This rank's share of the number by which the sum of the ranks' ``||.grad||^2`` is divided."""
        raise NotImplementedError

    def to_measure(self, arrived: Iterable[int]) -> Iterable[int]:
        return range(len(self.parameters))  # a parameter that was not used here may have been used on another rank

    def grad_of(self, parameter: Tensor) -> Tensor | None:
        gradient: Any = parameter.grad
        local: Tensor | None = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        return local

    def sum_over_ranks(self, sums: SubBatchSums, *, stated: bool, measured: bool) -> tuple[SubBatchSums, str | None]:
        scaled, of_grad, size, num = sums
        own = (size, num, num**2, num > 0, num > 0 and stated, self.weight_of_grad(measured))
        counts = torch.stack([torch.full((), float(one), dtype=scaled.dtype, device=scaled.device) for one in own])
        vectors = torch.stack([scaled / self.divisor() ** 2, of_grad, of_grad**2])
        of_all = torch.cat([counts, vectors.flatten()])
        dist.all_reduce(of_all)
        size, num, num_squared, ranks, ranks_stated, weight = of_all[: len(own)].unbind()
        scaled, of_grad, of_grad_squared = of_all[len(own) :].view(3, -1).unbind()
        comparable = (ranks_stated == ranks) | ((ranks_stated == 0) & (ranks * num_squared == num**2))
        if self.replicated:  # weight * sum x^2 = (sum x)^2 only where all x are the same
            comparable &= (weight * of_grad_squared <= (1 + 1e-6) * of_grad**2).all()
        scaled = torch.where(comparable, scaled, torch.nan)
        # On a CPU numbers can be read for nothing; elsewhere it would wait.
        on_cpu = scaled.device.type == "cpu"
        total = SubBatchSums(scaled, of_grad / weight, size, int(num) if on_cpu else num)
        return total, DISAGREE if on_cpu and not comparable else None


class ReplicatedGradients(DataParallelGradients):
    """The gradients of a ``DistributedDataParallel`` model, or of a module that contains one; in ``no_sync()`` too.

    Raises:
        RuntimeError: watched parameters are outside DDP; or its process group does not contain all ranks, as under
            pipeline or tensor parallelism.
    """

    replicated = True

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self._wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        super().__init__(model, parameters)

    def expect_supported(self) -> None:
        for wrapper in self._wrappers:
            _expect_all_ranks(dist.get_world_size(wrapper.process_group))
        reduced = {
            id(p)
            for wrapper in self._wrappers
            for name, p in wrapper.module.named_parameters()
            if name not in wrapper.parameters_to_ignore
        }
        if any(id(p) not in reduced for p in self.parameters):
            raise RuntimeError(
                "model: some watched parameters are outside DistributedDataParallel: nobody reduces them"
            )
        super().expect_supported()

    def is_reduced(self, before: list[GradState]) -> bool:
        return all(wrapper.require_backward_grad_sync for wrapper in self._wrappers)

    def changed_since(self, states: list[GradState]) -> bool:
        if any(wrapper.gradient_as_bucket_view for wrapper in self._wrappers):  # DDP itself may have replaced the views
            return self.gone_since(states)
        return super().changed_since(states)

    def undisturbed(self) -> list[int]:
        # When a first gradient arrives, DDP itself divides the views of parameters that this pass does not use.
        divided = any(
            wrapper.gradient_as_bucket_view and wrapper.require_backward_grad_sync for wrapper in self._wrappers
        )
        return [] if divided else super().undisturbed()

    def weight_of_grad(self, measured: bool) -> float:
        return float(measured)  # the same on every rank that saw its backward pass end: their mean

    def check(self, of_grad: dict[int, Tensor]) -> tuple[list[Tensor], str | None]:
        if any(wrapper._join_config.enable for wrapper in self._wrappers):
            raise RuntimeError("model: DistributedDataParallel.join() is not supported: ranks would take unequal steps")
        return super().check(of_grad)


class ShardedGradients(DataParallelGradients):
    """The gradients of a model sharded by ``fully_shard`` (FSDP2), with and without deferred gradient sync, HSDP too.

    While a module computes, its parameters are whole: hooks on these see the rank's gradient before it is
    reduce-scattered, in the precision of the computation. The norm of the reduced gradient is summed over shards. The
    forward pass must run through the sharded modules.

    Raises:
        RuntimeError: parameters are split over ranks in another way (tensor parallelism), or not sharded at all
            (``ignored_params``); or the mesh does not contain all ranks (pipeline parallelism).
    """

    replicated = False

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self._sharded = [m for m in model.modules() if is_fully_shard(m)]
        self._whole: dict[int, Tensor] = {}  # by parameter, the whole one that its hook is on
        super().__init__(model, parameters)

    def expect_supported(self) -> None:
        for p in self.parameters:
            _expect_only_fully_shard(p)

    def watch(self, watch_leaf: Callable[[int, Tensor], None]) -> list[RemovableHandle]:
        index_of = {id(p): index for index, p in enumerate(self.parameters)}
        handles = []
        for owner in self.model.modules():
            own = {name: index_of[id(p)] for name, p in owner.named_parameters(recurse=False) if id(p) in index_of}
            if own:
                # Runs after fully_shard's own hooks, which put the whole parameters in place.
                handles.append(owner.register_forward_pre_hook(partial(self._watch_whole, own, watch_leaf)))
        return handles

    def _watch_whole(
        self, own: dict[str, int], watch_leaf: Callable[[int, Tensor], None], module: nn.Module, args: Any
    ) -> None:
        for name, index in own.items():
            whole = module._parameters[name]
            if whole is None or whole is self.parameters[index] or not whole.requires_grad:
                continue
            if hasattr(whole, "placements"):
                raise RuntimeError(
                    f"model: {name!r} is a DTensor in the forward pass: tensor parallelism is not supported"
                )
            if self._whole.get(index) is not whole:
                self._whole[index] = whole
                watch_leaf(index, whole)

    def leaf(self, index: int) -> Tensor:
        return self._whole[index]

    def is_reduced(self, before: list[GradState]) -> bool:
        return self.changed_since(before)

    def weight_of_grad(self, measured: bool) -> float:
        mesh, placements = self.parameters[0].device_mesh, self.parameters[0].placements  # type: ignore[attr-defined]
        pairs = zip(mesh.shape, placements, strict=True)
        replicas = float(math.prod(size for size, placement in pairs if not placement.is_shard()))
        return replicas / float(dist.get_world_size())

    def check(self, of_grad: dict[int, Tensor]) -> tuple[list[Tensor], str | None]:
        outside = [norm for index, norm in of_grad.items() if index not in self._whole]
        fault = None
        # A .grad of zeros may be left of an earlier batch. Elsewhere than on a CPU it would wait.
        if any(norm.device.type == "cpu" and norm != 0 for norm in outside):
            fault = "some parameters got gradients outside the forward pass of the module that owns them"
        return outside, fault

    def divisor(self) -> float:
        default = super().divisor()
        divisors = {_divide_factor(module) or default for module in self._sharded}
        return divisors.pop() if len(divisors) == 1 else math.nan  # modules that differ: not measured


def _divide_factor(module: Any) -> float | None:
    """What ``set_gradient_divide_factor`` of a sharded module was given; torch has no public way to ask."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if getattr(group, "gradient_divide_factor", None) is not None:
            return float(group.gradient_divide_factor)
        if getattr(group, "reduce_scatter_reduce_op", None) is not None:
            return math.nan  # set in torch 2.6, which does not keep the factor
    return None


def _expect_only_fully_shard(parameter: Any) -> None:
    if not hasattr(parameter, "placements"):
        raise RuntimeError("model: some watched parameters are not sharded by fully_shard: nobody reduces them")
    if sum(placement.is_shard() for placement in parameter.placements) != 1:
        raise RuntimeError(
            f"model: only fully_shard's shards are supported, not tensor parallelism; got {parameter.placements}"
        )
    _expect_all_ranks(parameter.device_mesh.size())


def _expect_all_ranks(ranks: int) -> None:
    if ranks != dist.get_world_size():
        raise RuntimeError(
            f"model: {ranks} of {dist.get_world_size()} ranks share its gradients. Pipeline, tensor and expert "
            "parallelism are not supported: the ranks would not agree on one factor"
        )
