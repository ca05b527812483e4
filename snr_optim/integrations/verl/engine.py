"""The optimizers of ``optimizers.py`` in verl's FSDP engine: it measures gradients, logs the lr, and saves the state.

Here: replacements for methods of ``FSDPEngine``. Each of them does as before unless ``optim.optimizer`` names an
optimizer of this library.

Every micro-batch of every rank is a sub-batch, whose gradient is measured whole before it is reduce-scattered, whether
the engine defers the reduction or not. Its size is its number of sequences without padding, because verl's losses are
sums over sequences, divided by numbers of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from snr_optim.integrations._ceiling import ScaledSteps
from snr_optim.integrations.verl.optimizers import MeasuredOptimizer
from snr_optim.integrations.verl.replacing import problems, replace

STATE_KEY = "snr_optim"  # in the state of verl's scheduler


def change_fsdp_engine(module: ModuleType) -> None:
    """Change ``verl.workers.engine.fsdp.transformer_impl``."""
    engine = module.FSDPEngine
    replace(engine, "_build_optimizer", _with_attached_optimizer, ["self", "module"])
    replace(engine, "_build_lr_scheduler", _with_logged_lr, ["self", "optimizer"])
    replace(engine, "_gradient_sync_context", _with_open_micro_batch, ["self", "is_last_micro_batch"])
    replace(module.FSDPEngineWithLMHead, "forward_step", _with_sub_batch_size, ["self", "micro_batch", "forward_only"])
    replace(engine, "train_batch", _with_metrics, ["self", "data"])


class LoggedSchedule:
    """verl's lr scheduler, which goes on scheduling the ceiling, but reports the lr of the last step."""

    def __init__(self, schedule: LRScheduler, steps: ScaledSteps) -> None:
        self._schedule, self._steps = schedule, steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # before __init__, as when it is copied
        return getattr(self._schedule, name)

    def get_last_lr(self) -> list[float]:
        """Return the lrs of the last step, which verl logs as ``actor/lr``."""
        return [float(lr) for lr in self._steps.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of verl's scheduler, and the statistics beside it."""
        statistics = {"epoch": self._schedule.last_epoch, "steps": self._steps.state_dict()}
        return {**self._schedule.state_dict(), STATE_KEY: statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both; from a checkpoint that was made without us, the statistics start anew."""
        statistics = state_dict.get(STATE_KEY)
        self._schedule.load_state_dict({name: value for name, value in state_dict.items() if name != STATE_KEY})
        # torch's schedulers carry along what they do not know. Where a part of the run was without us, what they carry
        # is of an earlier epoch, and says nothing about now.
        if statistics is not None and statistics["epoch"] == self._schedule.last_epoch:
            self._steps.load_state_dict(statistics["steps"])


def _steps_of(engine: Any) -> ScaledSteps | None:
    optimizer = getattr(engine, "optimizer", None)
    return optimizer.steps if isinstance(optimizer, MeasuredOptimizer) else None


def _with_attached_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_optimizer(self: Any, module: nn.Module) -> Optimizer:
        optimizer: Optimizer = original(self, module)
        if isinstance(optimizer, MeasuredOptimizer):
            unknown = [where for where in problems if ".fsdp." in where]
            if unknown:
                raise RuntimeError(
                    f"optim.optimizer={type(optimizer).__name__}: this version of verl is laid out differently "
                    f"({', '.join(unknown)}); use one of those tested, or optim.optimizer=AdamW"
                )
            if getattr(self, "ulysses_sequence_parallel_size", 1) > 1:
                raise RuntimeError(
                    "ulysses_sequence_parallel_size: parts of a sequence are not independent sub-batches; set it to 1, "
                    "or optim.optimizer=AdamW"
                )
            try:
                optimizer.attach(module)
            except RuntimeError as error:
                raise RuntimeError(
                    f"optim.optimizer={type(optimizer).__name__}: {error}. In verl: strategy=fsdp2 of actor or critic"
                ) from error
        return optimizer

    return build_optimizer


def _with_logged_lr(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_lr_scheduler(self: Any, optimizer: Optimizer) -> LRScheduler | LoggedSchedule:
        schedule: LRScheduler = original(self, optimizer)
        if isinstance(optimizer, MeasuredOptimizer) and optimizer.steps is not None:
            return LoggedSchedule(schedule, optimizer.steps)
        return schedule

    return build_lr_scheduler


def _with_open_micro_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def gradient_sync_context(self: Any, **kwargs: Any) -> Iterator[None]:
        # verl enters this around forward_step() and backward(). forward_step() learns the size of the micro-batch, and
        # enters the sub-batch here, so that it lasts until after backward().
        with ExitStack() as micro_batch, original(self, **kwargs):
            self._snr_micro_batch = micro_batch
            try:
                yield
            finally:
                self._snr_micro_batch = None

    return gradient_sync_context


def _with_sub_batch_size(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        steps, enclosing = _steps_of(self), getattr(self, "_snr_micro_batch", None)
        if steps is not None and not forward_only:
            if enclosing is None:
                raise RuntimeError(f"{type(self).__name__}: its backward pass is not where verl has it; use AdamW")
            trained = sum(bool(row.any()) for row in micro_batch["loss_mask"].unbind())
            enclosing.enter_context(steps.handle.sub_batch(size=max(trained, 1)))
        return original(self, micro_batch, loss_function, forward_only)

    return forward_step


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        outputs, steps = original(self, data, *args, **kwargs), _steps_of(self)
        if steps is not None and self.is_mp_src_rank_with_outputs():
            found = steps.scheduler.metrics()
            # verl chains the lists of all ranks.
            outputs["metrics"].update({f"snr/{k}": [v] for k, v in found.items() if math.isfinite(v)})
        return outputs

    return train_batch
