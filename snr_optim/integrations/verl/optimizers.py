"""verl's ``optim.optimizer``: optimizers whose steps are scaled by the signal share of their own batch.

Here: the classes that a config names, by ``optim.optimizer_impl=snr_optim.integrations.verl``. They measure once
somebody shows them the model, which ``engine.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from snr_optim.integrations._ceiling import ScaledSteps, check_options


class Measured(torch.optim.Optimizer):
    """What they share: options, and no step before the gradients are watched. Comes before the class that steps."""

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
        """Measure the gradients of ``model``, wrapped and sharded already, from now on.

        Raises:
            RuntimeError: the model is parallelised in a way that cannot be measured, or one is attached already.
        """
        if self.steps is not None:
            raise RuntimeError(f"{type(self).__name__}: attached already")
        self.steps = ScaledSteps(self, model, **self._snr)
        return self.steps

    def _expect_attached(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.steps is None:
            raise RuntimeError(
                f"{type(self).__name__}: nobody has called attach(model), so that nothing measures the gradients. "
                "verl's FSDP engine does with the plugin loaded: see `python -m snr_optim.integrations.verl check`"
            )


class SNRAdamW(Measured, torch.optim.AdamW):
    r"""``torch.optim.AdamW``, each step of which runs at its lr times the signal share of its own batch gradient.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}

    See :class:`~snr_optim.SNRAdaptiveLR`. The lr in the optimizer, and so that of schedulers and checkpoints, is the
    ceiling ``eta_max``.

    Args:
        params: parameters, or groups of them.
        snr: options of :class:`~snr_optim.SNRAdaptiveLR`, but ``schedule``: in verl
            ``optim.override_optimizer_config={snr: {min_factor: 0.05}}``.
        options: those of AdamW.

    Raises:
        TypeError: options that :class:`~snr_optim.SNRAdaptiveLR` does not have.
        RuntimeError: at a step before :meth:`attach`.
    """


class SNRSGD(Measured, torch.optim.SGD):
    """``torch.optim.SGD``, in the same way as :class:`SNRAdamW`: the step of the paper."""
