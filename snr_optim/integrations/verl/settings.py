"""Which settings of verl cannot work with this library, and which bias the gradient.

Here: two tables, and the functions that read them. They read a config and do not import verl.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snr_optim.integrations._unbiased import MISSING, UNCLIPPED, Setting, findings, one_of
from snr_optim.integrations.verl.estimators import ESTIMATORS, OPTIONS

ACTOR, ROLLOUT, CORRECTION = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm.rollout_correction"


def has_our_optimizer(config: Mapping[str, Any], role: str = ACTOR) -> bool:
    implementation, name = (_value_of(config, f"{role}.optim.{each}") for each in ("optimizer_impl", "optimizer"))
    return str(implementation).startswith("snr_optim.") or name in ("SNRAdamW", "SNRSGD")


def _needs_sum_pi_squared(config: Mapping[str, Any]) -> bool:
    options = _value_of(config, f"algorithm.{OPTIONS}")
    kind = "logit" if options in (MISSING, None) else options.get("weights", "logit")
    return _value_of(config, "algorithm.adv_estimator") in ESTIMATORS and kind == "logit"


REQUIRED = [
    Setting(
        f"{ACTOR}.calculate_sum_pi_squared",
        lambda value, config: value or not _needs_sum_pi_squared(config),
        "leaves the estimator without gradient norms",
        f"{ACTOR}.calculate_sum_pi_squared=True",
    ),
    Setting(
        "actor_rollout_ref.model.use_fused_kernels",
        lambda value, config: not value or not _needs_sum_pi_squared(config),
        "cannot compute sum_pi_squared, which verl refuses",
        "actor_rollout_ref.model.use_fused_kernels=False",
    ),
    Setting(
        f"{CORRECTION}.bypass_mode",
        lambda value, config: not value or not _needs_sum_pi_squared(config),
        "skips the pass that computes sum_pi_squared",
        f"{CORRECTION}.bypass_mode=False",
    ),
    Setting(
        f"{ACTOR}.strategy",
        lambda value, config: value == "fsdp2" or not has_our_optimizer(config),
        "chooses an engine whose gradients cannot be measured",
        f"{ACTOR}.strategy=fsdp2",
    ),
    Setting(
        "critic.strategy",
        lambda value, config: value == "fsdp2" or not has_our_optimizer(config, "critic"),
        "chooses an engine whose gradients cannot be measured",
        "critic.strategy=fsdp2",
    ),
    Setting(
        f"{ROLLOUT}.n",
        lambda value, config: value > 1 or _value_of(config, "algorithm.adv_estimator") != "oblr_po",
        "leaves no other output of the prompt to compare with",
        f"{ROLLOUT}.n=8, or algorithm.adv_estimator=grad_weighted",
    ),
]
REQUIRED += [
    Setting(
        name,
        lambda value, config: value in (1, None) or not has_our_optimizer(config),
        "splits sequences over ranks, whose gradients are then not independent sub-batches",
        f"{name}=1",
    )
    for name in (f"{ACTOR}.fsdp_config.ulysses_sequence_parallel_size", f"{ACTOR}.ulysses_sequence_parallel_size")
]

SETTINGS = [
    Setting(
        f"{ACTOR}.loss_agg_mode",
        lambda value, config: (
            value in ("seq-mean-token-sum", "token-sum")
            or (value == "seq-mean-token-sum-norm" and _value_of(config, f"{ACTOR}.loss_scale_factor") is not None)
        ),
        "divides by lengths of outputs, so that the weight of an output depends on that output, or on others",
        f"{ACTOR}.loss_agg_mode=seq-mean-token-sum",
    ),
    Setting(
        f"{ACTOR}.ppo_mini_batch_size",
        lambda value, config: value >= _value_of(config, "data.train_batch_size"),
        "makes several optimizer steps on one batch: all but the first are off-policy, with clipped ratios",
        f"{ACTOR}.ppo_mini_batch_size to data.train_batch_size",
    ),
    Setting(
        f"{ACTOR}.ppo_epochs",
        one_of(1),
        "uses outputs again, after the policy has seen them, with clipped ratios",
        f"{ACTOR}.ppo_epochs=1",
    ),
    Setting(
        f"{ACTOR}.policy_loss.loss_mode",
        one_of("vanilla"),
        "is another loss than the policy gradient",
        f"{ACTOR}.policy_loss.loss_mode=vanilla",
    ),
    Setting(f"{ACTOR}.use_kl_loss", one_of(False), "adds a KL penalty to the objective", f"{ACTOR}.use_kl_loss=False"),
    Setting(f"{ACTOR}.entropy_coeff", one_of(0, None), "adds the entropy to the objective", f"{ACTOR}.entropy_coeff=0"),
    Setting(
        f"{ACTOR}.optim.clip_grad",
        lambda value, config: value is None or value >= UNCLIPPED,
        "clips the gradient, and the more the noisier it is",
        f"{ACTOR}.optim.clip_grad=1e9",
    ),
    Setting(
        "algorithm.use_kl_in_reward",
        one_of(False),
        "adds a KL penalty to the objective",
        "algorithm.use_kl_in_reward=False",
    ),
    Setting(
        "algorithm.filter_groups.enable",
        one_of(False, None),
        "drops groups because of their rewards",
        "algorithm.filter_groups.enable=False",
    ),
    Setting(
        "algorithm.use_pf_ppo",
        one_of(False, None),
        "draws outputs again, by their rewards",
        "algorithm.use_pf_ppo=False",
    ),
    Setting(
        f"algorithm.{OPTIONS}.leave_one_out",
        one_of(True),
        "puts each output into its own baseline",
        f"algorithm.{OPTIONS}.leave_one_out=true",
    ),
    Setting(
        f"{CORRECTION}.bypass_mode",
        one_of(False, None),
        "multiplies by clipped ratios to the policy that sampled",
        f"{CORRECTION}.bypass_mode=False",
    ),
    Setting("distillation.enabled", one_of(False, None), "adds a distillation loss", "distillation.enabled=False"),
    Setting(
        f"{ROLLOUT}.do_sample", one_of(True), "takes the likeliest token instead of a draw", f"{ROLLOUT}.do_sample=True"
    ),
    Setting(
        f"{CORRECTION}.rollout_rs",
        one_of(None),
        "drops outputs whose log-probs differ between rollout and training",
        f"{CORRECTION}.rollout_rs=null",
    ),
    Setting(
        f"{CORRECTION}.rollout_is",
        one_of(None),
        "truncates the ratios of rollout and training",
        f"{CORRECTION}.rollout_is=null, or accept a small bias",
    ),
    Setting(
        "trainer.v1.trainer_mode",
        one_of("sync"),
        "trains on outputs of earlier policies",
        "trainer.v1.trainer_mode=sync",
    ),
    Setting(
        f"{ROLLOUT}.temperature",
        one_of(1),
        "samples from, and trains, a policy other than the model's own",
        f"{ROLLOUT}.temperature=1.0",
    ),
    Setting(
        f"{ROLLOUT}.top_p",
        one_of(1),
        "never samples unlikely tokens, which the gradient counts on",
        f"{ROLLOUT}.top_p=1.0",
    ),
    Setting(
        f"{ROLLOUT}.top_k",
        one_of(-1, 0, None),
        "never samples unlikely tokens, which the gradient counts on",
        f"{ROLLOUT}.top_k=-1",
    ),
]


def check_required(config: Mapping[str, Any]) -> list[str]:
    """Name every setting of a whole verl config with which our estimators or optimizers cannot work.

    Args:
        config: what verl's ``main_ppo`` is given; settings that it does not have are passed over.

    Returns:
        A sentence for each such setting: its name and value, what is wrong with it, and what to set instead.

    Raises:
        TypeError: ``config`` has none of the settings.
    """
    return findings(REQUIRED, config, _value_of)


def check_unbiased(config: Mapping[str, Any]) -> list[str]:
    """Name every setting with which the mean of verl's gradient is not the gradient of the expected reward.

    This is :func:`snr_optim.integrations.trl.check_unbiased` for a whole verl config. No setting can change that the
    engine that samples rounds differently from the one that trains.

    Args:
        config: what verl's ``main_ppo`` is given; settings that it does not have are passed over.

    Returns:
        A sentence for each such setting: its name and value, what is wrong with it, and what to set instead.

    Raises:
        TypeError: ``config`` has none of the settings.

    Example:
        >>> check_unbiased({"algorithm": {"filter_groups": {"enable": True}}})[0].partition(": ")[2]
        'set algorithm.filter_groups.enable=False'
    """
    return findings(SETTINGS, config, _value_of)


def _value_of(config: Any, name: str) -> Any:
    """Follow the dots of a name into the config; MISSING where it ends early."""
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return MISSING
        config = config[part]
    return config
