"""A program: the setting of a run, and a flat list of what is done in it. Its ``repr`` is the program itself.

Every sequence of operations has a meaning, so that a program that fails can be made shorter by leaving some out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch

MODELS = ["plain", "tied", "shared", "experts", "parts", "checkpointed", "reentrant"]
OPTIMIZERS = ["sgd", "momentum", "adam", "adamw", "adamax", "adagrad", "rmsprop"]
ADAMS = {"adam", "adamw", "adamax"}  # the last keeps no second moment, as it turns out in its first step
SCHEDULES = ["warm-up", "cosine", "lambda", "exponential", "sequential"]
FUSED = {"sgd", "adam", "adamw", "adagrad"}  # on a CPU; torch's momentum fails where a parameter had no gradient
NO_TENSOR_LR_IN_FOREACH = {"adam", "adamw"}  # which torch refuses where the step is not capturable


@dataclass(frozen=True)
class Setting:
    """What is built before the loop."""

    model: str = "plain"
    groups: int = 1
    optimizer: str = "sgd"
    implementation: str = "loop"  # or foreach, fused
    lr: str = "float"  # or tensor, one for each group; or shared, one tensor in all groups
    schedule: str | None = None
    behind_warm_up: bool = False  # SequentialLR of torch's warm-up and the scheduler itself
    smoothing: float | str = 0.0
    min_factor: float = 0.0
    max_factor: float = 1.0
    per_group: bool = False
    norm: str = "euclidean"  # or adam
    adapt: bool = True
    scaler: bool = False  # the loop uses a GradScaler
    wrapper: str | None = None  # ddp, ddp as views, or fully_shard, of two processes


@dataclass(frozen=True)
class Backward:
    """Forward pass, loss and ``backward()`` of one micro-batch."""

    data: int = 0  # seed of its inputs
    rows: int = 2
    kind: str = "loss"  # or flat (zero advantages), nan, inf
    route: int = 0  # the expert, or the part of the model, that it goes through
    spare: bool = False  # it also uses the layer that belongs to no optimizer at first
    size: float | None = None  # stated by sub_batch()
    again: bool = False  # backward() twice, the first time with retain_graph
    fails: bool = False  # backward() raises before it reaches the first layers
    sync: bool = True  # under a wrapper: gradients are reduced now, not with those of a later pass
    grad_first: bool = False  # torch.autograd.grad of the same loss before, within the sub_batch()


@dataclass(frozen=True)
class Skipped:
    """A ``sub_batch()`` without a backward pass."""

    size: float = 1.0


@dataclass(frozen=True)
class TwoLosses:
    """Two backward passes in one ``sub_batch()``: of two parts of the model, or, which is refused, of the same."""

    data: int = 0
    size: float = 1.0
    same: bool = False


@dataclass(frozen=True)
class Grad:
    """``torch.autograd.grad`` of a loss with respect to all parameters, or to one."""

    data: int = 0
    route: int = 0
    one: bool = False


@dataclass(frozen=True)
class Edit:
    """Somebody writes to every ``.grad``: in place, as another tensor, or through ``.data``, which bumps no version."""

    how: str = "in place"  # or replaced, data


@dataclass(frozen=True)
class Clip:
    how: str = "norm"  # or value
    bound: float = 0.01


@dataclass(frozen=True)
class Zero:
    """``zero_grad()`` of the optimizer, or of the model, which tells nobody."""

    to_none: bool = True
    of_model: bool = False


@dataclass(frozen=True)
class Step:
    """``optimizer.step()``, through the scaler where there is one; a ``.grad`` that is not finite is zeroed before."""

    unscale: bool = False  # scaler.unscale_() and clipping before it
    closure: tuple[Backward, ...] = ()  # backward passes within step(closure)
    zero_first: bool = False  # the closure begins with zero_grad()


@dataclass(frozen=True)
class Schedule:
    """``scheduler.step()``."""

    times: int = 1


@dataclass(frozen=True)
class Copy:
    """The program goes on with a copy of everything, attached anew; the original may go on as well, elsewhere."""

    how: str = "saved"  # torch.save, weights_only, fresh objects; or state_dict (not saved), deepcopy, pickle
    scheduler_first: bool = False  # which state is loaded first
    disturb: bool = False  # the original takes a step of its own after that


@dataclass(frozen=True)
class Freeze:
    """``requires_grad`` of the layer that may be frozen is toggled."""


@dataclass(frozen=True)
class AddGroup:
    """The spare layer becomes a parameter group."""

    lr: float | None = 0.03  # None: the default of the optimizer


@dataclass(frozen=True)
class Attach:
    """The handle is removed, and ``attach()`` called anew."""


Operation = (
    Backward | Skipped | TwoLosses | Grad | Edit | Clip | Zero | Step | Schedule | Copy | Freeze | AddGroup | Attach
)


@dataclass(frozen=True)
class Program:
    setting: Setting = field(default_factory=Setting)
    operations: tuple[Operation, ...] = ()

    def __str__(self) -> str:
        lines = [
            "Program(",
            f"    {self.setting},",
            "    (",
            *(f"        {one}," for one in self.operations),
            "    ),",
            ")",
        ]
        return "\n".join(lines)


def allowed(operation: Operation, setting: Setting) -> bool:
    """Whether the operation exists in a setting; where not, it is left out."""
    if isinstance(operation, AddGroup):  # torch's schedulers take no group that was added later, nor does its Adagrad
        scheduled = setting.schedule is not None or setting.behind_warm_up
        return not scheduled and setting.optimizer != "adagrad"
    if isinstance(operation, TwoLosses):
        return operation.same or setting.model == "parts"
    if isinstance(operation, Backward) and operation.fails:
        # A reentrant checkpoint's own passes succeed before that around them fails; of two parts one may be complete.
        of_some = setting.model == "parts" and operation.route == 2
        return setting.model != "reentrant" and not of_some and operation.kind == "loss"
    if isinstance(operation, Step) and operation.closure:
        return not setting.scaler  # which takes none
    return True


# -- drawing one ------------------------------------------------------------------------------------


def program_of(seed: int, wrapper: str | None = None) -> Program:
    """The program of a seed: the same on every machine and every run."""
    return program_by(random.Random(f"{wrapper} {seed}"), wrapper)


def program_by(draw: random.Random, wrapper: str | None = None) -> Program:
    """The program that these draws make; hypothesis has a ``random.Random`` of its own, which it can shrink."""
    setting = _setting(draw) if wrapper is None else _distributed(_setting(draw), wrapper, draw)
    operations: list[Operation] = []
    for _ in range(draw.randint(3, 7)):
        operations += _round(draw, setting)
    kept = tuple(one for one in operations if allowed(one, setting))
    if wrapper is not None:
        if wrapper == "ddp as views":  # as for zero_grad: what is clipped between two passes is invalid, not dropped
            kept = tuple(
                one for one, after in zip(kept, (*kept[1:], None), strict=True)
                if not isinstance(one, Clip) or isinstance(after, Step)
            )  # fmt: skip
        kept = _deferred(tuple(_as_processes_do(one, wrapper) for one in kept if _everywhere(one)), draw.random() < 0.5)
    return Program(_as_torch_2_6_does_it(setting) if torch.__version__.startswith("2.6") else setting, kept)


def _as_torch_2_6_does_it(setting: Setting) -> Setting:
    """Without what works otherwise there, also without us."""
    if setting.schedule == "sequential":  # a SequentialLR overwrites initial_lr where it is a tensor
        setting = replace(setting, lr="float")
    if setting.optimizer == "adagrad" and setting.scaler:  # fused, it knows nothing of the scale
        setting = replace(setting, implementation="loop")
    return setting


def _setting(draw: random.Random) -> Setting:
    optimizer = draw.choice(OPTIMIZERS)
    lr = draw.choices(["float", "tensor", "shared"], [6, 3, 1])[0]
    schedule = draw.choice([None, None, None, *SCHEDULES])
    return Setting(
        model=draw.choice(MODELS),
        groups=draw.choice([1, 2, 2, 3]),
        optimizer=optimizer,
        implementation=draw.choice(_implementations(optimizer, lr != "float")),
        lr=lr,
        schedule=schedule,
        behind_warm_up=schedule is None and draw.random() < 0.25,
        smoothing=draw.choice([0.0, 0.5, 0.9, "auto", "auto"]),
        min_factor=draw.choice([0.0, 0.0, 0.01, 0.2]),
        max_factor=draw.choice([1.0, 1.0, 0.6]),
        per_group=draw.random() < 0.3,
        norm="adam" if optimizer in ADAMS and draw.random() < 0.4 else "euclidean",
        adapt=draw.random() < 0.95,
        scaler=draw.random() < 0.2,
    )


def _implementations(optimizer: str, tensor_lr: bool) -> list[str]:
    """Those that torch has."""
    foreach = not (tensor_lr and optimizer in NO_TENSOR_LR_IN_FOREACH)
    return ["loop", *(["fused"] if optimizer in FUSED else []), *(["foreach"] if foreach else [])]


def _round(draw: random.Random, setting: Setting) -> list[Operation]:
    """One batch: backward passes with things between them, a step or none, and things between batches."""

    def chance(probability: float) -> bool:
        return draw.random() < probability

    stated = draw.choices(["none", "all", "mixed"], [14, 6, 1])[0]
    kind = draw.choices(["loss", "flat", "nan", "inf"], [88, 5, 5, 2])[0]
    done: list[Operation] = []
    passes = []
    for number in range(draw.choice([1, 2, 2, 3, 3, 4, 5])):
        sized = stated == "all" or (stated == "mixed" and chance(0.5))
        rows = draw.randint(1, 4)
        # One bad micro-batch spoils a batch; a flat one does not, if the others are not.
        of_this = kind if kind == "flat" or (number == 0 and kind != "loss") else "flat" if chance(0.05) else "loss"
        passes.append(
            Backward(
                data=draw.randrange(10**6),
                rows=rows,
                kind=of_this,
                route=draw.randrange(3),
                spare=chance(0.1),
                size=float(rows) if sized else None,
                again=chance(0.03),
                fails=chance(0.02),
                grad_first=chance(0.04),
            )
        )
    in_closure = passes if chance(0.06) and not setting.scaler else []
    for one in passes if not in_closure else []:
        if chance(0.01):
            done.append(Freeze())
        if one.size is not None and chance(0.08):
            done.append(Skipped(draw.choice([1.0, 2.0])))
        if chance(0.04 if setting.model == "parts" else 0.004):
            same = setting.model != "parts" or chance(0.2)
            done.append(TwoLosses(draw.randrange(10**6), one.size or 1.0, same=same))
        done.append(one)
        if one.fails and chance(0.8):
            done.append(_zero(draw))
        if chance(0.08):
            done.append(Grad(draw.randrange(10**6), draw.randrange(3), chance(0.3)))
        if chance(0.02):
            done.append(Edit(draw.choice(["in place", "replaced", "data"])))
        if chance(0.01):
            done.append(Clip())
        if chance(0.01):
            done.append(_zero(draw))
        if chance(0.006):
            done.append(_copy(draw))
        if chance(0.004):
            done.append(Attach())
    if chance(0.3):
        done.append(Clip(draw.choice(["norm", "value"]), draw.choice([0.01, 100.0])))
    if chance(0.06):
        done.append(Edit(draw.choice(["in place", "replaced", "data"])))
    if chance(0.04):
        done.append(Grad(draw.randrange(10**6), draw.randrange(3)))
    if not chance(0.1):  # else the batch is skipped
        closure = tuple(replace(one, fails=False) for one in in_closure)
        done.append(Step(unscale=chance(0.3), closure=closure, zero_first=bool(closure) and chance(0.5)))
        if chance(0.05):
            done.append(Step())
    done += [Schedule(draw.choice([1, 1, 1, 1, 2, 5]))] if chance(0.9) else []
    done += [_zero(draw)] if chance(0.95) else []
    if chance(0.12):
        done.append(_copy(draw))
    if chance(0.07):
        done.append(Freeze())
    if chance(0.06):
        done.append(AddGroup(draw.choice([0.03, None])))
    if chance(0.04):
        done.append(Attach())
    return done


def _zero(draw: random.Random) -> Zero:
    return Zero(to_none=draw.random() < 0.75, of_model=draw.random() < 0.25)


def _copy(draw: random.Random) -> Copy:
    how = draw.choice(["saved", "state_dict", "deepcopy", "pickle"])
    return Copy(how, scheduler_first=draw.random() < 0.3, disturb=draw.random() < 0.5)


# -- several processes ------------------------------------------------------------------------------


def _distributed(setting: Setting, wrapper: str, draw: random.Random) -> Setting:
    """What two processes run on a CPU: no scaler; with sharded parameters no tensor lr, nor what knows no DTensor."""
    model = setting.model if setting.model in ("plain", "experts", "checkpointed") else "plain"
    setting = replace(setting, model=model, scaler=False, wrapper=wrapper, norm="euclidean")
    if wrapper != "fully_shard":
        return setting
    optimizer = draw.choice(["sgd", "momentum", "adam", "adamw"])
    return replace(setting, optimizer=optimizer, implementation=draw.choice(["loop", "foreach"]), lr="float")


def _everywhere(operation: Operation) -> bool:
    """What exists under the wrappers: nothing that changes the model below them, nor what one process may do alone."""
    return not isinstance(operation, (TwoLosses, Grad, Edit, Freeze, AddGroup))


def _as_processes_do(operation: Operation, wrapper: str) -> Operation:
    sharded = wrapper == "fully_shard"
    if isinstance(operation, Backward):
        return replace(operation, again=False, fails=False, grad_first=False, spare=operation.spare and not sharded)
    if isinstance(operation, Step):
        closure = tuple(replace(one, again=False, spare=one.spare and not sharded) for one in operation.closure)
        return replace(operation, closure=tuple(replace(one, grad_first=False) for one in closure))
    if wrapper == "ddp as views" and isinstance(operation, Zero):  # in place it is not told from DDP's own writing
        return replace(operation, to_none=True)
    if isinstance(operation, Copy):  # shards are not saved as a whole
        return Copy("state_dict" if sharded else "saved", operation.scheduler_first)
    return operation


def _deferred(operations: tuple[Operation, ...], deferred: bool) -> tuple[Operation, ...]:
    """The gradients of a pass are reduced with the next one's, but for the last pass before anything looks at them."""
    done = []
    for number, one in enumerate(operations):
        after = operations[number + 1] if number + 1 < len(operations) else None
        if isinstance(one, Backward) and isinstance(after, Backward):
            one = replace(one, sync=not deferred)
        done.append(one)
    return tuple(done)


# -- making one shorter -----------------------------------------------------------------------------


def simpler(program: Program) -> list[Program]:
    """Programs that are a little simpler, the simplest first."""
    operations, found = program.operations, []
    length = len(operations)
    size = length // 2
    while size >= 1:
        for start in range(0, length, size):
            found.append(replace(program, operations=operations[:start] + operations[start + size :]))
        size //= 2
    plain = Setting(wrapper=program.setting.wrapper)
    for name, value in vars(plain).items():
        if getattr(program.setting, name) != value:
            setting = replace(program.setting, **{name: value})
            kept = tuple(one for one in operations if allowed(one, setting))
            found.append(Program(setting, kept))
    for number, one in enumerate(operations):
        for name, value in vars(type(one)()).items():
            if getattr(one, name) != value:
                simple = replace(one, **{name: value})
                if allowed(simple, program.setting):
                    found.append(replace(program, operations=(*operations[:number], simple, *operations[number + 1 :])))
    return found
