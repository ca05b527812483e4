"""What the trainers of verl have to pass on for ``estimators.py`` to work, and to keep for it.

Here: replacements for functions and methods of ``verl.trainer.ppo``, each of which does as before unless
``algorithm.adv_estimator`` is ours.

- ``compute_advantage`` gives an estimator the batch (verl passes it to two estimators of its own alone).
- The V1 trainer asks its actor for ``sum_pi_squared`` beside the old log-probs, and hands it to ``compute_advantage``.
- Checkpoints keep what the baseline has learned.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from snr_optim.integrations.verl.estimators import ESTIMATORS, baseline_of, restore
from snr_optim.integrations.verl.replacing import replace

FILE = "snr_optim_baseline.pt"
FLAG = "calculate_sum_pi_squared"  # in verl's config of the actor, and in what it sends to it

_beside: ContextVar[dict[str, Tensor] | None] = ContextVar("beside", default=None)  # the batch of compute_advantage


def change_ray_trainer(module: Any) -> None:
    """``verl.trainer.ppo.ray_trainer``: what all trainers call, and the legacy one."""
    replace(
        module,
        "compute_advantage",
        lambda original: _with_batch(module, original),
        ["data", "adv_estimator", "config"],
    )
    _change_checkpoints(module.RayPPOTrainer)


def change_v1(module: Any) -> None:
    """``verl.trainer.ppo.v1.trainer_base``."""
    replace(module.PPOTrainer, "_compute_old_log_prob", _with_sum_pi_squared, ["self", "batch", "metrics"])
    replace(
        module.PPOTrainer, "_compute_advantage", lambda original: _with_rows(module, original), ["batch", "metrics"]
    )
    _change_checkpoints(module.PPOTrainer)


def ours(config: Any) -> str | None:
    """The name of the estimator in verl's config, if it is one of ours."""
    name = getattr(config.algorithm.adv_estimator, "value", config.algorithm.adv_estimator)
    return name if name in ESTIMATORS else None


def _with_batch(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def compute_advantage(*args: Any, **kwargs: Any) -> Any:
        given: dict[str, Any] = signature.bind(*args, **kwargs).arguments
        data, name, config = given["data"], given["adv_estimator"], given.get("config")
        estimator = ESTIMATORS.get(getattr(name, "value", name))
        if estimator is None:
            return original(*args, **kwargs)
        if "response_mask" not in data.batch:
            data.batch["response_mask"] = module.compute_response_mask(data)
        batch = {**dict(data.batch.items()), **(_beside.get() or {})}
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
    """Whether the V1 trainer computes old log-probs, and ``sum_pi_squared`` beside them."""
    correction = config.algorithm.get("rollout_correction") or {}
    return (
        ours(config) is not None
        and bool(config.actor_rollout_ref.actor.get(FLAG))
        and not correction.get("bypass_mode", False)
    )


def _with_sum_pi_squared(original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_old_log_prob(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        if not _asks_for_weights(self.config):
            return original(self, batch, metrics)
        batch.extra_info[FLAG] = True
        result = original(self, batch, metrics)
        for one in (batch, result):  # not in the passes that follow
            one.extra_info.pop(FLAG, None)
        return result

    return compute_old_log_prob


def _with_rows(module: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def compute_advantage(self: Any, batch: Any, metrics: dict[str, Any]) -> Any:
        name = ours(self.config)
        if name is None:
            return original(self, batch, metrics)
        _refuse_split_sessions(name, batch.keys)
        beside = {}
        if _asks_for_weights(self.config):
            of_tokens = module.tq.kv_batch_get(
                keys=batch.keys,
                partition_id=batch.partition_id,
                select_fields=["sum_pi_squared", "response_mask"],
            )
            mine = module.response_from_nested(of_tokens["sum_pi_squared"], of_tokens["response_mask"])
            beside["sum_pi_squared"] = torch.nested.to_padded_tensor(mine, 0.0)
        token = _beside.set(beside)
        try:
            result = original(self, batch, metrics)
        finally:
            _beside.reset(token)
        learned = baseline_of(name)
        if learned is not None:
            found = {f"baseline/{key}": value for key, value in learned.metrics().items()}
            metrics.update({key: value for key, value in found.items() if math.isfinite(value)})
        return result

    return compute_advantage


def _refuse_split_sessions(name: str, keys: list[str]) -> None:
    """Keys are ``{uid}_{session}_{index}``; rows of one session are no independent draws."""
    sessions = [key.rsplit("_", 1)[0] for key in keys]
    if len(set(sessions)) < len(sessions):
        raise NotImplementedError(
            f"{name}: an agent loop returned several outputs for one session, which are no independent draws of the "
            "policy. Let it return one (whole) output, or use another estimator"
        )


# -- checkpoints ----------------------------------------------------------------------------------------------


def _change_checkpoints(trainer: Any) -> None:
    replace(trainer, "_save_checkpoint", _saving, ["self"])
    replace(trainer, "_load_checkpoint", _loading, ["self"])


def _saving(original: Callable[..., Any]) -> Callable[..., Any]:
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = ours(self.config)
        learned = None if name is None else baseline_of(name)
        if learned is not None:  # before verl says that the checkpoint is complete
            folder = os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")
            os.makedirs(folder, exist_ok=True)
            torch.save(learned.state_dict(), os.path.join(folder, FILE))
        return original(self, *args, **kwargs)

    return save_checkpoint


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        name, trainer = ours(self.config), self.config.trainer
        if name is None or not self.global_steps:
            return result
        folder = os.path.join(trainer.default_local_dir, f"global_step_{self.global_steps}")
        if trainer.resume_mode == "resume_path":
            folder = trainer.resume_from_path
        path = os.path.join(folder, FILE)
        if os.path.isfile(path):  # a checkpoint made with another estimator has none: the baseline begins anew
            try:
                restore(name, self.config.algorithm, torch.load(path, weights_only=True))
            except ValueError as error:
                raise ValueError(
                    f"{path}: {error}. Resume with the algorithm.snr_optim that it was made with, or delete the file "
                    "to let the baseline begin anew"
                ) from error
        return result

    return load_checkpoint
