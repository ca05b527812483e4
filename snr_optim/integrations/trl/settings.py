"""Which settings of TRL's GRPO and RLOO bias the gradient of the expected reward.

Here: ``check_unbiased`` and its table. They read a config and import neither TRL nor a trainer.
"""

from __future__ import annotations

from snr_optim.integrations._unbiased import UNCLIPPED, Setting, attribute_of, findings, one_of

EXACT_LOSSES = ("luspo", "dr_grpo")  # sums over tokens by constants; the other losses divide by random lengths


SETTINGS = [
    Setting(
        "loss_type",
        one_of(*EXACT_LOSSES),
        "divides by lengths of the outputs, so that the weight of an output depends on what it is",
        "loss_type='luspo' (exact), or 'dr_grpo' (exact but for the constant max_completion_length)",
    ),
    Setting(
        "scale_rewards",
        one_of("none", False),
        "divides by the spread of the outputs' own rewards (OBLRTrainerMixin does not)",
        "scale_rewards='none'",
    ),
    Setting(
        "multi_objective_aggregation",
        one_of("sum_then_normalize"),
        "makes rewards relative to those of other outputs (OBLRTrainerMixin adds them up as they are)",
        "multi_objective_aggregation='sum_then_normalize'",
    ),
    Setting(
        "normalize_advantages",
        one_of(False),
        "divides by the spread of the outputs' own advantages (OBLRTrainerMixin does not)",
        "normalize_advantages=False",
    ),
    Setting("beta", one_of(0, None), "adds a KL penalty to the objective", "beta=0.0"),
    Setting(
        "num_iterations",
        one_of(1),
        "uses outputs again, after the policy has seen them, with clipped ratios",
        "num_iterations=1",
    ),
    Setting(
        "steps_per_generation",
        lambda value, args: value is None or args.gradient_accumulation_steps % value == 0,
        "makes several optimizer steps on one generated batch: all but the first are off-policy, with clipped ratios",
        "steps_per_generation=gradient_accumulation_steps",
    ),
    Setting(
        "temperature", one_of(1), "samples from, and trains, a policy other than the model's own", "temperature=1.0"
    ),
    Setting("top_p", one_of(1, None), "never samples unlikely tokens, which the gradient counts on", "top_p=1.0"),
    Setting("top_k", one_of(0, -1, None), "never samples unlikely tokens, which the gradient counts on", "top_k=0"),
    Setting("min_p", one_of(0, None), "never samples unlikely tokens, which the gradient counts on", "min_p=None"),
    Setting(
        "repetition_penalty",
        one_of(1, None),
        "samples from another distribution than the gradient is taken of",
        "repetition_penalty=1.0",
    ),
    Setting(
        "generation_kwargs",
        lambda value, args: not value,
        "may change the distribution that is sampled from",
        "generation_kwargs=None, or make sure that it does not",
    ),
    Setting(
        "use_vllm",
        one_of(False),
        "samples with other numerics than the gradient is taken with, and corrects by masked or truncated ratios",
        "use_vllm=False, or accept a small bias",
    ),
    Setting(
        "disable_dropout",
        one_of(True),
        "leaves dropout on, if the model has any: outputs are of another policy than the gradient",
        "disable_dropout=True",
    ),
    Setting(
        "neftune_noise_alpha",
        one_of(0, None),
        "adds noise to embeddings: outputs are of another policy than the gradient",
        "neftune_noise_alpha=None",
    ),
    Setting(
        "max_grad_norm",
        lambda value, args: not value or value >= UNCLIPPED,
        "clips the gradient, and the more the noisier it is",
        "max_grad_norm=0, which turns clipping off",
    ),
    Setting(
        "mask_truncated_completions",
        one_of(False),
        "drops outputs because of what they are",
        "mask_truncated_completions=False",
    ),
    Setting("entropy_coef", one_of(0, None), "adds the entropy to the objective", "entropy_coef=0.0"),
    Setting(
        "use_adaptive_entropy",
        one_of(False),
        "adds the entropy to the objective at times",
        "use_adaptive_entropy=False",
    ),
    Setting("top_entropy_quantile", one_of(1), "leaves tokens out of the gradient", "top_entropy_quantile=1.0"),
    Setting(
        "off_policy_mask_threshold",
        one_of(None),
        "drops outputs because of their advantage",
        "off_policy_mask_threshold=None",
    ),
]


def check_unbiased(args: object) -> list[str]:
    r"""Name every setting with which the mean of TRL's gradient is not the gradient of the expected reward.

    .. math::
        \nabla J = E\big[ (r - b)\, \nabla \log \pi(o) \big]

    holds where outputs are drawn from the very policy, all their tokens have one weight, the baseline of an output does
    not depend on that output, and the loss has no other term. A test against autograd shows that with the settings
    named here the gradient of a batch is ``sum_i A_i grad log pi(o_i)``, times a constant.

    Args:
        args: a ``GRPOConfig`` or ``RLOOConfig``; settings that it does not have are passed over.

    Returns:
        A sentence for each such setting: its name and value, what is wrong with it, and what to set instead. The list
        is empty if all is well.

    Raises:
        TypeError: ``args`` has none of the settings.

    Example:
        >>> from types import SimpleNamespace
        >>> check_unbiased(SimpleNamespace(beta=0.04, num_iterations=1))
        ['beta=0.04 adds a KL penalty to the objective: set beta=0.0']
    """
    return findings(SETTINGS, args, attribute_of)
