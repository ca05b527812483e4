"""Ceiling x factor for the length of one ``optimizer.step()``: for trainers that keep a scheduler of their own.

Here: what is the same in all of them. Their scheduler writes the ceiling, is stepped, logged and saved by them, and
does not notice; how a trainer is told of the true lr is its own module's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snr_optim._lr import LR, copies_of, lrs_of, unwrapped_optimizer, write_lrs
from snr_optim._torch import is_nested_step
from snr_optim.scheduler import SNRAdaptiveLR


def check_options(options: dict[str, Any]) -> None:
    """Refuse options for :class:`ScaledSteps` before there is a model.

    Raises:
        TypeError: ``schedule``, or an option that :class:`SNRAdaptiveLR` does not have.
        ValueError: what :class:`SNRAdaptiveLR` raises.
    """
    if "schedule" in options:
        raise TypeError(
            "schedule: the trainer's own scheduler is the ceiling; choose it there, by lr_scheduler_type or "
            "Trainer(optimizers=(optimizer, scheduler))"
        )
    try:
        SNRAdaptiveLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), **options)
    except TypeError as error:
        raise TypeError(f"options: expected those of SNRAdaptiveLR, smoothing, min_factor, ...; {error}") from None


class ScaledSteps:
    r"""Every ``optimizer.step()`` runs at the lr that it finds, times the factor of its own batch.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}, \qquad \eta_{\max,t} = \text{the lr that stands in the optimizer}

    A :class:`SNRAdaptiveLR` and its :meth:`~SNRAdaptiveLR.attach`, made here. Between steps the optimizer holds the
    ceiling, as if nobody else were there: schedulers that compute their next lr from the last one, checkpoints of
    optimizer and scheduler, and a run that goes on without us, all work as they do without.

    Args:
        optimizer: the one that does the step, or a wrapper of it.
        model: holds its parameters; wrapped, sharded and prepared already.
        options: those of :class:`SNRAdaptiveLR`, but ``schedule``.

    Attributes:
        scheduler: the :class:`SNRAdaptiveLR`; its ``get_last_lr()`` and ``metrics()`` are about the last step.
        handle: what its ``attach()`` returned.

    Raises:
        TypeError: what :class:`SNRAdaptiveLR` and its ``attach()`` raise.
        ValueError: the same.
        RuntimeError: the same.
        NotImplementedError: the same.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        >>> steps = ScaledSteps(optimizer, model)
        >>> for x in (3.0, 1.0):
        ...     (model(torch.tensor([[x]])).sum() / 2).backward()
        >>> optimizer.step()
        >>> steps.scheduler.get_last_lr(), optimizer.param_groups[0]["lr"]
        ([0.75], 1.0)
        >>> theirs.step()
        >>> theirs.get_last_lr()
        [0.5]
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        self.optimizer = optimizer = unwrapped_optimizer(optimizer)
        self._ceilings: list[LR] | None = None  # while it is not the ceilings that stand in the optimizer
        ceilings = self._lrs()
        self.scheduler = SNRAdaptiveLR(optimizer, **options)  # writes its first lr, as all schedulers do
        write_lrs(self.optimizer, ceilings)
        # The order of the hooks: the ceiling is taken, the batch is measured, the step is done, the ceiling is back.
        begin = optimizer.register_step_pre_hook(torch.compiler.disable(self._on_begin))  # type: ignore[no-untyped-call]
        try:
            self.handle = self.scheduler.attach(model)
        except BaseException:
            begin.remove()
            raise
        end = optimizer.register_step_post_hook(torch.compiler.disable(self._on_end))  # type: ignore[no-untyped-call]
        self._hooks = [begin, end]

    def remove(self) -> None:
        """Take all hooks off; steps run at the ceiling again."""
        self.hide()
        self.handle.remove()
        for hook in self._hooks:
            hook.remove()

    def show(self) -> None:
        """Put the lr of the last step into the optimizer until :meth:`hide`, for who looks for it there."""
        if self._ceilings is None:
            self._ceilings = self._lrs()
            write_lrs(self.optimizer, self.scheduler.get_last_lr())

    def hide(self) -> None:
        """Put the ceiling back; unless somebody has written a new one since, as training does when it starts again."""
        if self._ceilings is not None:
            now, ours = self._lrs(), self.scheduler.get_last_lr()
            pairs = zip(now, ours, strict=False)  # a group may have been added since, with its ceiling for an lr
            if all(isinstance(lr, Tensor) or lr == mine for lr, mine in pairs):  # of a tensor the host does not ask
                write_lrs(self.optimizer, self._ceilings + now[len(self._ceilings) :])
            self._ceilings = None

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler. Optimizer and their own scheduler are saved by whom they belong to."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit-exactly, after optimizer and their own scheduler were loaded.

        Raises:
            ValueError: what :meth:`SNRAdaptiveLR.load_state_dict` raises.
        """
        ceilings = self._lrs()
        self.scheduler.load_state_dict(state_dict)
        write_lrs(self.optimizer, ceilings)

    def _on_begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if is_nested_step(optimizer):
            return
        self.hide()  # a step that failed, or show()
        self._ceilings = self._lrs()
        self.scheduler.set_ceilings(self._ceilings)  # in charge from here on, with the factor of the last batch

    def _on_end(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not is_nested_step(optimizer):
            self.hide()

    def _lrs(self) -> list[LR]:
        return copies_of(lrs_of(self.optimizer))
