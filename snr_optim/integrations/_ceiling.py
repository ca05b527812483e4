"""Ceiling x factor for the length of one ``optimizer.step()``: for trainers that keep a scheduler of their own.

Here: what all such trainers have in common. The trainer's scheduler writes the ceiling, the trainer steps, logs and
saves that scheduler, and it does not notice us. How a trainer learns the lr of the step belongs in its own folder.
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
        TypeError: ``schedule`` is among them, or an option that :class:`SNRAdaptiveLR` does not have.
        ValueError: :class:`SNRAdaptiveLR` refuses the value of an option.
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
    r"""Runs every ``optimizer.step()`` at the lr that it finds, times the factor of its own batch.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}, \qquad
        \eta_{\max,t} = \text{the lr in the optimizer before step } t

    It makes a :class:`SNRAdaptiveLR` and attaches it to the model. Between steps the optimizer holds the ceiling, as if
    nobody else were there. So three things work as they do without us: schedulers that compute their next lr from the
    last one, checkpoints of optimizer and scheduler, and a run that goes on without us.

    Args:
        optimizer: the optimizer that does the step, or a wrapper of it.
        model: the model whose parameters it moves, already wrapped, sharded and prepared.
        options: the options of :class:`SNRAdaptiveLR`, except ``schedule``.

    Attributes:
        scheduler: the :class:`SNRAdaptiveLR`; its ``get_last_lr()`` and ``metrics()`` describe the last step.
        handle: what its ``attach()`` returned.

    Raises:
        TypeError: :class:`SNRAdaptiveLR` or its ``attach()`` raised it.
        ValueError: likewise.
        RuntimeError: likewise.
        NotImplementedError: likewise.

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
        self.optimizer: Optimizer = unwrapped_optimizer(optimizer)
        self._ceilings: list[LR] | None = None  # kept here while the optimizer holds other lrs
        ceilings = self._current_lrs()
        self.scheduler = SNRAdaptiveLR(self.optimizer, **options)  # it writes its first lr, as all schedulers do
        write_lrs(self.optimizer, ceilings)
        # The order of the hooks: ours keeps the ceiling, attach() measures the batch and writes the lr, the optimizer
        # steps, and ours puts the ceiling back.
        before = torch.compiler.disable(self._on_begin)  # type: ignore[no-untyped-call]
        after = torch.compiler.disable(self._on_end)  # type: ignore[no-untyped-call]
        begin = self.optimizer.register_step_pre_hook(before)
        try:
            self.handle = self.scheduler.attach(model)
        except BaseException:
            begin.remove()
            raise
        self._hooks = [begin, self.optimizer.register_step_post_hook(after)]

    def remove(self) -> None:
        """Remove all hooks; steps run at the ceiling again."""
        self.restore_ceilings()
        self.handle.remove()
        for hook in self._hooks:
            hook.remove()

    def write_last_lrs(self) -> None:
        """Put the lrs of the last step into the optimizer, for a trainer to read, until :meth:`restore_ceilings`."""
        if self._ceilings is None:
            self._ceilings = self._current_lrs()
            write_lrs(self.optimizer, self.scheduler.get_last_lr())

    def restore_ceilings(self) -> None:
        """Put the ceilings back, unless somebody has written new ones since, as training does when it starts again."""
        if self._ceilings is not None:
            now, written = self._current_lrs(), self.scheduler.get_last_lr()
            pairs = zip(now, written, strict=False)  # a parameter group added since then has its ceiling for an lr
            if all(isinstance(lr, Tensor) or lr == last for lr, last in pairs):  # comparing a tensor would wait for it
                write_lrs(self.optimizer, self._ceilings + now[len(self._ceilings) :])
            self._ceilings = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of our scheduler. The trainer saves the optimizer and its own scheduler itself."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit-exactly, after the trainer has loaded the optimizer and its own scheduler.

        Raises:
            ValueError: :meth:`SNRAdaptiveLR.load_state_dict` raised it.
        """
        ceilings = self._current_lrs()
        self.scheduler.load_state_dict(state_dict)
        write_lrs(self.optimizer, ceilings)

    def _on_begin(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_nested_step(optimizer):
            return
        self.restore_ceilings()  # a step has failed, or write_last_lrs() was not undone
        self._ceilings = self._current_lrs()
        self.scheduler.set_ceilings(self._ceilings)  # from here on it is in charge, with the factor of the last batch

    def _on_end(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_nested_step(optimizer):
            self.restore_ceilings()

    def _current_lrs(self) -> list[LR]:
        return copies_of(lrs_of(self.optimizer))
