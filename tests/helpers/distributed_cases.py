"""What each rank of a distributed test runs: ``torchrun ... distributed_cases.py CASE``; a failed assertion ends it.

Rank ``r``, micro-batch ``k`` has the gradient ``g_rk`` that one process computes in float64 from the same data.
"""

from __future__ import annotations

import copy
import sys
import warnings
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import leave_together
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from snr_kernels.lm_head import head_grad_norms, linear_logprob_stats
from snr_optim import GradientMoments, GradWeightedBaseline, PerSampleGradNorms, SNRAdaptiveLR, model_logprob_stats

MICRO_BATCHES = 3
REL = 1e-6  # what is asked for; float64 gives 1e-14


class Model(nn.Module):
    def __init__(self, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(2))
        self.spare = nn.Linear(7, 3)  # used by odd micro-batches only
        self.use_reentrant = use_reentrant
        self.double()

    def forward(self, x, spare=False):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return (self.spare if spare else self.head)(x)


def data(rank, step, k):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + k)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator) + 1


def loss_of(model, rank, step, k, spare=False):
    return model(data(rank, step, k), spare=spare and (rank + k) % 2 == 1).square().mean()


def expected(weights, step, micro_batches=MICRO_BATCHES, shares=None, spare=False):
    """By one process, over all ranks and micro-batches."""
    model, gradients = Model(), []
    model.load_state_dict(weights, strict=False)
    for rank in range(dist.get_world_size()):
        for k in range(micro_batches):
            model.zero_grad()
            loss_of(model, rank, step, k, spare).backward()
            gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return GradientMoments.from_gradients(gradients, shares)


def whole(model):
    """The full weights, whatever shards them."""
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights.items()}


def assert_same_everywhere(scheduler):
    mine = torch.tensor([scheduler.factor, float(scheduler.get_last_lr()[0])], dtype=torch.float64)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    assert all(torch.equal(other, mine) for other in all_of_them)  # to the last bit


def train(model, *, deferred, micro_batches=MICRO_BATCHES, scale=1.0, spare=False, kind=torch.optim.SGD, steps=3):
    """Three steps; before each, the moments of one process are computed from the weights of that moment."""
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.5)
    handle = scheduler.attach(model)
    for step in range(steps):
        reference = expected(copy.deepcopy(whole(model)), step, micro_batches, spare=spare)
        for k in range(micro_batches):
            sync = not deferred or k == micro_batches - 1
            if isinstance(model, DistributedDataParallel):
                model.require_backward_grad_sync = sync  # what no_sync() sets, for forward and backward
            else:
                model.set_requires_gradient_sync(sync)
            (scale * loss_of(model, dist.get_rank(), step, k, spare) / micro_batches).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        moments = handle.moments
        assert moments.num_sub_batches == micro_batches * dist.get_world_size()
        assert float(moments.sq_norm_of_mean) == pytest.approx(reference.sq_norm_of_mean, rel=REL)
        assert float(moments.mean_of_sq_norms) == pytest.approx(reference.mean_of_sq_norms, rel=REL)
        assert_same_everywhere(scheduler)
    assert scheduler.metrics()["observations"] == steps
    weights = [0.5**age for age in range(steps)]
    effective = sum(weights) ** 2 / sum(w**2 for w in weights)
    freedom = effective * (micro_batches * dist.get_world_size() - 1)
    assert scheduler.metrics()["degrees_of_freedom"] == pytest.approx(freedom)
    return scheduler


def sharded(model=None, **options):
    from torch.distributed.fsdp import fully_shard

    model = model or Model()
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def ddp():
    for deferred in (False, True):
        for as_view in (False, True):
            train(DistributedDataParallel(Model(), gradient_as_bucket_view=as_view, find_unused_parameters=True),
                  deferred=deferred)  # fmt: skip
    train(DistributedDataParallel(Model(), find_unused_parameters=True), deferred=False, micro_batches=1)
    train(DistributedDataParallel(Model(), find_unused_parameters=True), deferred=False, spare=True)


def ddp_checkpointed():
    for use_reentrant in (False, True):
        model = Model(use_reentrant)
        del model.spare  # DDP allows no unused parameters with reentrant checkpoints
        model.spare = None
        train(DistributedDataParallel(model), deferred=True)


def ddp_parameters_of_others():
    """A parameter of nobody's optimizer has the first gradient, and a watched one is not used: DDP divides its view."""
    for as_view in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("first", "sometimes", "others")}).double()
        model.forward = lambda x, k, layers=model: layers["first"](x) + layers["sometimes" if k == 0 else "others"](x)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=as_view)
        ours = [*model["first"].parameters(), *model["sometimes"].parameters()]
        optimizer = torch.optim.SGD(ours, lr=0.1)
        scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
        handle, gradients = scheduler.attach(wrapped), []
        for k in range(2):
            mine = None
            for rank in range(dist.get_world_size()):
                x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * rank + k))
                found = torch.autograd.grad(model(x, k).square().mean(), ours, allow_unused=True)
                gradients.append([None if g is None else g.clone() for g in found])
                mine = x if rank == dist.get_rank() else mine
            wrapped(mine, k).square().mean().backward()
        optimizer.step()
        reference = GradientMoments.from_gradients(gradients)
        assert float(handle.moments.batch_snr) == pytest.approx(reference.batch_snr, rel=REL)
        assert scheduler.metrics()["observations"] == 1


def foreign_hooks():
    """Hooks that others register after ``attach()``: what they leave counts on every rank, or nothing does on any."""
    model = DistributedDataParallel(Model(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    handle = scheduler.attach(model)
    weight = model.module.head.weight
    bound = 1e-2

    def step(number):
        for k in range(MICRO_BATCHES):
            model.require_backward_grad_sync = k == MICRO_BATCHES - 1
            (loss_of(model, dist.get_rank(), number, k) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    weight.register_hook(lambda gradient: gradient.clamp(-bound, bound))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a first batch may not count
        step(1)
    twin, gradients = Model(), []
    twin.load_state_dict(whole(model))
    for rank in range(dist.get_world_size()):
        for k in range(MICRO_BATCHES):
            twin.zero_grad()
            loss_of(twin, rank, 2, k).backward()
            clipped = twin.head.weight.grad.clamp(-bound * MICRO_BATCHES, bound * MICRO_BATCHES)
            assert not torch.equal(clipped, twin.head.weight.grad)
            twin.head.weight.grad = clipped
            gradients.append([None if p.grad is None else p.grad.clone() for p in twin.parameters()])
    reference = GradientMoments.from_gradients(gradients)
    step(2)
    assert float(handle.moments.sq_norm_of_mean) == pytest.approx(reference.sq_norm_of_mean, rel=REL)
    assert float(handle.moments.mean_of_sq_norms) == pytest.approx(reference.mean_of_sq_norms, rel=REL)
    assert_same_everywhere(scheduler)
    if dist.get_rank() == 0:  # on one rank alone
        weight.register_post_accumulate_grad_hook(lambda p: nn.utils.clip_grad_value_(p, bound / 10))
    invalid = scheduler.metrics()["skipped_invalid"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(3)
    assert scheduler.metrics()["skipped_invalid"] == invalid + 1
    assert_same_everywhere(scheduler)


def ddp_comm_hook():
    """Trap 22: DDP has one slot for a comm hook, and it is still the user's."""
    model = DistributedDataParallel(Model(), find_unused_parameters=True)
    scheduler = SNRAdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler.attach(model)
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    model.register_comm_hook(None, allreduce_hook)
    loss_of(model, dist.get_rank(), 0, 0).backward()
    scheduler.optimizer.step()
    assert scheduler.metrics()["observations"] == 1


def fsdp():
    for deferred in (False, True):
        train(sharded(), deferred=deferred)
    train(sharded(), deferred=False, micro_batches=1, kind=torch.optim.AdamW)
    train(sharded(Model(use_reentrant=False)), deferred=True)  # checkpointed
    frozen = Model()
    frozen.first.requires_grad_(False)
    model = sharded(frozen)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer)
    scheduler.attach(model)
    loss_of(model, dist.get_rank(), 0, 0).backward()
    optimizer.step()
    assert scheduler.metrics()["observations"] == 1


def fsdp_divide_factor():
    """A loss that is normalised over all ranks by the user: fully_shard must sum, and is asked what it divides by."""
    model = sharded()
    if not hasattr(model, "set_gradient_divide_factor"):
        return
    for module in (model, *model.blocks):
        module.set_gradient_divide_factor(1.0)
    train(model, deferred=True, scale=1 / dist.get_world_size())


def hsdp():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    for deferred in (False, True):
        train(sharded(mesh=mesh), deferred=deferred)


def unequal():
    """Ranks with unequal numbers of unequal micro-batches, one of them NaN on one rank, one step without data."""
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(Model(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    handle = scheduler.attach(model)
    sizes = [[1.0 + r + k for k in range(1 + r % 2)] for r in range(world)]
    total, twin, gradients = sum(map(sum, sizes)), Model(), []
    for r in range(world):
        for k in range(len(sizes[r])):
            twin.zero_grad()
            loss_of(twin, r, 0, k).backward()
            gradients.append([p.grad for p in twin.parameters()])
            twin.zero_grad(set_to_none=True)
    reference = GradientMoments.from_gradients(gradients, [size for of_rank in sizes for size in of_rank])
    for k, size in enumerate(sizes[rank]):
        model.require_backward_grad_sync = k == len(sizes[rank]) - 1
        with handle.sub_batch(size):
            (loss_of(model, rank, 0, k) * size * world / total).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert handle.moments.num_sub_batches == sum(map(len, sizes))
    assert float(handle.moments.sq_norm_of_mean) == pytest.approx(reference.sq_norm_of_mean, rel=REL)
    assert float(handle.moments.mean_of_sq_norms) == pytest.approx(reference.mean_of_sq_norms, rel=REL)
    factor = scheduler.factor
    model.require_backward_grad_sync = False
    (loss_of(model, rank, 0, 0) * (float("nan") if rank == 1 else 1.0)).backward()
    model.zero_grad()  # a NaN on one rank, and no step
    model.require_backward_grad_sync = True
    (loss_of(model, rank, 0, 0) * (float("nan") if rank == 1 else 1.0)).backward()
    for p in model.parameters():
        p.grad = None  # so that the weights survive
    optimizer.step()
    optimizer.step()  # nothing to measure on any rank
    metrics = scheduler.metrics()
    assert scheduler.factor == factor
    assert (metrics["skipped_invalid"], metrics["skipped_single"], metrics["skipped_unstepped"]) == (1, 1, 1)
    assert_same_everywhere(scheduler)


def inconsistent():
    """Ranks that do not agree on what was measured: NaN on all of them, and counted."""
    rank = dist.get_rank()

    def step(model, micro_batches, stated=False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scheduler = SNRAdaptiveLR(optimizer)
        handle = scheduler.attach(model)
        for k in range(micro_batches):
            model.require_backward_grad_sync = k == micro_batches - 1
            with handle.sub_batch(1.0) if stated else nullcontext():
                loss_of(model, rank, 0, k).backward()
        optimizer.step()
        assert_same_everywhere(scheduler)
        return scheduler.metrics()["skipped_invalid"]

    def ddp_model():
        return DistributedDataParallel(Model(), find_unused_parameters=True)

    assert step(ddp_model(), micro_batches=2) == 0
    assert step(ddp_model(), micro_batches=1 + rank) == 1
    assert step(ddp_model(), micro_batches=2, stated=rank == 0) == 1
    unreduced = ddp_model()
    unreduced.register_comm_hook(None, no_reduction)
    assert step(unreduced, micro_batches=2) == 1

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = ddp_model()  # one rank's backward pass comes before its closure, another's in it
    optimizer = Twice(model.parameters(), lr=0.0)
    scheduler = SNRAdaptiveLR(optimizer)
    scheduler.attach(model)
    loss = loss_of(model, rank, 0, 0)
    if rank == 0:
        loss.backward()
    optimizer.step((lambda: loss) if rank == 0 else loss.backward)
    assert scheduler.metrics()["observations"] == 1

    def joined():
        with model.join():
            loss_of(model, rank, 0, 0).backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="join"):
        joined()


def no_reduction(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def refused():
    """What cannot be measured says so on every rank, before anything can hang."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def refuses(model, match, error=RuntimeError, **options):
        scheduler = SNRAdaptiveLR(torch.optim.AdamW(model.parameters(), lr=0.1), **options)
        with pytest.raises(error, match=match):
            scheduler.attach(model)

    world = dist.get_world_size()
    refuses(Model(), f"{world} processes")
    refuses(sharded(), "euclidean", NotImplementedError, norm="adam")
    mesh = init_device_mesh("cpu", (world,))
    refuses(parallelize_module(Model(), mesh, {"first": ColwiseParallel()}), "processes|sharded")
    half = dist.new_group([0])
    if dist.get_rank() == 0:
        refuses(DistributedDataParallel(Model(), process_group=half), f"1 of {world} ranks")


def baseline():
    """Groups split over ranks of unequal shares give what one process gives, and all ranks learn the same."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cuts = [0, 5, *(5 + 11 * (r + 1) for r in range(world - 2)), 40] if world > 1 else [0, 40]
    mine = slice(cuts[rank], cuts[rank + 1])
    for scope in ("group", "batch", "shrink"):
        ours = GradWeightedBaseline(scope, process_group=dist.group.WORLD)
        alone = GradWeightedBaseline(scope)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            rewards, weights = torch.rand(2, 40, dtype=torch.float64, generator=generator)
            rewards[7] = torch.nan
            ids = torch.randint(0, 9, (40,), generator=generator)
            whole, part = {"groups": ids}, {"groups": ids[mine]}
            if scope == "shrink":
                whole, part = {"prompts": ids + step}, {"prompts": ids[mine] + step}
            got = ours.advantages(rewards[mine], weights[mine], **part, update=True)
            expected = alone.advantages(rewards, weights, **whole, update=True)
            assert torch.allclose(got, expected[mine], rtol=REL, atol=1e-12)
        states = [None] * world
        dist.all_gather_object(states, ours.get_extra_state())
        for state in states:
            assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    # sizes stay with their rank; tokens; a rank without outputs
    tokens = torch.arange(24.0).view(8, 3) * (1 + rank)
    everywhere = torch.cat([torch.arange(24.0).view(8, 3) * (1 + r) for r in range(world)])
    ours = GradWeightedBaseline("batch", process_group=dist.group.WORLD)
    expected = GradWeightedBaseline("batch")(everywhere, groups=4)[8 * rank : 8 * rank + 8]
    assert torch.allclose(ours(tokens, groups=4), expected)
    some, ids = slice(0, 8 if rank else 0), torch.arange(8) // 4 + 2 * rank
    expected = GradWeightedBaseline("batch")(everywhere[8:], groups=4)[8 * max(rank - 1, 0) :][some]
    assert torch.allclose(ours(tokens[some], groups=ids[some]), expected)


def baseline_refused():
    """What one rank gets wrong is an error on all of them, at once."""
    rank = dist.get_rank()
    ours = GradWeightedBaseline("shrink", process_group=dist.group.WORLD)
    bad = torch.tensor([1.0, torch.inf if rank == 0 else 0.0])
    with pytest.raises(ValueError, match="rewards" if rank == 0 else "rank 0"):
        ours(bad, groups=2)
    with pytest.raises(ValueError, match="agree"):
        ours(torch.ones(2), groups=2 if rank == 0 else torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="agree"):
        ours(torch.ones(2, 3 + rank), groups=2)
    with pytest.raises(ValueError, match="prompts"):
        ours(torch.ones(2), groups=torch.zeros(2, dtype=torch.long), prompts=torch.full((2,), rank))


def per_sample_ddp():
    per_sample(DistributedDataParallel(Model(), find_unused_parameters=True))


def per_sample_fsdp():
    per_sample(sharded())


def per_sample(model):
    """Each rank gets the norms of its own sequences, over several steps, from training and from norms-only passes."""
    norms = PerSampleGradNorms(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        alone = Model()
        alone.load_state_dict(whole(model), strict=False)
        x = data(dist.get_rank(), step, 0)
        true = []
        for sample in x.split(1):
            found = torch.autograd.grad(alone(sample).square().sum(), list(alone.parameters()), allow_unused=True)
            true.append(sum(g.square().sum() for g in found if g is not None))
        if step == 1:
            with model.no_sync() if hasattr(model, "no_sync") else nullcontext():
                loss = model(x).square().sum()
            with norms.sequences(batch_size=len(x)):
                norms.backward(loss)
            assert norms.squared() == pytest.approx(torch.stack(true), rel=REL)
        if step == 2:  # one forward pass for both
            loss = model(x).square().sum()
            with norms.sequences(batch_size=len(x)):
                norms.backward(loss, retain_graph=True)
            assert norms.squared() == pytest.approx(torch.stack(true), rel=REL)
            with norms.sequences(batch_size=len(x)):
                loss.backward()
            assert norms.squared() == pytest.approx(torch.stack(true), rel=REL)
            optimizer.zero_grad()
        with norms.sequences(batch_size=len(x)):
            model(x).square().sum().backward()
        assert norms.squared() == pytest.approx(torch.stack(true), rel=REL)
        optimizer.step()
        optimizer.zero_grad()


def vocabulary_parallel():
    """Slices of the vocabulary on the ranks, equal or not, give the statistics, gradients and norms of the whole."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(1200, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    bias = torch.randn(1200, dtype=torch.float64, generator=generator, requires_grad=True)
    factors = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    labels = torch.randint(1200, (9,), generator=generator)
    labels[1], labels[2] = -100, 1199
    cu_seqlens = torch.tensor([0, 4, 4, 9])
    true = linear_logprob_stats(hidden, weight, labels, 0.7, bias, softcap=9.0)
    expected = torch.autograd.grad(
        sum((f * x).sum() for f, x in zip(factors, true, strict=True)), (hidden, weight, bias)
    )
    norms = head_grad_norms(hidden, weight, labels, cu_seqlens, 0.7, bias, softcap=9.0)
    for cut in (None, 1, 1030):
        edges = [1200 * r // world for r in range(world + 1)] if cut is None else [0, cut, 1200]
        mine = slice(edges[rank], edges[rank + 1])
        for slab_bytes in (1, 9 * 8 * 2 * 64, 1 << 20):
            leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight[mine], bias[mine])]
            part = {"process_group": group, "first_label": None if cut is None else mine.start, "softcap": 9.0}
            got = linear_logprob_stats(*leaves[:2], labels, 0.7, leaves[2], slab_bytes=slab_bytes, **part)
            for a, b in zip(got, true, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
            found = torch.autograd.grad(sum((f * x).sum() for f, x in zip(factors, got, strict=True)), leaves)
            for a, b in zip(found, (expected[0], expected[1][mine], expected[2][mine]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
        of_part = head_grad_norms(*leaves[:2], labels, cu_seqlens, 0.7, leaves[2], **part)
        for a, b in zip(of_part, norms, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    # Slices that overlap, and a gap: not one vocabulary, and no answer
    shard = weight[600 * rank : 600 * rank + 600]
    for first_label in (0, 700 * rank, 600 * rank + 1):
        got = linear_logprob_stats(hidden, shard, labels, process_group=group, first_label=first_label)
        assert got.log_prob[labels != -100].isnan().all()


def causal_lm():
    """Wrapped models, their heads replaced for a call, train like the model itself on all ranks' batches."""
    from language_models import VOCABULARY, language_model
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    batches = torch.randint(VOCABULARY, (3, world, 2, 6), generator=torch.Generator().manual_seed(0))

    def steps(model, ids):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for of_step in ids:
            stats = model_logprob_stats(model, of_step, of_step, slab_bytes=1 << 10)
            (-stats.log_prob - 0.1 * stats.entropy).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return whole(model)

    def shard(model, blocks=True, head=False):
        for part in [*(model.model.layers if blocks else []), *([model.lm_head] if head else []), model]:
            fully_shard(part)
        return model

    for name in ("qwen3", "qwen3-untied", "gemma2"):
        expected = steps(language_model(name).double(), batches.flatten(1, 2))
        wrapped = [
            DistributedDataParallel(language_model(name).double(), find_unused_parameters=find)
            for find in (False, True)
        ]
        wrapped += [shard(language_model(name).double()), shard(language_model(name).double(), blocks=False)]
        if name == "qwen3-untied":
            wrapped.append(shard(language_model(name).double(), head=True))
        for model in wrapped:
            for key, value in steps(model, batches[:, rank]).items():
                torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-9)


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    globals()[sys.argv[1]]()
    leave_together()
