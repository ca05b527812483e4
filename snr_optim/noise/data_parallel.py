"""Moments over data-parallel ranks: every rank's every backward pass is a sub-batch, whatever shards or averages it.

Both sources see the local gradients before they are reduced, by the leaf hooks of
:class:`~snr_optim.noise.accumulation.AccumulationSource`, and end with one all-reduce of a few numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from snr_optim.noise.accumulation import AccumulationSource
from snr_optim.noise.norms import Norm, euclidean
from snr_optim.noise.tracking import BackwardPass, Batch, SubBatch


class DataParallelSource(AccumulationSource):
    r"""What both kinds share: ``m`` = ranks x backward passes, and one all-reduce of a few numbers per batch.

    The ranks' gradients are averaged: rank ``r`` adds ``h_rk / W`` to the gradient of ``W`` ranks, so that

    .. math::
        \sum_{rk} c_{rk} \|g_{rk}\|^2 = \frac{1}{W^2} \Big(\sum_{rk} n_{rk}\Big) \sum_{rk} \frac{\|h_{rk}\|^2}{n_{rk}}

    Every rank must call :meth:`moments` equally often, with or without data, and all get the same numbers. What is NaN
    on one is NaN on all; so are moments where ranks with data have unequal numbers of sub-batches whose sizes are not
    stated, and where ranks that should have the same ``.grad`` do not (no reduction, or a comm hook that does not).
    """

    _compares = False
    _replicated: bool  # has every rank the whole .grad, or a shard of it?

    def _divisor(self) -> float:
        """What the sum of the ranks' gradients is divided by."""
        return float(dist.get_world_size())

    def _weight_of_grad(self, measured: bool) -> float:
        """This rank's share in the sum over ranks that ``||.grad||^2`` is divided by."""
        raise NotImplementedError

    def _measure(self, sub_batch: SubBatch, arrived: Iterable[int]) -> None:
        # All of them: a parameter that was not used here may have been used on another rank.
        for i, p in enumerate(self.parameters):
            if p.grad is not None:
                self._batch.of_grad[i] = self._norm_of_grad(p)

    def _norm_of_grad(self, parameter: Tensor) -> Tensor:
        gradient: Any = parameter.grad
        return self._norm(parameter, gradient.to_local() if hasattr(gradient, "to_local") else gradient)

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        scaled, of_grad, total, num = super()._sums(batch)
        own = (total, num, num**2, num > 0, num > 0 and batch.stated, self._weight_of_grad(bool(batch.of_grad)))
        counts = torch.stack([torch.full((), float(one), dtype=scaled.dtype, device=scaled.device) for one in own])
        sums = torch.stack([scaled / self._divisor() ** 2, of_grad, of_grad**2])
        sums = torch.cat([counts, sums.flatten()])
        dist.all_reduce(sums)
        total, num, num_squared, ranks, stated, weight = sums[: len(own)].unbind()
        scaled, of_grad, of_grad_squared = sums[len(own) :].view(3, -1).unbind()
        comparable = (stated == ranks) | ((stated == 0) & (ranks * num_squared == num**2))
        if self._replicated:  # weight * sum x^2 = (sum x)^2 only where all x are the same
            comparable &= (weight * of_grad_squared <= (1 + 1e-6) * of_grad**2).all()
        scaled = torch.where(comparable, scaled, torch.nan)
        if scaled.device.type == "cpu" and not comparable and not batch.fault:  # elsewhere it would wait
            self._warn(
                "the ranks disagree. Unequal numbers of backward passes need `with handle.sub_batch(size=...)` on "
                "every rank; and all must have the same .grad after the last one"
            )
        # On a CPU the number can be read for nothing.
        return scaled, of_grad / weight, total, int(num) if num.device.type == "cpu" else num


class DistributedDataParallelSource(DataParallelSource):
    """Moments of a ``DistributedDataParallel`` model, accumulation inside ``no_sync()`` included.

    Args:
        model: a DDP model, or a module that contains one.
        param_groups: as in :class:`AccumulationSource`, and ``norm``.

    Raises:
        RuntimeError: watched parameters are outside DDP; or its process group does not contain all ranks, as under
            pipeline or tensor parallelism.
    """

    _replicated = True

    def _watch(self) -> None:
        self._wrappers = [m for m in self.model.modules() if isinstance(m, DistributedDataParallel)]
        for wrapper in self._wrappers:
            _refuse_part_of_the_world(dist.get_world_size(wrapper.process_group))
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
        super()._watch()

    def _reduced(self, backward: BackwardPass) -> bool:
        return all(wrapper.require_backward_grad_sync for wrapper in self._wrappers)

    def _changed(self) -> bool:
        if any(wrapper.gradient_as_bucket_view for wrapper in self._wrappers):  # DDP itself may have replaced the views
            return self._gone()
        return super()._changed()

    def _undisturbed(self) -> list[int]:
        # When a first gradient arrives, DDP itself divides the views of parameters that this pass does not use.
        divided = any(
            wrapper.gradient_as_bucket_view and wrapper.require_backward_grad_sync for wrapper in self._wrappers
        )
        return [] if divided else super()._undisturbed()

    def _weight_of_grad(self, measured: bool) -> float:
        return float(measured)  # the same on every rank that saw its backward pass end: their mean

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        if any(wrapper._join_config.enable for wrapper in self._wrappers):
            raise RuntimeError("model: DistributedDataParallel.join() is not supported: ranks would take unequal steps")
        return super()._sums(batch)


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

    _replicated = False

    def _watch(self) -> None:
        for p in self.parameters:
            _refuse_other_shards(p)
        index_of = {id(p): index for index, p in enumerate(self.parameters)}
        self._sharded = [m for m in self.model.modules() if is_fully_shard(m)]
        self._whole: dict[int, Tensor] = {}  # by parameter, the whole one that its hook is on
        for owner in self.model.modules():
            own = {name: index_of[id(p)] for name, p in owner.named_parameters(recurse=False) if id(p) in index_of}
            if own:
                # Runs after fully_shard's own hooks, which put the whole parameters in place.
                self._handles.append(owner.register_forward_pre_hook(partial(self._watch_whole, own)))

    def _watch_whole(self, own: dict[str, int], module: nn.Module, args: Any) -> None:
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
                self._watch_parameter(index, whole)

    def _hooked(self, index: int) -> Tensor:
        return self._whole[index]

    def _reduced(self, backward: BackwardPass) -> bool:
        return not all(state.holds(p) for state, p in zip(backward.states, self.parameters, strict=True))

    def _weight_of_grad(self, measured: bool) -> float:
        mesh, placements = self.parameters[0].device_mesh, self.parameters[0].placements  # type: ignore[attr-defined]
        pairs = zip(mesh.shape, placements, strict=True)
        replicas = float(math.prod(size for size, placement in pairs if not placement.is_shard()))
        return replicas / float(dist.get_world_size())

    def _sums(self, batch: Batch) -> tuple[Tensor, Tensor, float | Tensor, int | Tensor]:
        outside = [norm for index, norm in batch.of_grad.items() if index not in self._whole]
        batch.must_be_zero += outside  # a .grad of zeros may be left of an earlier batch
        if any(norm.device.type == "cpu" and norm != 0 for norm in outside):  # elsewhere it would wait
            batch.fault = "some parameters got gradients outside the forward pass of the module that owns them"
        return super()._sums(batch)

    def _divisor(self) -> float:
        default = super()._divisor()
        divisors = {_divide_factor(module) or default for module in self._sharded}
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
    if any(is_fully_shard(module) for module in modules):
        return FullyShardSource(model, param_groups, norm=norm)
    if any(isinstance(module, DistributedDataParallel) for module in modules):
        return DistributedDataParallelSource(model, param_groups, norm=norm)
    if runs_several_processes():
        raise RuntimeError(
            f"model: {dist.get_world_size()} processes run, but it is neither in DistributedDataParallel nor sharded "
            "by fully_shard. Attach the wrapped model, after wrapping it"
        )
    return AccumulationSource(model, param_groups, norm=norm)


def runs_several_processes() -> bool:
    """Does ``torch.distributed`` run more than this process?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_fully_shard(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this module itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


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
