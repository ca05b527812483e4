"""Which settings of TRL's GRPO and RLOO make the gradient something else than that of the expected reward.

Here: ``check_unbiased`` and its table. It looks at a config and needs neither TRL nor a trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

EXACT_LOSSES = ("luspo", "dr_grpo")  # sums over tokens by constants; the other losses divide by random lengths
UNCLIPPED = 1e6


class Setting(NamedTuple):
    """A setting that may bias the gradient.

    Attributes:
        name: of the config.
        fine: whether a value, in its config, is harmless.
        why: what is wrong otherwise.
        instead: what to set.
    """

    name: str
    fine: Callable[[Any, Any], bool]
    why: str
    instead: str


def _is(*values: Any) -> Callable[[Any, Any], bool]:
    return lambda value, args: value in values


SETTINGS = [
    Setting(
        "loss_type",
        _is(*EXACT_LOSSES),
        "divides by lengths of the outputs, so that the weight of an output depends on what it is",
        "loss_type='luspo' (exact), or 'dr_grpo' (exact but for the constant max_completion_length)",
    ),
    Setting(
        "scale_rewards",
        _is("none", False),
        "divides by the spread of the outputs' own rewards (OBLRTrainerMixin does not)",
        "scale_rewards='none'",
    ),
    Setting(
        "multi_objective_aggregation",
        _is("sum_then_normalize"),
        "makes rewards relative to those of other outputs (OBLRTrainerMixin adds them up as they are)",
        "multi_objective_aggregation='sum_then_normalize'",
    ),
    Setting(
        "normalize_advantages",
        _is(False),
        "divides by the spread of the outputs' own advantages (OBLRTrainerMixin does not)",
        "normalize_advantages=False",
    ),
    Setting("beta", _is(0, None), "adds a KL penalty to the objective", "beta=0.0"),
    Setting(
        "num_iterations",
        _is(1),
        "uses outputs again, after the policy has seen them, with clipped ratios",
        "num_iterations=1",
    ),
    Setting(
        "steps_per_generation",
        lambda value, args: value is None or args.gradient_accumulation_steps % value == 0,
        "makes several optimizer steps on one generated batch: all but the first are off-policy, with clipped ratios",
        "steps_per_generation=gradient_accumulation_steps",
    ),
    Setting("temperature", _is(1), "samples from, and trains, a policy other than the model's own", "temperature=1.0"),
    Setting("top_p", _is(1, None), "never samples unlikely tokens, which the gradient counts on", "top_p=1.0"),
    Setting("top_k", _is(0, -1, None), "never samples unlikely tokens, which the gradient counts on", "top_k=0"),
    Setting("min_p", _is(0, None), "never samples unlikely tokens, which the gradient counts on", "min_p=None"),
    Setting(
        "repetition_penalty",
        _is(1, None),
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
        _is(False),
        "samples with other numerics than the gradient is taken with, and corrects by masked or truncated ratios",
        "use_vllm=False, or accept a small bias",
    ),
    Setting(
        "disable_dropout",
        _is(True),
        "leaves dropout on, if the model has any: outputs are of another policy than the gradient",
        "disable_dropout=True",
    ),
    Setting(
        "max_grad_norm",
        lambda value, args: not value or value >= UNCLIPPED,
        "clips the gradient, and the more the noisier it is",
        "max_grad_norm=0, which turns clipping off",
    ),
    Setting(
        "mask_truncated_completions",
        _is(False),
        "drops outputs because of what they are",
        "mask_truncated_completions=False",
    ),
    Setting("entropy_coef", _is(0, None), "adds the entropy to the objective", "entropy_coef=0.0"),
    Setting(
        "use_adaptive_entropy", _is(False), "adds the entropy to the objective at times", "use_adaptive_entropy=False"
    ),
    Setting("top_entropy_quantile", _is(1), "leaves tokens out of the gradient", "top_entropy_quantile=1.0"),
    Setting(
        "off_policy_mask_threshold",
        _is(None),
        "drops outputs because of their advantage",
        "off_policy_mask_threshold=None",
    ),
]


def check_unbiased(args: Any) -> list[str]:
    r"""Every setting with which TRL's gradient is not, in the mean, that of the expected reward.

    .. math::
        \nabla J = E\big[ (r - b)\, \nabla \log \pi(o) \big]

    needs outputs drawn from the very policy, all their tokens with one weight, a baseline that does not look at
    the output, and nothing else in the loss. Checked against autograd: with these settings the gradient of the batch is
    ``sum_i A_i grad log pi(o_i)``, times a constant.

    Args:
        args: a ``GRPOConfig`` or ``RLOOConfig``; settings that it does not have are passed over.

    Returns:
        A sentence for each: its name and value, what is wrong with it, and what to set instead. Empty if all is well.

    Example:
        >>> from types import SimpleNamespace
        >>> check_unbiased(SimpleNamespace(beta=0.04, num_iterations=1))
        ['beta=0.04 adds a KL penalty to the objective: set beta=0.0']
    """
    return [
        f"{setting.name}={getattr(args, setting.name)!r} {setting.why}: set {setting.instead}"
        for setting in SETTINGS
        if hasattr(args, setting.name) and not setting.fine(getattr(args, setting.name), args)
    ]
