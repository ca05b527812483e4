"""Moments from gradient accumulation in one process: every micro-batch is a sub-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from snr_optim.moments import GradientMoments


class AccumulationSource:
    r"""Catches the squared norm of each micro-batch gradient on its way into ``.grad``.

    Micro-batch ``k`` adds ``h_k = c_k g_k`` to ``.grad``, ``c_k`` its share of the batch, so that ``.grad``
    ends as ``g_hat = sum_k c_k g_k``. Leaf hooks see ``h_k`` whole, once per backward, tied weights included,
    and no gradient is kept:

    .. math::
        \sum_k c_k \|g_k\|^2 = \sum_k \|h_k\|^2 / c_k

    The unit is the prompt: put all sequences of a prompt into the same micro-batch.

    Args:
        model: its parameters that require grad now are watched; no change to model or loss.

    Raises:
        ValueError: the model has no parameter that requires grad.
        RuntimeError: parameters are sharded (DTensor), or several processes share the gradient, where
            ``.grad`` and the hooks would speak of different batches.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> source = AccumulationSource(model)
        >>> for x in (3.0, 1.0):
        ...     with source.sub_batch(share=1 / 2):
        ...         (model(torch.tensor([[x]])).sum() / 2).backward()
        >>> source.moments()
        GradientMoments(sq_norm_of_mean=tensor(4.), mean_of_sq_norms=tensor(5.), num=2)
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError("model: expected at least one parameter with requires_grad")
        if any(hasattr(p, "placements") for p in self._parameters):
            raise RuntimeError("model: sharded (DTensor) parameters are not supported by AccumulationSource")
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise RuntimeError("AccumulationSource measures one process, but torch.distributed runs several")
        self._recording: dict[int, Tensor] | None = None  # parameter -> its squared norm
        self._start_batch()
        self._handles: list[RemovableHandle] = [
            p.register_hook(partial(self._record, i))  # type: ignore[no-untyped-call]
            for i, p in enumerate(self._parameters)
        ]

    def _start_batch(self) -> None:
        self._scaled_sq_norms: list[Tensor] = []
        self._shares: list[float] = []
        self._left: list[tuple[Tensor, int] | None] = []  # how the last sub-batch left every .grad

    @contextmanager
    def sub_batch(self, share: float) -> Iterator[None]:
        """The one backward pass of one micro-batch.

        Args:
            share: ``c_k``, this micro-batch's share of the batch, by which its mean loss is scaled. Shares of a
                batch sum to 1.

        Raises:
            ValueError: ``share`` is not in ``(0, 1]``.
            RuntimeError: sub-batches are nested; a parameter gets a gradient twice (two backward passes, or reentrant
                checkpointing of a shared module); no gradient reached the parameters; ``.grad`` was not empty before
                the first sub-batch (zero_grad forgotten) or was changed since the last. The batch is dropped.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a number in (0, 1], got {share!r}")
        if self._recording is not None:
            raise RuntimeError("sub_batch: the previous sub-batch is still open")
        self._check_grad()
        self._recording = {}
        try:
            yield
            if not self._recording:
                raise RuntimeError("sub_batch: no gradient reached the model's parameters; was backward() called?")
            self._scaled_sq_norms.append(torch.stack(list(self._recording.values())).sum() / share)
            self._shares.append(share)
            self._left = self._grad_versions()
        except BaseException:
            self._start_batch()
            raise
        finally:
            self._recording = None

    @torch.no_grad()
    def moments(self) -> GradientMoments:
        """Moments of the batch accumulated since the last call; starts the next batch.

        Call it after the last backward and before anything changes ``.grad``: clipping, unscaling, the
        optimizer, ``zero_grad``. Waits for no device.

        Raises:
            RuntimeError: no sub-batch was recorded, the shares do not sum to 1, or ``.grad`` was changed since the
                last sub-batch. The batch is dropped.
        """
        sq_norms, shares = self._scaled_sq_norms, self._shares
        changed = bool(shares) and self._grad_changed()
        self._start_batch()
        if not shares:
            raise RuntimeError("moments: no sub-batch was recorded")
        if changed:
            raise RuntimeError(_CHANGED)
        if abs(sum(shares) - 1) > 1e-6:
            raise RuntimeError(f"moments: the shares of the sub-batches sum to {sum(shares):.6g}, not 1")
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        sq_norm_of_mean = torch.stack([_sq_norm(g) for g in gradients]).sum()
        return GradientMoments(sq_norm_of_mean, torch.stack(sq_norms).sum(), len(shares))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _grad_versions(self) -> list[tuple[Tensor, int] | None]:
        """Every ``.grad`` and its version: tells a change without reading a value (not one through ``.data``)."""
        return [None if p.grad is None else (p.grad, p.grad._version) for p in self._parameters]

    def _grad_changed(self) -> bool:
        return any(
            now is not before and (now is None or before is None or now[0] is not before[0] or now[1] != before[1])
            for now, before in zip(self._grad_versions(), self._left, strict=True)
        )

    def _check_grad(self) -> None:
        """``.grad`` holds the recorded sub-batches and nothing else."""
        if self._shares:
            if self._grad_changed():
                self._start_batch()
                raise RuntimeError(_CHANGED)
            return
        rest = [p.grad for p in self._parameters if p.grad is not None and p.grad.device.type == "cpu"]
        if any(bool(gradient.any()) for gradient in rest):  # on an accelerator this would wait for it
            raise RuntimeError("sub_batch: .grad is not empty before the first sub-batch; was zero_grad() forgotten?")

    def _record(self, index: int, gradient: Tensor) -> None:
        if self._recording is None:
            return
        if index in self._recording:  # ||a + b||^2 is not ||a||^2 + ||b||^2
            raise RuntimeError("sub_batch: a parameter got a gradient twice; expected one backward() per sub_batch")
        self._recording[index] = _sq_norm(gradient)


_CHANGED = (
    ".grad was changed since the last sub-batch, by clipping, unscaling, zero_grad() or a backward() outside "
    "sub_batch; call moments() right after the last sub-batch"
)


def _sq_norm(gradient: Tensor) -> Tensor:
    exact = torch.promote_types(gradient.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=exact)
    return norm.square()
