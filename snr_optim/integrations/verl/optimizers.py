"""verl's ``optim.optimizer``: optimizers whose steps are scaled by the signal share of their own batch.

Here: the classes that a config names, by ``optim.optimizer_impl=snr_optim.integrations.verl``. They measure once
somebody shows them the model, which ``engine.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from snr_optim.integrations.scaled_steps import ScaledSteps


class _Scaled(torch.optim.Optimizer):
    """What they share: options, and no step before the gradients are watched."""

    steps: ScaledSteps | None = None
    _options: dict[str, Any]

    def _expect_attached(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.steps is None:
            raise RuntimeError(
                f"{type(self).__name__}: nobody has called attach(model), so that nothing measures the gradients. "
                "verl's FSDP engine does with the plugin loaded: see `python -m snr_optim.integrations.verl check`"
            )

    def attach(self, model: nn.Module) -> ScaledSteps:
        """Measure the gradients of ``model``, wrapped and sharded already, from now on.

        Raises:
            RuntimeError: the model is parallelised in a way that cannot be measured, or one is attached already.
        """
        if self.steps is not None:
            raise RuntimeError(f"{type(self).__name__}: attached already")
        self.steps = ScaledSteps(self, model, **self._options)
        return self.steps


class SNRAdamW(torch.optim.AdamW, _Scaled):
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
        RuntimeError: at a step before :meth:`attach`.
    """

    def __init__(self, params: Iterable[Tensor], *, snr: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self._options = dict(snr or {})
        self.register_step_pre_hook(self._expect_attached)


class SNRSGD(torch.optim.SGD, _Scaled):
    """``torch.optim.SGD``, in the same way as :class:`SNRAdamW`: the step of the paper."""

    def __init__(self, params: Iterable[Tensor], *, snr: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(params, **options)
        self._options = dict(snr or {})
        self.register_step_pre_hook(self._expect_attached)
