"""What verl's trainers have to hand to the estimators, and what they have to keep for them.

Here: replacements for functions and methods of ``verl.trainer.ppo``. Each of them does as before unless
``algorithm.adv_estimator`` names an estimator of this library.

- ``compute_advantage`` gives an estimator the batch, which verl passes to two estimators of its own alone.
- The V1 trainer asks its actor for ``sum_pi_squared`` beside the old log-probs, and hands it to ``compute_advantage``.
- Checkpoints keep what the baseline has learned.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from snr_optim.integrations._checkpoint import BASELINE_FILE, load_baseline, save_baseline
from snr_optim.integrations.verl.estimators import ESTIMATORS, baseline_of, configured_baseline
from snr_optim.integrations.verl.replacing import replace

FLAG = "calculate_sum_pi_squared"  # in verl's config of the actor, and in what the trainer sends to it
WAY_OUT = "Resume with the algorithm.snr_optim that it was made with, or delete the file to let the baseline begin anew"

# Tensors that the V1 trainer reads for our estimators, while it calls compute_advantage without them.
_extra_tensors: ContextVar[dict[str, Tensor] | None] = ContextVar("extra_tensors", default=None)


def change_ray_trainer(module: ModuleType) -> None:
    """Change ``verl.trainer.ppo.ray_trainer``: the function that all trainers call, and the legacy trainer."""
    replace(
        module,
        "compute_advantage",
        lambda original: _with_batch(module, original),
        ["data", "adv_estimator", "config"],
    )
    _change_checkpoints(module.RayPPOTrainer)


def change_v1(module: ModuleType) -> None:
    """Change ``verl.trainer.ppo.v1.trainer_base``."""
    replace(module.PPOTrainer, "_compute_old_log_prob", _with_sum_pi_squared, ["self", "batch", "metrics"])
    replace(
        module.PPOTrainer,
        "_compute_advantage",
        lambda original: _with_extra_tensors(module, original),
        ["batch", "metrics"],
    )
    _change_checkpoints(module.PPOTrainer)


def own_estimator(config: Any) -> str | None:
    """Return the name of the estimator in verl's whole config if it is one of this library."""
    name = getattr(config.algorithm.adv_estimator, "value", config.algorithm.adv_estimator)
    return name if name in ESTIMATORS else None


def _with_batch(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def compute_advantage(*args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = signature.bind(*args, **kwargs).arguments
        data, name, config = given["data"], given["adv_estimator"], given.get("config")
        estimator = ESTIMATORS.get(getattr(name, "value", name))
        if estimator is None:
            return original(*args, **kwargs)
        if "response_mask" not in data.batch:
            data.batch["response_mask"] = module.compute_response_mask(data)
        batch = {**dict(data.batch.items()), **(_extra_tensors.get() or {})}
        data.batch["advantages"], data.batch["returns"] = estimator(
            token_level_rewards=batch["token_level_rewards"],
            response_mask=batch["response_mask"],
            index=data.non_tensor_batch.get("uid"),
            config=config,
            batch=batch,
        )
        return data

    return compute_advantage


def _asks_for_weights(config: Any) -> bool:
    """Whether the V1 trainer computes old log-probs, and has to ask for ``sum_pi_squared`` beside them."""
    correction = config.algorithm.get("rollout_correction") or {}
    return (
        own_estimator(config) is not None
        and bool(config.actor_rollout_ref.actor.get(FLAG))
        and not correction.get("bypass_mode", False)
    )


def _with_sum_pi_squared(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_old_log_prob(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if not _asks_for_weights(self.config):
            return original(self, batch, metrics)
        batch.extra_info[FLAG] = True
        result = original(self, batch, metrics)
        for meta in (batch, result):  # the passes that follow must not compute it again
            meta.extra_info.pop(FLAG, None)
        return result

    return compute_old_log_prob


def _with_extra_tensors(module: ModuleType, original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        name = own_estimator(self.config)
        if name is None:
            return original(self, batch, metrics)
        _refuse_split_sessions(name, batch.keys)
        extra = {}
        if _asks_for_weights(self.config):
            stored = module.tq.kv_batch_get(
                keys=batch.keys,
                partition_id=batch.partition_id,
                select_fields=["sum_pi_squared", "response_mask"],
            )
            rows = module.response_from_nested(stored["sum_pi_squared"], stored["response_mask"])
            extra["sum_pi_squared"] = torch.nested.to_padded_tensor(rows, 0.0)
        token = _extra_tensors.set(extra)
        try:
            result = original(self, batch, metrics)
        finally:
            _extra_tensors.reset(token)
        baseline = baseline_of(name)
        if baseline is not None:
            found = {f"baseline/{key}": value for key, value in baseline.metrics().items()}
            metrics.update({key: value for key, value in found.items() if math.isfinite(value)})
        return result

    return compute_advantage


def _refuse_split_sessions(name: str, keys: Sequence[str]) -> None:
    """Keys are ``{uid}_{session}_{index}``; the rows of one session are not independent draws."""
    sessions = [key.rsplit("_", 1)[0] for key in keys]
    if len(set(sessions)) < len(sessions):
        raise NotImplementedError(
            f"{name}: an agent loop returned several outputs for one session, which are not independent draws of the "
            "policy. Let it return one (whole) output, or use another estimator"
        )


# -- checkpoints ----------------------------------------------------------------------------------------------


def _change_checkpoints(trainer: type) -> None:
    replace(trainer, "_save_checkpoint", _saving, ["self"])
    replace(trainer, "_load_checkpoint", _loading, ["self"])


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = own_estimator(self.config)
        baseline = None if name is None else baseline_of(name)
        if baseline is not None:  # before verl says that the checkpoint is complete
            folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            save_baseline(baseline, os.path.join(folder, BASELINE_FILE))
        return original(self, *args, **kwargs)

    return save_checkpoint


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        name, trainer = own_estimator(self.config), self.config.trainer
        if name is None or not self.global_steps:
            return result
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        if trainer.resume_mode == "resume_path":
            folder = trainer.resume_from_path
        path = os.path.join(folder, BASELINE_FILE)
        if os.path.isfile(path):  # a checkpoint made with another estimator has none: the baseline begins anew
            load_baseline(configured_baseline(name, self.config.algorithm), path, WAY_OUT)
        return result

    return load_checkpoint
