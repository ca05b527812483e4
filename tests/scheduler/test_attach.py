"""attach(model) in the loops that people have: the factor is always that of the raw gradients of the batch."""

from __future__ import annotations

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
from gradients import Blocks, explicit_gradients, is_invalid, tied_model
from torch import nn

from snr_optim import GradientMoments, SNRAdaptiveLR

MICRO_BATCHES = [torch.randint(7, (2, 4), generator=torch.Generator().manual_seed(k)) for k in range(4)]
SGD = dict(lr=1.0)


def loss_of(model, tokens):
    return model(tokens).square().mean()


def expected_moments(model, micro_batches=MICRO_BATCHES):
    """Of the loss divided by the number of micro-batches, from explicit float64 gradients."""
    twin = copy.deepcopy(model)
    losses = [lambda part=part: loss_of(twin, part) for part in micro_batches]
    return GradientMoments.from_gradients(explicit_gradients(twin, losses))


def backward(model, micro_batches=MICRO_BATCHES, scale=lambda loss: loss):
    for part in micro_batches:
        scale(loss_of(model, part) / len(micro_batches)).backward()


def attached(model, optimizer, **options):
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0, min_factor=0.0, **options)
    return scheduler, scheduler.attach(model)


def assert_measured(handle, expected, rel=1e-10):
    moments = handle.moments
    assert float(moments.sq_norm_of_mean) == pytest.approx(expected.sq_norm_of_mean, rel=rel)
    assert float(moments.mean_of_sq_norms) == pytest.approx(expected.mean_of_sq_norms, rel=rel)


def test_two_lines_set_the_lr_of_the_very_step():
    model = tied_model()
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler, handle = attached(model, optimizer)
    expected = expected_moments(model)
    backward(model)
    gradient = model[2].weight.grad.clone()
    optimizer.step()
    assert_measured(handle, expected)
    factor = max(0.0, expected.lr_factor)
    assert 0 < factor < 1
    assert scheduler.factor == pytest.approx(factor, rel=1e-10)
    assert torch.allclose(model[2].weight, before[2].weight - 0.5 * factor * gradient, rtol=1e-10)


@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipping_before_the_step_changes_nothing(clip):
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    _, handle = attached(model, optimizer)
    expected = expected_moments(model)
    backward(model)
    clip(model.parameters(), 1e-3)
    optimizer.step()
    assert_measured(handle, expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_statistics_are_unscaled_under_grad_scaler(fused, unscale):
    model = tied_model().float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
    scheduler, handle = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    expected = expected_moments(model)
    backward(model, scale=scaler.scale)
    if unscale:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert_measured(handle, expected, rel=1e-5)  # float32 gradients
    optimizer.zero_grad()

    factor = scheduler.factor
    backward(model, scale=lambda loss: scaler.scale(loss) * math.inf)  # an overflow: the step is skipped
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert scheduler.factor == factor
    expected = expected_moments(model)
    backward(model, scale=scaler.scale)  # at the next, smaller scale
    scaler.step(optimizer)
    assert_measured(handle, expected, rel=1e-5)
    metrics = scheduler.metrics()
    assert metrics["observations"] == 2
    assert metrics["skipped_invalid"] + metrics["skipped_unstepped"] == 1


def test_a_disabled_grad_scaler():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    _, handle = attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    expected = expected_moments(model)
    backward(model, scale=scaler.scale)
    scaler.step(optimizer)
    assert_measured(handle, expected)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_compiled_step_takes_the_lr_of_its_batch(tensor_lr):
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(1e-2).double() if tensor_lr else 1e-2)
    scheduler, _ = attached(model, optimizer)
    compiled_step = torch.compile(optimizer.step, backend="eager")
    for _ in range(4):
        backward(model)
        before, gradient = model[2].weight.detach().clone(), model[2].weight.grad.clone()
        compiled_step()
        optimizer.zero_grad()
        assert torch.allclose(model[2].weight, before - 1e-2 * scheduler.factor * gradient, rtol=1e-6)


def test_bfloat16_autocast():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    inputs = torch.randn(4, 5, 6)

    def loss(model, x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().square().mean()

    twin = copy.deepcopy(model)
    expected = GradientMoments.from_gradients(explicit_gradients(twin, [lambda x=x: loss(twin, x) for x in inputs]))
    optimizer = torch.optim.AdamW(model.parameters())
    _, handle = attached(model, optimizer)
    for x in inputs:
        (loss(model, x) / 4).backward()
    optimizer.step()
    assert_measured(handle, expected, rel=1e-5)  # a division by 4 is exact in bfloat16


def test_an_optimizer_that_clears_grad_in_step():
    class Clearing(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad()

    model = tied_model()
    optimizer = Clearing(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    for _ in range(3):
        expected = expected_moments(model)
        backward(model)
        optimizer.step()
        assert_measured(handle, expected)
    assert scheduler.metrics()["observations"] == 3


def around(function):
    @functools.wraps(function)
    def other(*args, **kwargs):
        return function(*args, **kwargs)

    return other


@pytest.mark.parametrize("wrapped", [torch.compiler.disable, around], ids=["compiler.disable", "around"])
def test_functions_that_others_put_around_torchs_own(wrapped, monkeypatch):
    """As the first torch.compile of a process does to SparseAdam.step; our own hooks are wrapped in the same way."""

    class Wrapped(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    Wrapped([torch.ones(1, requires_grad=True)], lr=1.0)  # torch puts its hooks around step() when it makes the first
    monkeypatch.setattr(Wrapped, "step", wrapped(Wrapped.step))
    monkeypatch.setattr(torch.amp.GradScaler, "step", wrapped(torch.amp.GradScaler.step))
    model = tied_model()
    optimizer, scaler = Wrapped(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)
    scheduler, handle = attached(model, optimizer)
    for k in range(3):
        expected = expected_moments(model)
        backward(model, scale=scaler.scale)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert_measured(handle, expected)
        assert scheduler.metrics()["observations"] == k + 1


def test_a_step_that_fails_spoils_none_of_the_next():
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise FloatingPointError
            return super().step(closure)

    model = tied_model()
    optimizer = Failing(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    backward(model)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.fails = False
    expected = expected_moments(model)
    optimizer.step(lambda: backward(model))
    assert_measured(handle, expected)
    assert scheduler.metrics()["observations"] == 2


def test_a_step_inside_backward_is_refused():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attached(model, optimizer)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    with pytest.raises(RuntimeError, match="inside backward"):
        model(torch.ones(1, 1)).sum().backward()


def test_a_captured_step_is_refused(monkeypatch):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attached(model, optimizer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        optimizer.step()


class Wrapper(torch.optim.Optimizer):
    """An optimizer by name only, as accelerate's and Megatron's: no hook tables, no groups of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups


def test_the_optimizer_in_a_wrapper_is_found():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, handle = attached(model, Wrapper(optimizer))
    assert scheduler.optimizer is optimizer
    expected = expected_moments(model)
    backward(model)
    optimizer.step()
    assert_measured(handle, expected)


def test_an_optimizer_that_runs_no_hooks_is_refused():
    class Skips(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.defaults, self.state = {"lr": 1.0}, {}
            self.param_groups = [{"params": list(parameters), "lr": 1.0}]

        def step(self, closure=None):
            pass

    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="Skips"):
        SNRAdaptiveLR(Skips(model.parameters())).attach(model)
    with pytest.raises(TypeError, match="LBFGS"):
        SNRAdaptiveLR(torch.optim.LBFGS(model.parameters())).attach(model)


def test_a_closure_is_measured_before_its_step():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, handle = attached(model, optimizer)
    expected = expected_moments(model)
    before = model[2].weight.detach().clone()

    def closure():
        backward(model)
        return torch.tensor(3.0)

    assert float(optimizer.step(closure)) == 3.0
    assert_measured(handle, expected)
    assert torch.allclose(model[2].weight, before - scheduler.factor * model[2].weight.grad)
    optimizer.zero_grad()
    optimizer.step(closure=closure)
    assert scheduler.metrics()["observations"] == 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_adapters_and_frozen_parameters(use_reentrant):
    """As under LoRA: only some layers inside the checkpoints are trained."""
    model = Blocks(use_reentrant, frozen=("first", "head"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    _, handle = attached(model, optimizer)
    inputs = torch.randn(3, 5, 3).double()
    plain = Blocks(None, frozen=("first", "head"))
    losses = [lambda x=x: plain(x).square().mean() for x in inputs]
    expected = GradientMoments.from_gradients(explicit_gradients(plain, losses))
    for x in inputs:
        (model(x).square().mean() / 3).backward()
    optimizer.step()
    assert_measured(handle, expected)


def test_several_optimizers_on_one_model_each_measure_their_own():
    model = tied_model()
    embedding, middle = [model[0].weight], [model[2].weight]
    optimizers = [torch.optim.SGD(embedding, lr=1e-3), torch.optim.AdamW(middle, lr=1e-3)]
    handles = [attached(model, optimizer)[1] for optimizer in optimizers]
    for _ in range(2):
        twin = copy.deepcopy(model)
        gradients = explicit_gradients(twin, [lambda part=part, t=twin: loss_of(t, part) for part in MICRO_BATCHES])
        backward(model)
        for optimizer, handle, which in zip(optimizers, handles, (0, 1), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            assert_measured(handle, GradientMoments.from_gradients([[g[which]] for g in gradients]))


def test_a_compiled_model_is_measured():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend="aot_eager")
    _, handle = attached(compiled, optimizer)
    inputs = torch.randn(3, 5, 3).double()
    for _ in range(2):
        twin = copy.deepcopy(model)
        losses = [lambda x=x, t=twin: t(x).square().mean() for x in inputs]
        expected = GradientMoments.from_gradients(explicit_gradients(twin, losses))
        for x in inputs:
            (compiled(x).square().mean() / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_measured(handle, expected)


def test_sizes_of_unequal_micro_batches_are_stated():
    model = tied_model()
    parts = [torch.randint(7, (n, 4)) for n in (1, 3, 4)]
    twin = copy.deepcopy(model)
    losses = [lambda part=part: loss_of(twin, part) for part in parts]
    expected = GradientMoments.from_gradients(explicit_gradients(twin, losses), shares=[1, 3, 4])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    _, handle = attached(model, optimizer)
    for part in parts:
        with handle.sub_batch(size=len(part)):
            (loss_of(model, part) * len(part) / 8).backward()
    optimizer.step()
    assert_measured(handle, expected)


def test_per_group_factors_are_those_of_the_groups():
    torch.manual_seed(0)  # by chance both factors are clamped at 0
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)).double()
    inputs = torch.randn(6, 3).double()
    groups = [{"params": model[0].parameters(), "lr": 1.0}, {"params": model[1].parameters(), "lr": 0.1}]
    optimizer = torch.optim.SGD(groups)
    scheduler, handle = attached(model, optimizer, per_group=True)
    twin = copy.deepcopy(model)
    gradients = explicit_gradients(twin, [lambda x=x: twin(x).square().mean() for x in inputs])
    for x in inputs:
        (model(x).square().mean() / 6).backward()
    optimizer.step()
    factors = [
        GradientMoments.from_gradients([g[part] for g in gradients]).lr_factor for part in (slice(2), slice(2, 4))
    ]
    factors = [min(1.0, max(0.0, factor)) for factor in factors]
    assert factors[0] != factors[1]
    assert scheduler.get_last_lr() == pytest.approx([factors[0], 0.1 * factors[1]])
    metrics = scheduler.metrics()
    assert [metrics["factor_group_0"], metrics["factor_group_1"]] == pytest.approx(factors)
    assert [metrics["lr_group_0"], metrics["lr_group_1"]] == pytest.approx(scheduler.get_last_lr())
    assert_measured(handle, GradientMoments.from_gradients(gradients))


def test_metric_optimizer_measures_in_the_metric_of_the_last_step():
    model = tied_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-5)
    scheduler, handle = attached(model, optimizer, norm="adam")
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    assert scheduler.metrics()["skipped_invalid"] == 1  # no second moment yet
    twin = copy.deepcopy(model)
    gradients = explicit_gradients(twin, [lambda part=part: loss_of(twin, part) for part in MICRO_BATCHES])
    roots = [
        ((optimizer.state[p]["exp_avg_sq"] / (1 - 0.99)).sqrt() + 1e-5).sqrt()
        for p in model.parameters()
        if p in optimizer.state
    ]
    scaled = [[g / root for g, root in zip([g for g in one if g is not None], roots, strict=True)] for one in gradients]
    backward(model)
    optimizer.step()
    assert_measured(handle, GradientMoments.from_gradients(scaled))
    assert scheduler.metrics()["observations"] == 1


def test_metric_optimizer_falls_back_with_one_warning():
    model = tied_model()
    scheduler = SNRAdaptiveLR(torch.optim.SGD(model.parameters(), lr=1e-3), norm="adam")
    with pytest.warns(UserWarning, match="SGD") as warned:
        handle = scheduler.attach(model)
    assert len(warned) == 1
    expected = expected_moments(model)
    backward(model)
    scheduler.optimizer.step()
    assert_measured(handle, expected)


def test_zero_information_and_non_finite_batches_never_move_the_factor():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, _ = attached(model, optimizer)

    def step(factor):
        backward(model, scale=lambda loss: loss * factor)
        for p in model.parameters():
            if p.grad is not None and not math.isfinite(factor):
                p.grad.zero_()  # so that the model survives
        optimizer.step()
        optimizer.zero_grad()
        return scheduler.factor, scheduler.get_last_lr()

    known = step(1.0)
    for advantage in (0.0, math.nan, math.inf):
        assert step(advantage) == known
    metrics = scheduler.metrics()
    assert (metrics["observations"], metrics["skipped_flat"], metrics["skipped_invalid"]) == (1, 1, 2)


def test_one_backward_per_step_is_counted_and_said_once():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, _ = attached(model, optimizer)

    def three_steps():
        for _ in range(3):
            backward(model, MICRO_BATCHES[:1])
            optimizer.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="one backward") as warned:
        three_steps()
    assert len(warned) == 1
    assert scheduler.factor == 1.0
    assert scheduler.metrics()["skipped_single"] == 3


def test_a_step_without_gradients_is_a_counted_no_op():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, _ = attached(model, optimizer)
    with pytest.warns(UserWarning, match="one backward"):
        optimizer.step()
    assert scheduler.factor == 1.0
    assert scheduler.metrics()["skipped_single"] == 1


def test_parameters_added_and_unfrozen_later_are_watched_from_the_next_batch_on():
    model = tied_model()
    model[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([model[0].weight], lr=1e-3)
    scheduler, handle = attached(model, optimizer, per_group=True)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    model[2].weight.requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].weight, model[2].bias]})
    backward(model)
    with pytest.warns(UserWarning, match="added"):
        optimizer.step()
    optimizer.zero_grad()
    assert scheduler.metrics()["skipped_invalid"] == 1  # measured in part only
    expected = expected_moments(model)
    backward(model)
    optimizer.step()
    assert_measured(handle, expected)
    assert "factor_group_1" in scheduler.metrics()


def test_a_copy_is_not_attached():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    twin, twin_optimizer, twin_scheduler = copy.deepcopy((model, optimizer, scheduler))
    twin_handle = twin_scheduler.attach(twin)
    backward(twin)
    twin_optimizer.step()
    assert twin_handle.moments.num_sub_batches == 4
    assert handle.moments is None


def test_attach_once_remove_any_time():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    with pytest.raises(RuntimeError, match="already attached"):
        scheduler.attach(model)
    handle.remove()
    handle.remove()
    backward(model)
    optimizer.step()
    assert handle.moments is None
    assert scheduler.metrics()["observations"] == 0
    with pytest.raises(RuntimeError, match="removed"):
        handle.sub_batch(1)
    optimizer.zero_grad()
    with scheduler.attach(model) as handle:
        backward(model)
        optimizer.step()
    assert handle.moments.num_sub_batches == 4
    assert not handle.attached


def test_a_removed_handle_leaves_nothing_behind():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    backward(model)
    handle.remove()
    alive = [weakref.ref(handle), weakref.ref(scheduler)]
    del scheduler, handle
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_parameters_outside_the_model_are_refused():
    model, head = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=1.0)
    scheduler = SNRAdaptiveLR(optimizer)
    with pytest.raises(ValueError, match="2 parameters"):
        scheduler.attach(model)
    scheduler.attach(nn.ModuleList([model, head]))


def test_processes_that_start_after_attach_are_noticed(monkeypatch):
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attached(model, optimizer)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="attached before"):
        optimizer.step()
    with pytest.raises(TypeError, match=r"nn\.Module"):
        SNRAdaptiveLR(optimizer).attach(optimizer)


def test_monitor_mode_attached():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, _ = attached(model, optimizer, adapt=False)
    backward(model)
    optimizer.step()
    assert scheduler.get_last_lr() == [1e-3]
    assert scheduler.factor < 1


def test_forgotten_zero_grad_is_invalid_and_said():
    model = tied_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scheduler, handle = attached(model, optimizer)
    backward(model)
    optimizer.step()
    backward(model)
    with pytest.warns(UserWarning, match="zero_grad"):
        optimizer.step()
    assert is_invalid(handle.moments)
    assert scheduler.metrics()["skipped_invalid"] == 1


def test_accelerate_prepared():
    accelerate = pytest.importorskip("accelerate")
    model = tied_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    expected = expected_moments(model)
    prepared, prepared_optimizer, prepared_scheduler = accelerator.prepare(model, optimizer, scheduler)
    handle = scheduler.attach(prepared)
    for part in MICRO_BATCHES:
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, part))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), 1e-3)
            prepared_optimizer.step()
            prepared_scheduler.step()
            prepared_optimizer.zero_grad()
    assert_measured(handle, expected)
    assert scheduler.metrics()["observations"] == 1
