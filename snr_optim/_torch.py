"""What is read off torch's running program: which backward pass runs, within what, and on how many ranks.

Autograd tells no hook where a backward pass begins, and ``optimizer.step()`` does not tell who called it. Both can be
read off the running program, without a guess; everything that does so is here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

# The code of torch's own functions, taken when they are imported: others may put theirs around them later.
_RUNS_STEP_HOOKS = Optimizer.profile_hook_step(lambda: None).__code__  # one for all classes of optimizers
_BACKWARD_OF_FUNCTION = BackwardCFunction.apply.__code__
_STEP_OF_SCALER = GradScaler.step.__code__


def current_backward() -> int:
    """A number of its own for every run of the autograd engine; -1 outside of one."""
    task: int = torch._C._current_graph_task_id()
    return task


def accumulates_into(parameter: Tensor) -> bool:
    """Whether the running pass adds to the ``.grad`` of this leaf, as ``torch.autograd.grad`` does not.

    Both run the hooks of a leaf. To ask is refused for the leaves whose gradients ``torch.autograd.grad`` hands out.
    """
    with torch.enable_grad():
        node: Any = parameter.view_as(parameter).grad_fn
    try:
        torch._C._will_engine_execute_node(node.next_functions[0][0])
    except RuntimeError:
        return False
    return True


def leaves_of(output: Tensor) -> Iterator[Tensor]:
    """The tensors that a tensor's gradient goes to."""
    waiting: list[Any] = [output.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                yield node.variable
            waiting += [child for child, _ in node.next_functions]


def depends_on(output: Tensor, leaf: Tensor) -> bool:
    """Whether the leaf is in the graph behind a tensor."""
    return any(found is leaf for found in leaves_of(output))


def keeps_graph() -> bool:
    """Whether the running backward pass was called with ``retain_graph``: it may come again."""
    keeps: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return keeps


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call ``function`` when the running backward pass has left its gradients in ``.grad``.

    Data-parallel wrappers finish their reduction in callbacks too, which may be queued after this one: so it queues
    itself once more, and runs after them.
    """
    queue = Variable._execution_engine.queue_callback
    queue(lambda: queue(function))


def ensure_runs_last(handle: RemovableHandle) -> bool:
    """Whether a hook of a tensor runs after others' hooks of it, which may change the gradient; if not, from now on.

    Our own hooks, marked by ``changes_nothing``, may come after one another.
    """
    hooks: Any = handle.hooks_dict_ref()
    for number in reversed(hooks or {}):
        if number == handle.id:
            return True
        if not getattr(hooks[number], "changes_nothing", False):
            hooks[handle.id] = hooks.pop(handle.id)  # the engine goes by insertion, and not by move_to_end()
            return False
    return True  # it is not there any more


def is_nested_backward() -> bool:
    """Whether the running backward pass was started by the backward of a ``Function`` within another one.

    That is how reentrant checkpoints recompute, torch's own and those of others.
    """
    return next(_callers(_BACKWARD_OF_FUNCTION), None) is not None


def is_nested_step(optimizer: Optimizer) -> bool:
    """Whether a ``step()`` of this optimizer runs within another one of it, as when it calls ``super().step()``.

    Counts the frames of torch's wrapper that runs the hooks. The class's own ``step`` may be another function around
    it: the first ``torch.compile`` of a process puts one around ``SparseAdam.step``, through which our hooks run too.
    """
    return sum(frame.f_locals["args"][0] is optimizer for frame in _callers(_RUNS_STEP_HOOKS)) > 1


def loss_scale() -> Tensor | None:
    """The scale of the ``GradScaler`` whose ``step()`` is running, if one is, and is enabled."""
    frame = next(_callers(_STEP_OF_SCALER), None)
    scale: Tensor | None = None if frame is None else getattr(frame.f_locals["self"], "_scale", None)
    return scale


def _callers(code: CodeType) -> Iterator[FrameType]:
    """The frames on the stack that run ``code``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            yield frame
        frame = frame.f_back


def runs_several_processes() -> bool:
    """Whether ``torch.distributed`` runs more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_fully_shard(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to this module itself."""
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
