"""Brute force: every gradient of every micro-batch is kept, and every number is computed from all of them anew.

Nothing of the library is used here. The rules are those that its docstrings state: :class:`AccumulationSource` on what
a batch is and when it counts as invalid, :class:`MomentAverages` on averages, :class:`SNRAdaptiveLR` on the factor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .language import (
    AddGroup,
    Attach,
    Backward,
    Clip,
    Copy,
    Edit,
    Freeze,
    Grad,
    Operation,
    Schedule,
    Setting,
    Skipped,
    Step,
    TwoLosses,
    Zero,
)
from .parts import OPTIMIZERS, SCHEDULES, WARM_UP, Net, base_lr, base_lrs, group_names, loss_of, of_rank, warm_up

INITIAL_SCALE, GROWTH_INTERVAL = 16.0, 3  # of the GradScaler


@dataclass
class SubBatch:
    gradients: dict[str, Tensor]  # h_k, as added to .grad but for the loss scale
    size: float | None


@dataclass
class Observation:
    """What a batch that could be measured told."""

    signal: float
    sq_norm: float
    num: int


class Averages:
    """Weighted means over all batches that were measured, from a list of them."""

    def __init__(self, smoothing: float | str) -> None:
        self.shrinks = smoothing == "auto"
        self.beta = 0.95 if smoothing == "auto" else float(smoothing)
        self.seen: list[Observation] = []

    def weights(self) -> list[float]:
        raw = [(1 - self.beta) * self.beta**age for age in reversed(range(len(self.seen)))]
        return [one / math.fsum(raw) for one in raw]

    def mean(self, name: str) -> float:
        return math.fsum(a * getattr(one, name) for a, one in zip(self.weights(), self.seen, strict=True))

    def ratio(self) -> float:
        """Of the averages; NaN where nothing is known."""
        if not self.seen:
            return math.nan
        signal, sq_norm = self.mean("signal"), self.mean("sq_norm")
        return signal / sq_norm if sq_norm else math.copysign(math.inf, signal)

    def standard_error(self) -> float:
        a = self.weights()
        a2, a3 = math.fsum(x**2 for x in a), math.fsum(x**3 for x in a)
        if a2 - 2 * a3 + a2**2 <= 1e-12:
            return math.nan
        ratio = self.ratio()
        spread = math.fsum((x * (one.signal - ratio * one.sq_norm)) ** 2 for x, one in zip(a, self.seen, strict=True))
        return math.sqrt(spread / self.mean("sq_norm") ** 2 * a2 / (a2 - 2 * a3 + a2**2))

    def used_ratio(self) -> float:
        if not self.shrinks or not self.seen:
            return self.ratio()
        ratio, error = min(max(self.ratio(), 0.0), 1.0), self.standard_error()
        if math.isnan(error) or ratio == 0:
            return ratio
        return ratio * ratio**2 / (ratio**2 + (2 * error) ** 2)

    def effective_number(self) -> float:
        return 1 / math.fsum(a**2 for a in self.weights())


class Oracle:
    """The state of the loop as the rules have it, and what follows from it.

    ``world`` processes each run every backward pass on their own data; their gradients are averaged.
    """

    def __init__(self, setting: Setting, world: int = 1) -> None:
        self.setting, self.world = setting, world
        self.model = Net(setting.model)
        self.groups = group_names(self.model, setting.groups)
        self.bases = base_lrs(setting)
        self.params = dict(self.model.named_parameters())
        make = OPTIMIZERS[setting.optimizer]
        self.optimizer = make(self._param_groups(self.groups), lr=1.0, foreach=False)
        self.clock = None if setting.schedule is None else self._clock(SCHEDULES[setting.schedule])
        self.warm_up = self._clock(warm_up) if setting.behind_warm_up else None
        self.calls = 0  # of scheduler.step()
        self.whole = Averages(setting.smoothing)
        self.of_groups = [Averages(setting.smoothing) for _ in self.groups]
        self.counts: Counter[str] = Counter()
        self.knows_scaler = setting.implementation == "fused"  # torch's copies of an optimizer forget it
        self.scale, self.good_steps = INITIAL_SCALE, 0
        self.used_lrs: list[float] = []  # those of the last step
        self.happened: Counter[str] = Counter()  # statistics of the test itself
        self.just_added = 0  # groups whose lr nobody has written yet
        self.floor_ties = 0  # observations whose ratio is the floor but for rounding
        self.unsure = 0  # batches of which the rules do not say why they cannot be measured
        self.perhaps_unstepped = 0  # or whether they were cleared: they were written to when everything was copied
        self._attach()

    # -- operations ---------------------------------------------------------------------------------

    def do(self, operation: Operation) -> str | None:
        """Carry it out; the name of the exception that the user sees, if any."""
        act = {
            Backward: self._backward, Skipped: self._skipped, TwoLosses: self._two_losses, Grad: self._grad,
            Edit: self._edit, Clip: self._clip, Zero: self._zero, Step: self._step, Schedule: self._schedule,
            Copy: self._copy, Freeze: self._freeze, AddGroup: self._add_group, Attach: self._reattach,
        }[type(operation)]  # fmt: skip
        self.happened[type(operation).__name__] += 1
        raised: str | None = act(operation)
        return raised

    def _backward(self, one: Backward) -> str | None:
        for trait in ("again", "fails", "grad_first"):
            self.happened[trait] += getattr(one, trait)
        if one.kind != "loss":
            self.happened[one.kind] += 1
        for _ in range(1 + one.again):
            if self._one_pass(one):
                return "Failure"
        return None

    def _one_pass(self, one: Backward) -> bool:
        gradients, failed = self._gradients(one)
        seen = {name for name in gradients if name in self.watched}
        if seen or one.size is not None:
            self._begin()
            self.batch += [SubBatch(h, size) for h, size in self.of_ranks]
        for name, gradient in gradients.items():
            self._add(name, gradient * self._loss_scale())
        if seen:
            self.recorded, self.touched = True, False
            self.broken |= failed
        return failed

    def _gradients(self, one: Backward) -> tuple[dict[str, Tensor], bool]:
        """By ``torch.autograd.grad``, the mean over processes; and whether the pass fails."""
        total: dict[str, Tensor] = {}
        failed = False
        trainable = {name: p for name, p in self.params.items() if p.requires_grad}
        self.of_ranks: list[tuple[dict[str, Tensor], float | None]] = []
        for rank in range(self.world):
            mine, wall, reached = of_rank(one, rank, self.setting), _Wall(one.fails), trainable
            loss = loss_of(self.model, mine, wall=wall)
            if wall.holds:
                failed = True
                reached = {name: p for name, p in trainable.items() if name not in self.model.before_the_wall()}
            found = torch.autograd.grad(loss, list(reached.values()), allow_unused=True)
            h = {name: g / self.world for name, g in zip(reached, found, strict=True) if g is not None}
            self.of_ranks.append((h, mine.size))
            for name, g in h.items():
                total[name] = total[name] + g if name in total else g
        return total, failed

    def _skipped(self, one: Skipped) -> None:
        self._begin()
        self.batch += [SubBatch({}, one.size) for _ in range(self.world)]

    def _two_losses(self, one: TwoLosses) -> str | None:
        routes = (0, 0) if one.same else (0, 1)
        found = [self._gradients(Backward(one.data, route=route, size=one.size))[0] for route in routes]
        self._begin()
        self.batch.append(SubBatch({**found[0], **found[1]}, one.size))
        self.fault |= one.same
        for gradients in found:
            for name, gradient in gradients.items():
                self._add(name, gradient * self._loss_scale())
        self.recorded, self.touched = True, False
        self.happened["in pieces"] += one.same
        return "RuntimeError" if one.same else None

    def _grad(self, one: Grad) -> None:
        """Nothing: ``torch.autograd.grad`` leaves ``.grad`` alone and does not count."""

    def _edit(self, one: Edit) -> None:
        self.happened[f"edit {one.how}"] += 1
        for p in self._with_grad():
            p.grad = 0.5 * p.grad
        self._touch(silently=one.how == "data")

    def _clip(self, one: Clip) -> None:
        clip(self._with_grad(), one)
        self._touch()

    def _zero(self, one: Zero) -> None:
        self._touch()
        if one.of_model:  # which is noticed when the next backward pass begins
            self.model.zero_grad(set_to_none=one.to_none)
            return
        self.optimizer.zero_grad(set_to_none=one.to_none)
        if self.batch:
            self._drop()

    def _step(self, one: Step) -> None:
        if one.zero_first and one.closure:
            self._zero(Zero())
        for inner in one.closure:
            self._backward(inner)
            self.happened["closure"] += 1
        if self.setting.scaler:
            self._scaled_step(one)
        else:
            sanitise(self._with_grad())
            self._observe()
            self._run_optimizer()

    def _schedule(self, one: Schedule) -> None:
        self.just_added = 0
        self.calls += one.times
        for clock in filter(None, (self.clock, self.warm_up)):
            for _ in range(one.times):
                clock.step()

    def _copy(self, one: Copy) -> None:
        """A copy has no ``.grad``, as torch copies parameters: the batch in the middle is lost."""
        self.happened[f"copy {one.how}"] += 1
        self.happened["copy in the middle"] += bool(self.batch)
        for p in self.params.values():
            p.grad = None
        self.knows_scaler = self.setting.implementation == "fused" and one.how in ("saved", "state_dict")
        self.perhaps_unstepped += self.may_be_cleared
        self._attach()

    def _freeze(self, one: Freeze) -> None:
        for p in self.model.freezable():
            p.requires_grad_(not p.requires_grad)

    def _add_group(self, one: AddGroup) -> None:
        names = [name for name in self.params if name.startswith("spare.")]
        if names not in self.groups:
            self.happened["group added"] += 1
            self.just_added = 1
            self.groups.append(names)
            self.bases.append(base_lr(0) if one.lr is None else one.lr)
            self.of_groups.append(Averages(self.setting.smoothing))
            self.optimizer.add_param_group(self._param_groups([names])[0])

    def _reattach(self, one: Attach) -> None:
        self.perhaps_unstepped += self.may_be_cleared
        self._attach()

    # -- what a batch is ----------------------------------------------------------------------------

    def _attach(self) -> None:
        """From here on these parameters are watched, and nothing is known of what lies in ``.grad``."""
        self.watched = self._trainable()
        self._new_batch()

    def _new_batch(self) -> None:
        self.batch: list[SubBatch] = []
        self.recorded = False  # a backward pass of this batch has ended
        self.touched = False  # .grad was cleared or changed since then, and that shows
        self.edited = False  # it was changed in a way that only its values tell
        self.broken = False  # a backward pass failed
        self.fault = False  # the batch is invalid

    @property
    def may_be_cleared(self) -> bool:
        """Whether ``.grad`` was written to since the last backward pass: whether that cleared it, its versions hide."""
        return self.recorded and self.touched

    def _drop(self) -> None:
        """The gradients of the batch were cleared without a step."""
        self.happened["dropped"] += 1
        self.counts["skipped_unstepped"] += 1
        self._new_batch()

    def _begin(self) -> None:
        """A sub-batch begins; with it a new batch, where ``.grad`` was cleared or changed before."""
        if self.may_be_cleared and self.broken:  # likewise, whether what failed and was written to is over
            self.happened["dropped"] += 1
            self.perhaps_unstepped += 1
            self._new_batch()
        elif self.may_be_cleared:
            self._drop()
        elif self.broken:  # whether the batch goes on, or another one begins that is invalid too, no rule says
            self.unsure += 1
            self.perhaps_unstepped += 1
        if not self.batch:  # .grad must have been empty
            left = [self.params[name].grad for name in self.watched]
            self.fault |= any(bool((g != 0).any()) for g in left if g is not None)
            self.happened["not empty"] += self.fault
        if self.edited:
            self.happened["edited"] += 1
            self.fault, self.edited = True, False

    def _touch(self, silently: bool = False) -> None:
        """Somebody writes to every ``.grad`` of the optimizer, or clears it."""
        held = [p.grad for name, p in self.params.items() if name in self.watched and p.grad is not None]
        if silently:
            self.edited |= self.recorded and any(bool((g != 0).any() and g.isfinite().all()) for g in held)
        else:
            self.touched |= bool(held)

    def _observe(self) -> None:
        """The batch ends; its moments move the averages, or a counter tells why not."""
        stated = {one.size is not None for one in self.batch}
        names = [name for one in self.batch for name in one.gradients if name in self.watched]
        fault = self.fault or self.broken or len(stated) > 1 or self.watched != self._trainable()
        fault |= len(self.batch) > 1 and stated == {False} and len(set(names)) == len(names)
        self.happened["other parameters"] += self.watched != self._trainable()
        moments = [self._moments([name for name in group if name in self.watched]) for group in self.groups]
        of_all = (math.fsum(one[0] for one in moments), math.fsum(one[1] for one in moments))
        outcome = self._outcome(of_all, fault, self.whole)
        for averages, of_group in zip(self.of_groups, moments, strict=True):
            self._outcome(of_group, fault, averages)
        self.counts[outcome] += 1
        self.happened[outcome] += 1
        above = min(self._ratios()) - self.setting.min_factor
        self.counts["floor_bound"] += outcome == "observations" and above < -1e-9
        self.floor_ties += outcome == "observations" and abs(above) <= 1e-9  # a sum in another order tells
        self.watched = self._trainable() or self.watched
        self._new_batch()

    def _moments(self, names: list[str]) -> tuple[float, float]:
        """``||g_hat||^2`` and ``sum_k c_k ||g_k||^2``, by the formula, for the parameters of these names."""
        sizes = [one.size or 1.0 for one in self.batch]
        sq_norm = mean_sq = 0.0
        for name in names:
            h = [one.gradients.get(name) for one in self.batch]
            present = [(n / math.fsum(sizes), g) for n, g in zip(sizes, h, strict=True) if g is not None]
            if present:
                if all(not g.any() for _, g in present) and not self.optimizer.state.get(self.params[name]):
                    continue  # whose norm is 0, though nothing is known of the norm
                scale = self._scale_of_squares(name)
                sq_norm += (scale * sum(g for _, g in present).square()).sum().item()
                mean_sq += math.fsum(c * (scale * (g / c).square()).sum().item() for c, g in present)
        return sq_norm, mean_sq

    def _scale_of_squares(self, name: str) -> Tensor:
        """What the square of an entry is multiplied by: 1, or Adam's ``1 / (sqrt(v_hat) + eps)`` of the last step."""
        p = self.params[name]
        [group] = [one for one in self.optimizer.param_groups if any(q is p for q in one["params"])]
        if self.setting.norm == "euclidean" or not {"betas", "eps"} <= group.keys():
            return torch.ones(())
        state = self.optimizer.state.get(p)
        if not state:
            return torch.full((), math.nan)  # not known before the first step
        if "exp_avg_sq" not in state:
            return torch.ones(())
        v = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        return 1 / ((v / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"])

    def _outcome(self, moments: tuple[float, float], fault: bool, averages: Averages) -> str:
        """What becomes of moments: a counter, or an observation that the averages keep."""
        sq_norm, mean_sq = moments
        num = len(self.batch)
        if num < 2:
            return "skipped_single"
        if fault or not (math.isfinite(sq_norm) and math.isfinite(mean_sq)):
            return "skipped_invalid"
        if mean_sq == 0:
            return "skipped_flat"
        noise = (mean_sq - sq_norm) / (num - 1)
        averages.seen.append(Observation(sq_norm - noise, sq_norm, num))
        return "observations"

    # -- the step -----------------------------------------------------------------------------------

    def _ratios(self) -> list[float]:
        used = self.of_groups if self.setting.per_group else [self.whole]
        known = [averages.used_ratio() for averages in used if averages.seen]
        return known or [1.0]

    def factor_of(self, averages: Averages) -> float:
        if not averages.seen:
            return self.setting.max_factor
        return min(max(averages.used_ratio(), self.setting.min_factor), self.setting.max_factor)

    @property
    def ceilings(self) -> list[float]:
        return self.bases if self.clock is None else [float(lr) for lr in self.clock.get_last_lr()]

    @property
    def in_charge(self) -> bool:
        return self.warm_up is None or self.calls >= WARM_UP

    @property
    def lrs(self) -> list[float]:
        """What stands in the optimizer."""
        if self.warm_up is not None and not self.in_charge:
            return [float(lr) for lr in self.warm_up.get_last_lr()]
        if not self.setting.adapt:
            return list(self.ceilings)
        used = self.of_groups if self.setting.per_group else [self.whole] * len(self.groups)
        return [lr * self.factor_of(averages) for lr, averages in zip(self.ceilings, used, strict=True)]

    def _run_optimizer(self) -> None:
        self.used_lrs = self.lrs
        self.just_added = 0
        for group, lr in zip(self.optimizer.param_groups, self.used_lrs, strict=True):
            group["lr"] = lr
        self.optimizer.step()
        self.happened["steps"] += 1
        self.happened["in a warm-up"] += not self.in_charge
        self.happened["behind a warm-up"] += self.warm_up is not None and self.in_charge

    def _scaled_step(self, one: Step) -> None:
        """What a ``GradScaler`` does; a fused optimizer does its part of it within ``step()``."""
        if not self._with_grad():
            return
        fused = self.knows_scaler
        for p in self._with_grad():
            p.grad = p.grad / self.scale
        self._touch(silently=True)  # as torch's kernel for it does
        finite = self._finite()
        if one.unscale:
            self._clip(Clip())
        if finite or fused:  # the hooks of a fused step run even where the step is not done
            self._observe()
            self.used_lrs = self.lrs
        if finite:
            self._run_optimizer()
        else:
            self.happened["overflow"] += 1
        if fused:
            self._zero(Zero())
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    # -- small things -------------------------------------------------------------------------------

    def _clock(self, schedule: Callable[[torch.optim.Optimizer], LRScheduler]) -> LRScheduler:
        """The schedule alone, on an optimizer that nobody else touches."""
        parameters = [torch.zeros(1, requires_grad=True) for _ in self.bases]
        optimizer = torch.optim.SGD([{"params": [p], "lr": lr} for p, lr in zip(parameters, self.bases, strict=True)])
        clock = schedule(optimizer)
        optimizer.step()
        return clock

    def _param_groups(self, groups: list[list[str]]) -> list[dict[str, object]]:
        return [{"params": [self.params[name] for name in names]} for names in groups]

    def _trainable(self) -> set[str]:
        return {name for names in self.groups for name in names if self.params[name].requires_grad}

    def _with_grad(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _finite(self) -> bool:
        return all(bool(p.grad.isfinite().all()) for p in self._with_grad() if p.grad is not None)

    def _loss_scale(self) -> float:
        return self.scale if self.setting.scaler else 1.0

    def _add(self, name: str, gradient: Tensor) -> None:
        p = self.params[name]
        p.grad = gradient.clone() if p.grad is None else p.grad + gradient


class _Wall:
    """Cuts the graph where a backward pass would fail; it cannot fail where nothing behind wants a gradient."""

    def __init__(self, stands: bool) -> None:
        self.stands, self.holds = stands, False

    def __call__(self, h: Tensor) -> Tensor:
        if not self.stands:
            return h
        self.holds |= h.requires_grad
        return h.detach()


def clip(parameters: list[Tensor], one: Clip) -> None:
    if not parameters:
        return
    if one.how == "norm":
        torch.nn.utils.clip_grad_norm_(parameters, one.bound, foreach=False)
    else:
        torch.nn.utils.clip_grad_value_(parameters, one.bound, foreach=False)


def sanitise(parameters: list[Tensor]) -> None:
    """What a careful user does with a NaN before the step, so that the weights survive."""
    for p in parameters:
        assert p.grad is not None
        local: Tensor = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad
        local.nan_to_num_(0.0, 0.0, 0.0)
