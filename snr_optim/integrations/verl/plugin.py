"""What verl loads by the entry point ``verl.plugins``.

Here: which modules of verl are changed when verl imports them. verl does not say when a plugin fails, so this one logs
it itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

from snr_optim.integrations.verl.engine import change_fsdp_engine
from snr_optim.integrations.verl.estimators import ESTIMATORS
from snr_optim.integrations.verl.replacing import guarded
from snr_optim.integrations.verl.trainers import change_ray_trainer, change_v1


def register_estimators(module: ModuleType) -> None:
    """Register the estimators in ``verl.trainer.ppo.core_algos``."""
    for name, estimator in ESTIMATORS.items():
        module.register_adv_est(name)(estimator)


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "verl.trainer.ppo.core_algos": register_estimators,
    "verl.trainer.ppo.ray_trainer": change_ray_trainer,
    "verl.trainer.ppo.v1.trainer_base": change_v1,
    "verl.workers.engine.fsdp.transformer_impl": change_fsdp_engine,
}


def install() -> bool:
    """Wait for the modules that CHANGES names. Without wrapt, which does the waiting, log a line and return False."""
    try:
        import wrapt
    except ImportError:
        logging.getLogger("snr_optim").warning(
            "snr-optim: its verl plugin needs wrapt, which is not installed; algorithm.adv_estimator=grad_weighted "
            "will be unknown. `pip install wrapt` brings it"
        )
        return False
    for name, change in CHANGES.items():
        wrapt.register_post_import_hook(guarded(change), name)
    return True


INSTALLED = install()
