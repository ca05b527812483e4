"""Which settings of slime bias the gradient of the expected reward.

Here: ``check_unbiased`` and its table. They read slime's arguments and do not import slime.
"""

from __future__ import annotations

from argparse import Namespace

from snr_optim.integrations._unbiased import UNCLIPPED, Setting, attribute_of, findings, one_of

SETTINGS = [
    Setting(
        "calculate_per_token_loss",
        one_of(False),
        "divides by the number of tokens in the batch, which depends on the outputs",
        "no --calculate-per-token-loss",
    ),
    Setting(
        "custom_pg_loss_reducer_function_path",
        one_of(None),
        "may divide by lengths of the outputs",
        "none, or make sure that it divides by a constant",
    ),
    Setting(
        "global_batch_size",
        lambda value, args: value is None or args.rollout_batch_size * args.n_samples_per_prompt <= value,
        "makes several optimizer steps on one batch: all but the first are off-policy, with clipped ratios",
        "global_batch_size = rollout_batch_size * n_samples_per_prompt",
    ),
    Setting(
        "kl_loss_coef",
        lambda value, args: not value or not getattr(args, "use_kl_loss", True),
        "adds a KL penalty to the objective",
        "kl_loss_coef=0.0",
    ),
    Setting("entropy_coef", one_of(0), "adds the entropy to the objective", "entropy_coef=0.0"),
    Setting("use_opd", one_of(False), "adds a KL penalty to the objective", "no --use-opd"),
    Setting("use_opsm", one_of(False), "drops outputs because of their advantage", "no --use-opsm"),
    Setting("use_tis", one_of(False), "multiplies by truncated ratios", "no --use-tis, or accept a small bias"),
    Setting(
        "dynamic_sampling_filter_path",
        one_of(None),
        "drops groups because of their rewards; a pooled baseline learns from flat groups, too",
        "no filter",
    ),
    Setting("rollout_sample_filter_path", one_of(None), "drops outputs because of what they are", "no filter"),
    Setting(
        "over_sampling_batch_size",
        lambda value, args: value is None or value <= args.rollout_batch_size,
        "keeps the groups that are ready first, which are the short ones",
        "over_sampling_batch_size = rollout_batch_size",
    ),
    Setting("partial_rollout", one_of(False), "trains on tokens of earlier policies", "no --partial-rollout"),
    Setting("group_rm", one_of(False), "may make rewards relative to those of the group", "no --group-rm"),
    Setting("rollout_temperature", one_of(1), "samples from, and trains, another policy", "rollout_temperature=1.0"),
    Setting("rollout_top_p", one_of(1), "never samples unlikely tokens", "rollout_top_p=1.0"),
    Setting(
        "rollout_top_k", one_of(-1), "never samples unlikely tokens, which the gradient counts on", "rollout_top_k=-1"
    ),
    Setting("hidden_dropout", one_of(0), "leaves dropout on", "hidden_dropout=0.0"),
    Setting("attention_dropout", one_of(0), "leaves dropout on", "attention_dropout=0.0"),
    Setting(
        "clip_grad",
        lambda value, args: not value or value >= UNCLIPPED,
        "clips the gradient, and the more the noisier it is",
        "clip_grad=0, which turns clipping off",
    ),
]


def check_unbiased(args: Namespace) -> list[str]:
    """Name every setting with which the mean of slime's gradient is not the gradient of the expected reward.

    No setting can change that SGLang samples the outputs with other numerics than Megatron computes their gradient.

    Args:
        args: slime's arguments; settings that it does not have are passed over.

    Returns:
        A sentence for each such setting, as :func:`snr_optim.integrations.trl.check_unbiased` gives.

    Raises:
        TypeError: ``args`` has none of the settings.

    Example:
        >>> from types import SimpleNamespace
        >>> check_unbiased(SimpleNamespace(entropy_coef=0.01, partial_rollout=False))
        ['entropy_coef=0.01 adds the entropy to the objective: set entropy_coef=0.0']
    """
    return findings(SETTINGS, args, attribute_of)
