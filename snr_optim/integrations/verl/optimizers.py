"""verl's ``optim.optimizer``: optimizers whose steps are scaled by the signal share of their own batch.

Here: the classes that a config names, by ``optim.optimizer_impl=snr_optim.integrations.verl``. They measure gradients
once somebody calls ``attach(model)``, which ``engine.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from snr_optim.integrations._ceiling import ScaledSteps, check_options


class MeasuredOptimizer(torch.optim.Optimizer):
    """What both share: options, and no step before gradients are measured. Mix it in before the class that steps."""

    steps: ScaledSteps | None = None

    def __init__(self, params: Iterable[Tensor], *, snr: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self._snr = dict(snr or {})
        check_options(self._snr)
        self.register_step_pre_hook(self._expect_attached)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not hasattr(self, "_snr"):  # unpickled or copied: torch keeps no hooks, and we no options
            self._snr = {}
            self.register_step_pre_hook(self._expect_attached)

    def attach(self, model: nn.Module) -> ScaledSteps:
        """Measure the gradients of a model from now on.

        Args:
            model: the model, already wrapped and sharded.

        Raises:
            RuntimeError: the model is parallelised in a way that cannot be measured, or one is attached already.
        """
        if self.steps is not None:
            raise RuntimeError(f"{type(self).__name__}: attached already")
        self.steps = ScaledSteps(self, model, **self._snr)
        return self.steps

    def _expect_attached(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.steps is None:
            raise RuntimeError(
                f"{type(self).__name__}: nobody has called attach(model), so that nothing measures the gradients. "
                "verl's FSDP engine does with the plugin loaded: see `python -m snr_optim.integrations.verl check`"
            )


class SNRAdamW(MeasuredOptimizer, torch.optim.AdamW):
    r"""``torch.optim.AdamW`` that runs each step at its lr times the signal share of the gradient of its own batch.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}

    See :class:`~snr_optim.SNRAdaptiveLR`. The lr in the optimizer, which schedulers and checkpoints see, is the ceiling
    ``eta_max``.

    Args:
        params: parameters or parameter groups.
        snr: the options of :class:`~snr_optim.SNRAdaptiveLR`, except ``schedule``. In verl:
            ``optim.override_optimizer_config={snr: {min_factor: 0.05}}``.
        options: the options of AdamW.

    Raises:
        TypeError: an option that :class:`~snr_optim.SNRAdaptiveLR` does not have.
        RuntimeError: ``step()`` was called before :meth:`attach`.
    """


class SNRSGD(MeasuredOptimizer, torch.optim.SGD):
    """``torch.optim.SGD`` with steps that are scaled as in :class:`SNRAdamW`: the optimizer of the paper."""
