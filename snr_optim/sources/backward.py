"""What a hook can ask about the code that called it: which backward pass, nested or not, scaled by whom.

Autograd tells no hook where a backward pass begins, and ``optimizer.step()`` not who stands behind it. Both can be read
off the running program, without a guess; everything that does so is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.autograd import Variable
from torch.utils.checkpoint import CheckpointFunction


def current_backward() -> int:
    """A number of its own for every run of the autograd engine; -1 outside of one."""
    task: int = torch._C._current_graph_task_id()
    return task


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward pass has left its gradients in ``.grad``.

    Data-parallel wrappers finish their reduction in callbacks too, which may be queued after this one: so it queues
    itself once more, and runs after them.
    """
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


def in_reentrant_checkpoint() -> bool:
    """Whether the running backward pass is one that ``checkpoint(use_reentrant=True)`` runs within another."""
    return _caller(CheckpointFunction.backward.__code__) is not None


def loss_scale() -> Tensor | None:
    """The scale of the ``GradScaler`` whose ``step()`` is running, if one is."""
    frame = _caller(GradScaler.step.__code__)
    scale: Tensor | None = None if frame is None else frame.f_locals["self"]._scale
    return scale


def _caller(code: CodeType) -> FrameType | None:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame
