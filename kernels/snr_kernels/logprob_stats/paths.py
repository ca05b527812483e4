"""Which of the op's two paths computes, for the op itself and for those that are built of its passes."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from snr_kernels.dispatch import Impl, runs_triton
from snr_kernels.logprob_stats import _torch
from snr_kernels.logprob_stats._torch import FAR_BELOW as FAR_BELOW


def path_of(impl: Impl, logits: Tensor) -> ModuleType:
    """``_torch``, or ``_triton``, which is imported when it first computes.

    Raises:
        ValueError: as :func:`~snr_kernels.dispatch.runs_triton`.
    """
    if not runs_triton(impl, logits):
        return _torch
    from snr_kernels.logprob_stats import _triton

    return _triton
