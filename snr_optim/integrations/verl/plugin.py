"""What verl loads by the entry point ``verl.plugins``: waits for what it imports, to register and to change.

verl says nothing of a plugin that fails, so this one says it itself.
"""

from __future__ import annotations

import logging
from typing import Any

from snr_optim.integrations.verl.engine import change_fsdp_engine
from snr_optim.integrations.verl.estimators import ESTIMATORS
from snr_optim.integrations.verl.replacing import guarded
from snr_optim.integrations.verl.trainers import change_ray_trainer, change_v1


def register_estimators(module: Any) -> None:
    """``verl.trainer.ppo.core_algos``."""
    for name, estimator in ESTIMATORS.items():
        module.register_adv_est(name)(estimator)


CHANGES = {
    "verl.trainer.ppo.core_algos": register_estimators,
    "verl.trainer.ppo.ray_trainer": change_ray_trainer,
    "verl.trainer.ppo.v1.trainer_base": change_v1,
    "verl.workers.engine.fsdp.transformer_impl": change_fsdp_engine,
}


def install() -> bool:
    """Wait for what CHANGES names; False, and a line in the log, without the package that does the waiting."""
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
