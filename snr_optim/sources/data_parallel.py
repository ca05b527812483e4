"""Moments over data-parallel ranks: every rank's every backward pass is a sub-batch, whatever shards or averages it.

Both sources see the local gradients before they are reduced, by the leaf hooks of
:class:`~snr_optim.sources.accumulation.AccumulationSource`, and end with one all-reduce of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snr_optim.sources.accumulation import AccumulationSource, _Batch, _GradState
from snr_optim.sources.norms import Norm, euclidean


class DataParallelSource(AccumulationSource):
    r"""What both kinds share: ``m`` = ranks x backward passes, and one all-reduce of a few numbers per batch.

    The ranks' gradients are averaged: rank ``r`` adds ``h_rk / W`` to the gradient of ``W`` ranks, so that

    .. math::
        \sum_{rk} c_{rk} \|g_{rk}\|^2 = \frac{1}{W^2} \Big(\sum_{rk} n_{rk}\Big) \sum_{rk} \frac{\|h_{rk}\|^2}{n_{rk}}

    Every rank must call :meth:`moments` equally often, with or without data, and all get the same numbers. What is NaN
    on one is NaN on all.
    """

    def _divisor(self) -> float:
        """What the sum of the ranks' gradients is divided by."""
        return float(dist.get_world_size())

    def _replicas(self, gradient: Any) -> int:
        """On how many ranks the same entries of a ``.grad`` lie."""
        raise NotImplementedError

    def _measure(self, arrived: Iterable[int]) -> None:
        # All of them: a parameter that was not used here may have been used on another rank.
        super()._measure(i for i, p in enumerate(self.parameters) if p.grad is not None)

    def _norm_of_grad(self, parameter: Tensor) -> Tensor:
        gradient: Any = parameter.grad
        local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
        norm: Tensor = self._norm(parameter, local)
        return norm / math.sqrt(self._replicas(gradient))

    def _sums(self, batch: _Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        scaled, of_grad, total, num = super()._sums(batch)
        sums = torch.cat([scaled / self._divisor() ** 2, of_grad, scaled.new_tensor([total, num])])
        dist.all_reduce(sums)
        groups = len(of_grad)
        total, num = sums[-2], sums[-1]
        # On a CPU the number can be read for nothing.
        return sums[:groups], sums[groups:-2], total, int(num) if num.device.type == "cpu" else num


class DistributedDataParallelSource(DataParallelSource):
    """Moments of a ``DistributedDataParallel`` model, accumulation inside ``no_sync()`` included.

    Args:
        model: a DDP model, or a module that contains one.
        param_groups: as in :class:`AccumulationSource`, and ``norm``.

    Raises:
        RuntimeError: watched parameters are outside DDP; or its process group does not contain all ranks, as under
            pipeline or tensor parallelism.
    """

    def _watch(self) -> None:
        self._wrappers: list[Any] = [m for m in self.model.modules() if type(m).__name__ == "DistributedDataParallel"]
        for wrapper in self._wrappers:
            _refuse_part_of_the_world(dist.get_world_size(wrapper.process_group))
        reduced = {id(p) for wrapper in self._wrappers for p in wrapper.parameters()}
        if any(id(p) not in reduced for p in self.parameters):
            raise RuntimeError(
                "model: some watched parameters are outside DistributedDataParallel: nobody reduces them"
            )
        super()._watch()

    def _reduced(self, before: list[_GradState], after: list[_GradState]) -> bool:
        return all(wrapper.require_backward_grad_sync for wrapper in self._wrappers)

    def _changed(self, before: list[_GradState], after: list[_GradState]) -> bool:
        if any(wrapper.gradient_as_bucket_view for wrapper in self._wrappers):  # DDP itself may have replaced the views
            return any(was.identity and not now.identity for was, now in zip(before, after, strict=True))
        return super()._changed(before, after)

    def _replicas(self, gradient: Any) -> int:
        return dist.get_world_size()


class FullyShardSource(DataParallelSource):
    """Moments of a model sharded by ``fully_shard`` (FSDP2), with and without deferred gradient sync, HSDP too.

    While a module computes, its parameters are whole: hooks on these see the rank's gradient before it is
    reduce-scattered, in the precision of the computation. The norm of the reduced gradient is summed over shards.

    Args:
        model: sharded already; its forward pass must run through the sharded modules.
        param_groups: as in :class:`AccumulationSource`, and ``norm``.

    Raises:
        RuntimeError: parameters are split over ranks in another way (tensor parallelism), or not sharded at all
            (``ignored_params``); or the mesh does not contain all ranks (pipeline parallelism).
    """

    def _watch(self) -> None:
        for p in self.parameters:
            _refuse_other_shards(p)
        index_of = {id(p): index for index, p in enumerate(self.parameters)}
        self._sharded = [m for m in self.model.modules() if _is_fully_shard(m)]
        self._whole: dict[int, int] = {}  # parameter -> id of the whole one that its hook is on
        found = set()
        for sharded in self._sharded:
            places = [
                (owner, name, index_of[id(p)])
                for owner in sharded.modules()
                for name, p in owner.named_parameters(recurse=False)
                if id(p) in index_of
            ]
            found |= {index for *_, index in places}
            # Runs after fully_shard's own hook, which puts the whole parameters in place.
            self._handles.append(sharded.register_forward_pre_hook(partial(self._watch_whole, places)))
        if len(found) < len(self.parameters):
            raise RuntimeError("model: some watched parameters are in none of its modules sharded by fully_shard")

    def _watch_whole(self, places: list[tuple[nn.Module, str, int]], module: nn.Module, args: Any) -> None:
        for owner, name, index in places:
            whole = owner._parameters[name]
            if whole is None or whole is self.parameters[index] or not whole.requires_grad:
                continue  # still sharded: a module within has its own turn
            if hasattr(whole, "placements"):
                raise RuntimeError(
                    f"model: {name!r} is a DTensor in the forward pass: tensor parallelism is not supported"
                )
            if self._whole.get(index) != id(whole):
                self._whole[index] = id(whole)
                self._watch_parameter(index, whole)

    def _accumulated(self, index: int, before: list[_GradState], after: list[_GradState]) -> bool:
        return True  # it was, if not yet into the shard

    def _reduced(self, before: list[_GradState], after: list[_GradState]) -> bool:
        return before != after

    def _replicas(self, gradient: Any) -> int:
        pairs = zip(gradient.device_mesh.shape, gradient.placements, strict=True)
        return math.prod(size for size, placement in pairs if not placement.is_shard())

    def _divisor(self) -> float:
        divisors = {_divide_factor(module) or super(FullyShardSource, self)._divisor() for module in self._sharded}
        return divisors.pop() if len(divisors) == 1 else math.nan  # modules that differ: not measured


def source_of(
    model: nn.Module, param_groups: Iterable[Iterable[Tensor]] | None = None, *, norm: Norm = euclidean
) -> AccumulationSource:
    """The source that fits how the model is parallelised.

    Raises:
        RuntimeError: it is parallelised in a way that no source measures.
    """
    modules = list(model.modules())
    kinds = {cls.__name__ for module in modules for cls in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise RuntimeError("model: FullyShardedDataParallel (FSDP1) flattens its parameters; use fully_shard (FSDP2)")
    if any(_is_fully_shard(module) for module in modules):
        return FullyShardSource(model, param_groups, norm=norm)
    if "DistributedDataParallel" in kinds:
        return DistributedDataParallelSource(model, param_groups, norm=norm)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"model: {dist.get_world_size()} processes run, but it is neither in DistributedDataParallel nor sharded "
            "by fully_shard. Attach the wrapped model, after wrapping it"
        )
    return AccumulationSource(model, param_groups, norm=norm)


def _is_fully_shard(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def _divide_factor(module: Any) -> float | None:
    """What ``set_gradient_divide_factor`` of a sharded module was given; torch has no public way to ask."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    factors = [getattr(group, "gradient_divide_factor", None) for group in groups]
    return next((float(factor) for factor in factors if factor is not None), None)


def _refuse_other_shards(parameter: Any) -> None:
    if not hasattr(parameter, "placements"):
        raise RuntimeError("model: some watched parameters are not sharded by fully_shard: nobody reduces them")
    if sum(placement.is_shard() for placement in parameter.placements) != 1:
        raise RuntimeError(
            f"model: only fully_shard's shards are supported, not tensor parallelism; got {parameter.placements}"
        )
    _refuse_part_of_the_world(parameter.device_mesh.size())


def _refuse_part_of_the_world(ranks: int) -> None:
    if ranks != dist.get_world_size():
        raise RuntimeError(
            f"model: {ranks} of {dist.get_world_size()} ranks share its gradients. Pipeline, tensor and expert "
            "parallelism are not supported: the ranks would not agree on one factor"
        )
