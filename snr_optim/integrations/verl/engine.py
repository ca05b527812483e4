"""The optimizers of ``optimizers.py`` in verl's FSDP engine: gradients measured, lr and metrics logged, state saved.

Here: replacements for methods of ``FSDPEngine``, each of which does as before unless ``optim.optimizer`` is ours.

Every micro-batch of every rank is a sub-batch, seen whole before it is reduce-scattered, whether the engine defers the
reduction or not. Its size is its number of sequences, padding not counted: losses are sums over them, divided by
numbers of the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from snr_optim.integrations._ceiling import ScaledSteps
from snr_optim.integrations.verl.optimizers import Measured
from snr_optim.integrations.verl.replacing import problems, replace


def change_fsdp_engine(module: Any) -> None:
    """``verl.workers.engine.fsdp.transformer_impl``."""
    engine = module.FSDPEngine
    replace(engine, "_build_optimizer", _attaching, ["self", "module"])
    replace(engine, "_build_lr_scheduler", _telling_the_lr, ["self", "optimizer"])
    replace(engine, "_gradient_sync_context", _around_backward, ["self", "is_last_micro_batch"])
    replace(module.FSDPEngineWithLMHead, "forward_step", _with_size, ["self", "micro_batch", "forward_only"])
    replace(engine, "train_batch", _with_metrics, ["self", "data"])


KEY = "snr_optim"  # in the state of verl's scheduler


class Ceiling:
    """verl's lr scheduler, which goes on scheduling the ceiling, and what is said of it: the lr of the last step."""

    def __init__(self, schedule: Any, steps: ScaledSteps) -> None:
        self._schedule, self._steps = schedule, steps

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)  # before __init__, as when it is copied
        return getattr(self._schedule, name)

    def get_last_lr(self) -> list[float]:
        """Of the last step, as verl logs it in ``actor/lr``."""
        return [float(lr) for lr in self._steps.scheduler.get_last_lr()]

    def state_dict(self) -> dict[str, Any]:
        """Theirs, and the statistics beside it."""
        ours = {"epoch": self._schedule.last_epoch, "steps": self._steps.state_dict()}
        return {**self._schedule.state_dict(), KEY: ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A checkpoint that was made without us starts the statistics anew."""
        ours = state_dict.get(KEY)
        self._schedule.load_state_dict({name: value for name, value in state_dict.items() if name != KEY})
        # torch's schedulers carry along what they do not know: of an earlier part of the run it says nothing.
        if ours is not None and ours["epoch"] == self._schedule.last_epoch:
            self._steps.load_state_dict(ours["steps"])


def _steps_of(engine: Any) -> ScaledSteps | None:
    optimizer = getattr(engine, "optimizer", None)
    return optimizer.steps if isinstance(optimizer, Measured) else None


def _attaching(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_optimizer(self: Any, module: Any) -> Any:
        optimizer = original(self, module)
        if isinstance(optimizer, Measured):
            unknown = [where for where in problems if ".fsdp." in where]
            if unknown:
                raise RuntimeError(
                    f"optim.optimizer={type(optimizer).__name__}: this version of verl is laid out differently "
                    f"({', '.join(unknown)}); use one of those tested, or optim.optimizer=AdamW"
                )
            if getattr(self, "ulysses_sequence_parallel_size", 1) > 1:
                raise RuntimeError(
                    "ulysses_sequence_parallel_size: parts of a sequence are no independent sub-batches; set it to 1, "
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


def _telling_the_lr(original: Callable[..., Any]) -> Callable[..., Any]:
    def build_lr_scheduler(self: Any, optimizer: Any) -> Any:
        schedule = original(self, optimizer)
        if isinstance(optimizer, Measured) and optimizer.steps is not None:
            return Ceiling(schedule, optimizer.steps)
        return schedule

    return build_lr_scheduler


def _around_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def gradient_sync_context(self: Any, **kwargs: Any) -> Iterator[None]:
        # verl enters this around forward_step and backward(). The first knows the size, and opens the sub-batch here.
        with ExitStack() as micro_batch, original(self, **kwargs):
            self._snr_micro_batch = micro_batch
            try:
                yield
            finally:
                self._snr_micro_batch = None

    return gradient_sync_context


def _with_size(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward_step(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        steps, around = _steps_of(self), getattr(self, "_snr_micro_batch", None)
        if steps is not None and not forward_only:
            if around is None:
                raise RuntimeError(f"{type(self).__name__}: its backward pass is not where verl has it; use AdamW")
            trained = sum(bool(row.any()) for row in micro_batch["loss_mask"].unbind())
            around.enter_context(steps.handle.sub_batch(size=max(trained, 1)))
        return original(self, micro_batch, loss_function, forward_only)

    return forward_step


def _with_metrics(original: Callable[..., Any]) -> Callable[..., Any]:
    def train_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        outputs, steps = original(self, data, *args, **kwargs), _steps_of(self)
        if steps is not None and self.is_mp_src_rank_with_outputs():
            found = steps.scheduler.metrics()
            # A list for each rank: verl chains them.
            outputs["metrics"].update({f"snr/{k}": [v] for k, v in found.items() if math.isfinite(v)})
        return outputs

    return train_batch
