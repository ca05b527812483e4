"""The gradient-weighted baseline in slime, by functions whose paths its command line takes.

Here: ``SlimeAdvantages``, and the paths ``advantages`` and ``data_source`` made of it. slime is imported when
``data_source`` is called, and Megatron never: all of this runs in slime's ``RolloutManager``, the one process that sees
all samples of a batch.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snr_optim.baseline import GradWeightedBaseline
from snr_optim.integrations.slime.settings import check_unbiased

logger = logging.getLogger(__name__)

BASELINE_FILE = "rollout/oblr_baseline_{}.pt"  # beside slime's own global_dataset_state_dict_{}.pt
ESTIMATORS = ("grpo", "gspo", "cispo")  # take the processed reward as the advantage of all tokens, and do no more to it


class SlimeAdvantages:
    r"""Advantages from :class:`GradWeightedBaseline` in place of slime's rewards minus the mean of their group.

    .. math::
        A_i = r_i - b_i, \qquad
        w_i = \sum_t (1 - p_{i,t})^2, \qquad
        \tfrac{1}{2} \sum_t \|e_{y_t} - p_t\|^2 \le w_i \le \sum_t \|e_{y_t} - p_t\|^2

    OBLR-PO (arXiv 2511.23310, theorem 7), where ``p_{i,t}`` is the probability that SGLang gave the token which it
    chose. The probabilities of the other tokens are not there, but they add up to ``1 - p``, so the sum of their
    squares is at most ``(1 - p)^2``: these weights are within a factor of two of :func:`logit_grad_norms`, which are
    themselves a stand-in for ``||grad log pi(o)||^2``. Tokens that ``loss_mask`` leaves out do not count.

    For ``--custom-reward-post-process-path``, which slime calls in its ``RolloutManager`` with all samples of a batch,
    before it splits them over data-parallel ranks: a group is never in pieces. Its order and size do not matter:
    samples belong together by their ``group_index``. Samples that share a ``rollout_id``, as agents make them, are one
    output. A reward of None or NaN gives advantage 0.

    slime divides the loss of an output by its number of tokens, which weighs an output by what it is and biases the
    gradient. Therefore what is returned is

    .. math:: A_i \cdot \frac{\text{tokens of output } i}{\texttt{rollout\_max\_response\_len}}

    and the gradient is that of ``sum_i A_i log pi(o_i)`` over the constant. With ``--calculate-per-token-loss`` or a
    reducer of your own, which do not divide by that number, it is ``A_i``.

    Args:
        baseline: another one than ``GradWeightedBaseline()``; without ``process_group``.

    Raises:
        ValueError: a baseline with a ``process_group``.

    Example:
        >>> from types import SimpleNamespace as Sample
        >>> args = Sample(advantage_estimator="grpo", rollout_max_response_len=8, entropy_coef=0.0)
        >>> advantages = SlimeAdvantages(GradWeightedBaseline(scope="group"))
        >>> samples = [Sample(group_index=0, rollout_id=None, reward=float(i), response_length=2, loss_mask=None,
        ...     remove_sample=False, rollout_log_probs=[-0.5, -0.1]) for i in range(3)]
        >>> advantages(args, samples)
        ([0.0, 1.0, 2.0], [-0.375, 0.0, 0.375])
    """

    def __init__(self, baseline: GradWeightedBaseline | None = None) -> None:
        self.baseline = GradWeightedBaseline() if baseline is None else baseline
        if self.baseline.process_group is not None:
            raise ValueError("baseline: expected one without process_group: all samples of a batch are in one process")
        self._checked = False

    def __call__(self, args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
        """What slime asks for: the rewards as they were, and those that it hands to the trainer as advantages.

        Args:
            args: slime's.
            samples: slime's ``Sample``, all of a batch, flat.

        Returns:
            A number for each sample, twice; a reward that was None is NaN.

        Raises:
            ValueError: settings under which a baseline is undone; samples without ``group_index`` or
                ``rollout_log_probs``; samples of one ``rollout_id`` with several rewards or groups.
        """
        self._check(args)
        if not samples:
            return [], []
        rewards = [_reward(args, sample) for sample in samples]
        outputs, first = _outputs(samples)
        index = torch.tensor(outputs)
        groups = [_group(sample) for sample in samples]
        _expect_one_each("reward", rewards, outputs, first)
        _expect_one_each("group_index", groups, outputs, first)

        masks = [_mask(sample) for sample in samples]
        weights = [self.gradient_weight(sample, mask) for sample, mask in zip(samples, masks, strict=True)]
        tokens = [mask.sum().item() for mask in masks]
        of_outputs = torch.zeros(2, len(first), dtype=torch.float64)
        of_outputs.index_add_(1, index, torch.tensor([weights, tokens], dtype=torch.float64))
        advantages = self.baseline.advantages(
            torch.tensor([rewards[i] for i in first], dtype=torch.float64),
            of_outputs[0],
            groups=torch.tensor([groups[i] for i in first]),
            update=True,
        )
        logger.info("baseline: %s", self.baseline.metrics())
        if _divides_by_tokens(args):
            advantages = advantages * of_outputs[1] / args.rollout_max_response_len
        return rewards, advantages[index].tolist()

    def gradient_weight(self, sample: Any, mask: Tensor) -> float:
        r"""``||grad log pi(o)||^2`` of a sample, or what stands for it; only ratios matter. To override.

        Args:
            sample: slime's. It must be looked at by itself.
            mask: ``[T]``, 1 at the tokens of the response that are trained on.

        Raises:
            ValueError: it has no log-probs for all of its tokens.
        """
        if not mask.any():  # aborted, or removed: nothing to train on
            return 0.0
        log_probs = sample.rollout_log_probs
        if log_probs is None or len(log_probs) != len(mask):
            raise ValueError(
                f"rollout_log_probs: expected one for each of the {len(mask)} tokens of the response, got "
                f"{None if log_probs is None else len(log_probs)}; set them in your generate function, or override "
                "gradient_weight, for example with the length: lambda self, sample, mask: mask.sum().item()"
            )
        others = torch.expm1(torch.tensor(log_probs, dtype=torch.float64).clamp_max(0))  # -(1 - p), also where p -> 1
        return float((others.square() * mask).sum())

    def data_source(self, args: Any) -> Any:
        """The default data source of slime, whose checkpoints also hold what the baseline has learned.

        For ``--data-source-path``. slime saves and loads its data source where it saves and loads a checkpoint, in the
        process where the baseline lives. Without it, a resumed run begins with a new baseline; a data source of your
        own does the same with :meth:`save` and :meth:`load`.

        Args:
            args: slime's.

        Returns:
            A ``RolloutDataSourceWithBuffer``.
        """
        from slime.rollout.data_source import (
            RolloutDataSourceWithBuffer,
        )

        learned = self

        class DataSource(RolloutDataSourceWithBuffer):  # type: ignore[misc]
            def save(self, rollout_id: int) -> None:
                super().save(rollout_id)
                learned.save(args, rollout_id)

            def load(self, rollout_id: int | None = None) -> None:
                super().load(rollout_id)
                learned.load(args, rollout_id)

        return DataSource(args)

    def save(self, args: Any, rollout_id: int) -> None:
        """Write what the baseline has learned into the checkpoint of a rollout."""
        path = os.path.join(args.save, BASELINE_FILE.format(rollout_id))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.save(self.baseline.state_dict(), path)

    def load(self, args: Any, rollout_id: int | None) -> None:
        """Read it again; with a checkpoint that has none, the baseline stays as it is."""
        path = os.path.join(args.load or "", BASELINE_FILE.format(rollout_id))
        if args.load is not None and os.path.isfile(path):
            self.baseline.load_state_dict(torch.load(path, weights_only=True))

    def _check(self, args: Any) -> None:
        if args.advantage_estimator not in ESTIMATORS:
            raise ValueError(
                f"advantage_estimator={args.advantage_estimator!r} does something of its own to rewards: set one of "
                f"--advantage-estimator {', '.join(ESTIMATORS)}"
            )
        if getattr(args, "normalize_advantages", False):
            raise ValueError("normalize_advantages=True takes the baseline away again: drop --normalize-advantages")
        if _divides_by_tokens(args) and not getattr(args, "rollout_max_response_len", None):
            raise ValueError("rollout_max_response_len: expected a number, to divide losses by; set the option")
        findings = [] if self._checked else check_unbiased(args)
        self._checked = True
        if findings:
            warnings.warn("SlimeAdvantages: these settings bias the gradient: " + "; ".join(findings), stacklevel=3)


advantages = SlimeAdvantages()
data_source = advantages.data_source


# ----------------------------------------------------------------------------------------------------- a slime Sample
def _reward(args: Any, sample: Any) -> float:
    reward, key = sample.reward, getattr(args, "reward_key", None)
    if reward is not None and key:
        reward = reward[key]
    return float("nan") if reward is None else float(reward)


def _group(sample: Any) -> int:
    if sample.group_index is None:
        raise ValueError("group_index: expected the number of the prompt; got None. Set it in your data source")
    return int(sample.group_index)


def _mask(sample: Any) -> Tensor:
    """``[T]``: the tokens that slime is going to train on."""
    if sample.remove_sample:
        return torch.zeros(sample.response_length)
    return torch.ones(sample.response_length) if sample.loss_mask is None else torch.as_tensor(sample.loss_mask)


def _outputs(samples: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Of which output, counted from 0, each sample is a part; and the first sample of each output."""
    first: dict[Any, int] = {}
    keys = [("alone", i) if s.rollout_id is None else ("together", s.rollout_id) for i, s in enumerate(samples)]
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    numbers = {key: number for number, key in enumerate(first)}
    return [numbers[key] for key in keys], list(first.values())


def _expect_one_each(name: str, values: list[Any], outputs: list[int], first: list[int]) -> None:
    for value, output in zip(values, outputs, strict=True):
        expected = values[first[output]]
        if value != expected and not (value != value and expected != expected):
            raise ValueError(
                f"{name}: expected one for all samples of a rollout_id, which are one output; got {expected} and "
                f"{value}. Give every sample the {name} of the whole"
            )


def _divides_by_tokens(args: Any) -> bool:
    return not (
        getattr(args, "calculate_per_token_loss", False)
        or getattr(args, "custom_pg_loss_reducer_function_path", None) is not None
    )
