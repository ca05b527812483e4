"""The same loop with the library: a model, an optimizer, ``SNRAdaptiveLR`` and its ``attach()``, as users write it."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import SequentialLR

from snr_optim import SNRAdaptiveLR

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
from .oracle import GROWTH_INTERVAL, INITIAL_SCALE, clip, sanitise
from .parts import OPTIMIZERS, SCHEDULES, WARM_UP, Net, as_lr, base_lrs, group_names, loss_of, of_rank, warm_up

MIDDLE_OF_NOWHERE = 10**7  # the data of an original that goes on after it was copied


class Subject:
    """What a user holds. ``wrap`` makes a data-parallel model of a plain one."""

    def __init__(self, setting: Setting, rank: int = 0, wrap: Any = None) -> None:
        self.setting, self.rank, self.wrap = setting, rank, wrap
        self.added: list[float | Tensor | None] = []  # lr of a group that was added
        self.frozen = False
        self.used_lrs: list[float] = []  # those of the last step, as it was done
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is tested elsewhere
            self._build()
            self._attach()

    def do(self, operation: Operation) -> str | None:
        """Carry it out; the name of the exception that the user sees, if any."""
        act = {
            Backward: self._backward, Skipped: self._skipped, TwoLosses: self._two_losses, Grad: self._grad,
            Edit: self._edit, Clip: self._clip, Zero: self._zero, Step: self._step, Schedule: self._schedule,
            Copy: self._copy, Freeze: self._freeze, AddGroup: self._add_group, Attach: self._reattach,
        }[type(operation)]  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                act(operation)
            except Exception as error:
                return type(error).__name__
        return None

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name.removeprefix("module."): p for name, p in self.model.named_parameters()}

    @property
    def lrs(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    # -- operations ---------------------------------------------------------------------------------

    def _backward(self, one: Backward) -> None:
        one = of_rank(one, self.rank, self.setting)
        self._synchronise(one.sync)
        loss = self._loss(one)
        for number in range(1 + one.again):
            with self._sub_batch(one.size):
                if one.grad_first and not one.fails and self.setting.model != "reentrant":
                    torch.autograd.grad(loss, self._trainable(), retain_graph=True, allow_unused=True)
                self._scaled(loss).backward(retain_graph=one.again and number == 0)

    def _skipped(self, one: Skipped) -> None:
        with self.handle.sub_batch(one.size):
            pass

    def _two_losses(self, one: TwoLosses) -> None:
        with self.handle.sub_batch(one.size):
            for route in (0, 0) if one.same else (0, 1):
                self._scaled(self._loss(Backward(one.data, route=route, size=one.size))).backward()

    def _grad(self, one: Grad) -> None:
        loss = loss_of(self.model, Backward(one.data, route=one.route))
        wanted = self._trainable()
        torch.autograd.grad(loss, wanted[-3:-2] if one.one else wanted, allow_unused=True)

    def _edit(self, one: Edit) -> None:
        for p in self._with_grad():
            assert p.grad is not None
            if one.how == "replaced":
                p.grad = 0.5 * p.grad
            else:
                (p.grad.data if one.how == "data" else p.grad).mul_(0.5)

    def _clip(self, one: Clip) -> None:
        clip(self._with_grad(), one)

    def _zero(self, one: Zero) -> None:
        (self.model if one.of_model else self.optimizer).zero_grad(set_to_none=one.to_none)

    def _step(self, one: Step) -> None:
        if self.setting.scaler:
            self._scaled_step(one)
        elif one.closure:
            self.optimizer.step(lambda: self._closure(one))
        else:
            sanitise(self._with_grad())
            self.optimizer.step()

    def _closure(self, one: Step) -> float:
        if one.zero_first:
            self.optimizer.zero_grad()
        for inner in one.closure:
            self._backward(inner)
        sanitise(self._with_grad())
        return 3.0

    def _scaled_step(self, one: Step) -> None:
        if not self._with_grad():
            return
        if one.unscale:
            self.scaler.unscale_(self.optimizer)
            clip(self._with_grad(), Clip())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if getattr(self.optimizer, "_step_supports_amp_scaling", False):  # which may leave the gradients scaled
            self.optimizer.zero_grad()

    def _schedule(self, one: Schedule) -> None:
        for _ in range(one.times):
            self.driver.step()

    def _copy(self, one: Copy) -> None:
        before = copy.copy(self)
        if one.how in ("saved", "state_dict"):
            self._load(one)
        else:
            of_all = (self.model, self.optimizer, self.scheduler, self.driver, self.scaler)
            copied = copy.deepcopy(of_all) if one.how == "deepcopy" else pickle.loads(pickle.dumps(of_all))
            self.model, self.optimizer, self.scheduler, self.driver, self.scaler = copied
        self._attach()
        if one.disturb:
            before.used_lrs = []
            for number in range(3):
                before._backward(Backward(MIDDLE_OF_NOWHERE + number, rows=3))
            before.optimizer.step()
            before.driver.step()

    def _load(self, one: Copy) -> None:
        parts = (self.model, self.optimizer, self.driver, self.scaler)
        state = [part.state_dict() for part in parts]
        if one.how == "saved":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        else:  # whoever loads an optimizer from memory has its tensors in common with the other; we have not
            state = [*copy.deepcopy(state[:2]), *state[2:]]
        self._build()
        order = (0, 2, 1, 3) if one.scheduler_first else (0, 1, 2, 3)
        for i in order:
            (self.model, self.optimizer, self.driver, self.scaler)[i].load_state_dict(state[i])

    def _freeze(self, one: Freeze) -> None:
        self.frozen = not self.frozen
        for p in self.model.freezable():
            p.requires_grad_(not p.requires_grad)

    def _add_group(self, one: AddGroup) -> None:
        if not self.added:
            self.added.append(one.lr)
            self._add(one.lr)

    def _reattach(self, one: Attach) -> None:
        self.handle.remove()
        self._attach()

    # -- building -----------------------------------------------------------------------------------

    def _build(self) -> None:
        model = Net(self.setting.model)
        if self.frozen:
            for p in model.freezable():
                p.requires_grad_(False)
        self.model: Any = model if self.wrap is None else self.wrap(model)
        named = self.parameters
        setting, groups = self.setting, []
        lrs = base_lrs(setting)
        default = as_lr(lrs[0], setting.lr)
        for names, lr in zip(group_names(model, setting.groups), lrs, strict=True):
            of_group = default if setting.lr == "shared" else as_lr(lr, setting.lr)
            groups.append({"params": [named[name] for name in names], "lr": of_group})
        how = {"foreach": False} if setting.implementation == "loop" else {setting.implementation: True}
        self.optimizer: Any = OPTIMIZERS[setting.optimizer](groups, lr=default, **how)
        for lr in self.added:
            self._add(lr)
        first = warm_up(self.optimizer) if setting.behind_warm_up else None
        schedule = None if setting.schedule is None else SCHEDULES[setting.schedule](self.optimizer)
        self.scheduler = SNRAdaptiveLR(
            self.optimizer,
            schedule,
            smoothing=setting.smoothing,
            min_factor=setting.min_factor,
            max_factor=setting.max_factor,
            per_group=setting.per_group,
            norm=setting.norm,
            adapt=setting.adapt,
        )
        self.driver: Any = self.scheduler  # what the loop steps
        if first is not None:
            self.driver = SequentialLR(self.optimizer, [first, self.scheduler], milestones=[WARM_UP])
        self.scaler = torch.amp.GradScaler(
            "cpu", init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL, enabled=setting.scaler
        )

    def _add(self, lr: float | None) -> None:
        group: dict[str, Any] = {"params": list(self.model.spare.parameters())}
        if lr is not None:
            group["lr"] = as_lr(lr, self.setting.lr)
        self.optimizer.add_param_group(group)

    def _attach(self) -> None:
        self.handle = self.scheduler.attach(self.model)
        # The lr of the step as it was done: torch calls this hook when the step is over.
        self.optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if optimizer is self.optimizer:
            self.used_lrs = self.lrs

    # -- small things -------------------------------------------------------------------------------

    def _loss(self, one: Backward) -> Tensor:
        wall = {"wall": _fails} if one.fails else {}
        return loss_of(self.model, one, plain=False, **wall)

    def _synchronise(self, sync: bool) -> None:
        """What ``no_sync()`` and FSDP2's setter do, for forward and backward."""
        if self.setting.wrapper == "fully_shard":
            self.model.set_requires_gradient_sync(sync)
        elif self.setting.wrapper is not None:
            self.model.require_backward_grad_sync = sync

    def _scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss) if self.setting.scaler else loss

    def _sub_batch(self, size: float | None) -> AbstractContextManager[Any]:
        return nullcontext() if size is None else self.handle.sub_batch(size)

    def _trainable(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _with_grad(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]


def whole(value: Tensor) -> Tensor:
    """All of a tensor that may be sharded; every process must ask."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _fails(h: Tensor) -> Tensor:
    from .parts import Fails

    return Fails.apply(h)
