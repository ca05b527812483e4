"""The gradient-weighted baseline in slime, as functions whose paths slime's command line takes.

Here: ``SlimeAdvantages``, and the paths ``advantages`` and ``data_source`` that are made of it. ``data_source`` imports
slime when it is called, and nothing here imports Megatron: all of this runs in slime's ``RolloutManager``, the one
process that sees all samples of a batch.
"""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from snr_optim.baseline import GradWeightedBaseline
from snr_optim.grad_norms.proxies import chosen_token_grad_norms
from snr_optim.integrations._checkpoint import BASELINE_FILE, load_baseline, save_baseline
from snr_optim.integrations.slime.settings import check_unbiased

logger = logging.getLogger(__name__)

# slime has no folder for each checkpoint of its rollouts: all of them lie in one, as global_dataset_state_dict_{N}.pt.
# So the file of the baseline carries the number of the rollout, too.
ROLLOUT_FOLDER = "rollout"
ESTIMATORS = ("grpo", "gspo", "cispo")  # those that use the processed reward, as it is, as the advantage of every token


class Sample(Protocol):
    """The fields of slime's ``Sample`` that are read here."""

    group_index: int | None
    rollout_id: int | None
    reward: float | Mapping[str, float | None] | None
    response_length: int
    loss_mask: Sequence[int] | None
    remove_sample: bool
    rollout_log_probs: Sequence[float] | None


class SlimeAdvantages:
    r"""Advantages from :class:`GradWeightedBaseline`, instead of slime's rewards minus the mean of their prompt group.

    .. math::
        A_i = r_i - b_i, \qquad
        w_i = \sum_t (1 - p_{i,t})^2, \qquad
        \tfrac{1}{2} \sum_t \|e_{y_t} - p_t\|^2 \le w_i \le \sum_t \|e_{y_t} - p_t\|^2

    This is theorem 7 of OBLR-PO (arXiv 2511.23310). ``p_{i,t}`` is the probability that SGLang gave the token which it
    chose; slime does not have the probabilities of the other tokens, so the weights are those of
    :func:`~snr_optim.grad_norms.proxies.chosen_token_grad_norms`. They are within a factor of two of
    :func:`logit_grad_norms`, which are themselves a stand-in for ``||grad log pi(o)||^2``. Tokens that ``loss_mask``
    leaves out do not count.

    An instance is what ``--custom-reward-post-process-path`` expects. slime calls it in its ``RolloutManager`` with all
    samples of a batch, before it splits them over data-parallel ranks, so no prompt group is in pieces. Samples belong
    together by their ``group_index``; the order and the sizes of the prompt groups do not matter. Samples that share a
    ``rollout_id``, as agents make them, are one output. An output whose reward is None or NaN gets advantage 0.

    slime divides the loss of an output by its number of tokens. This makes the weight of an output depend on the output
    itself, which biases the gradient. To undo it, the call returns

    .. math:: A_i \cdot \frac{\text{tokens of output } i}{\texttt{rollout\_max\_response\_len}}

    and the gradient is the one of ``sum_i A_i log pi(o_i)``, divided by the constant. With
    ``--calculate-per-token-loss``, or with a reducer of your own, slime does not divide by that number, and the call
    returns ``A_i``.

    Args:
        baseline: use this one instead of ``GradWeightedBaseline()``. It must not have a ``process_group``.

    Raises:
        ValueError: the baseline has a ``process_group``.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(advantage_estimator="grpo", rollout_max_response_len=8, entropy_coef=0.0)
        >>> advantages = SlimeAdvantages(GradWeightedBaseline(scope="group"))
        >>> samples = [SimpleNamespace(group_index=0, rollout_id=None, reward=float(i), response_length=2,
        ...     loss_mask=None, remove_sample=False, rollout_log_probs=[-0.5, -0.1]) for i in range(3)]
        >>> advantages(args, samples)
        ([0.0, 1.0, 2.0], [-0.375, 0.0, 0.375])
    """

    def __init__(self, baseline: GradWeightedBaseline | None = None) -> None:
        self.baseline = GradWeightedBaseline() if baseline is None else baseline
        if self.baseline.process_group is not None:
            raise ValueError("baseline: expected one without process_group: all samples of a batch are in one process")
        self._settings_checked = False

    def __call__(self, args: Namespace, samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
        """Return what slime asks for: the rewards as they were, and the numbers that it uses as advantages.

        Args:
            args: slime's arguments.
            samples: all of slime's samples of a batch, in one flat list.

        Returns:
            Two lists with a number for each sample. A reward that was None is NaN in the first.

        Raises:
            ValueError: a setting would undo the baseline; a sample has no ``group_index`` or no ``rollout_log_probs``;
                samples of one ``rollout_id`` have several rewards or several prompt groups.
        """
        self._check_settings(args)
        if not samples:
            return [], []
        rewards = [_reward(args, sample) for sample in samples]
        outputs, first = _outputs(samples)
        index = torch.tensor(outputs)
        prompt_groups = [_prompt_group(sample) for sample in samples]
        _expect_one_each("reward", rewards, outputs, first)
        _expect_one_each("group_index", prompt_groups, outputs, first)

        masks = [_mask(sample) for sample in samples]
        weights = [self.gradient_weight(sample, mask) for sample, mask in zip(samples, masks, strict=True)]
        tokens = [mask.sum().item() for mask in masks]
        output_sums = torch.zeros(2, len(first), dtype=torch.float64)
        output_sums.index_add_(1, index, torch.tensor([weights, tokens], dtype=torch.float64))
        output_weights, output_tokens = output_sums
        advantages = self.baseline.advantages(
            torch.tensor([rewards[i] for i in first], dtype=torch.float64),
            output_weights,
            groups=torch.tensor([prompt_groups[i] for i in first]),
            update=True,
        )
        logger.info("baseline: %s", self.baseline.metrics())
        if _divides_by_tokens(args):
            advantages = advantages * output_tokens / args.rollout_max_response_len
        return rewards, advantages[index].tolist()

    def gradient_weight(self, sample: Sample, mask: Tensor) -> float:
        r"""Return a stand-in for ``||grad log pi(o)||^2`` of a sample; only the ratios between samples matter.

        Override this to use other weights. The weight must depend on this sample alone.

        Args:
            sample: one of slime's samples.
            mask: ``[T]``, 1 at the tokens of the response that slime trains on.

        Raises:
            ValueError: the sample does not have a log-prob for each of its tokens.
        """
        if not mask.any():  # the output was aborted or removed, and slime trains on none of its tokens
            return 0.0
        log_probs = sample.rollout_log_probs
        if log_probs is None or len(log_probs) != len(mask):
            raise ValueError(
                f"rollout_log_probs: expected one for each of the {len(mask)} tokens of the response, got "
                f"{None if log_probs is None else len(log_probs)}; set them in your generate function, or override "
                "gradient_weight, for example with the length: lambda self, sample, mask: mask.sum().item()"
            )
        return float(chosen_token_grad_norms(torch.tensor(log_probs, dtype=torch.float64), mask).sum())

    def data_source(self, args: Namespace) -> Any:
        """Return slime's default data source, whose checkpoints now also hold what the baseline has learned.

        This is what ``--data-source-path`` expects. slime saves and loads its data source wherever it saves and loads a
        checkpoint, in the process where the baseline lives. Without it, a resumed run begins with a new baseline. A
        data source of your own can call :meth:`save` and :meth:`load` instead.

        Args:
            args: slime's arguments.

        Returns:
            A ``RolloutDataSourceWithBuffer``.
        """
        from slime.rollout.data_source import RolloutDataSourceWithBuffer

        learned = self

        class DataSource(RolloutDataSourceWithBuffer):  # type: ignore[misc]
            def save(self, rollout_id: int) -> None:
                super().save(rollout_id)
                learned.save(args, rollout_id)

            def load(self, rollout_id: int | None = None) -> None:
                super().load(rollout_id)
                learned.load(args, rollout_id)

        return DataSource(args)

    def save(self, args: Namespace, rollout_id: int) -> None:
        """Write what the baseline has learned into the checkpoint of a rollout.

        Raises:
            OSError: the file cannot be written.
        """
        save_baseline(self.baseline, _baseline_path(args.save, rollout_id))

    def load(self, args: Namespace, rollout_id: int | None) -> None:
        """Read it again; the baseline stays as it is where the checkpoint has no file of a baseline.

        Raises:
            ValueError: the file is damaged, or the baseline has settings that its state does not suit.
        """
        if args.load is not None:
            load_baseline(self.baseline, _baseline_path(args.load, rollout_id))

    def _check_settings(self, args: Namespace) -> None:
        if args.advantage_estimator not in ESTIMATORS:
            raise ValueError(
                f"advantage_estimator={args.advantage_estimator!r} does something of its own to rewards: set one of "
                f"--advantage-estimator {', '.join(ESTIMATORS)}"
            )
        if getattr(args, "normalize_advantages", False):
            raise ValueError("normalize_advantages=True takes the baseline away again: drop --normalize-advantages")
        if _divides_by_tokens(args) and not getattr(args, "rollout_max_response_len", None):
            raise ValueError("rollout_max_response_len: expected a number, to divide losses by; set the option")
        findings = [] if self._settings_checked else check_unbiased(args)
        self._settings_checked = True
        if findings:
            warnings.warn("SlimeAdvantages: these settings bias the gradient: " + "; ".join(findings), stacklevel=3)


advantages = SlimeAdvantages()
data_source = advantages.data_source


def _baseline_path(checkpoints: str, rollout_id: int | None) -> str:
    name, extension = os.path.splitext(BASELINE_FILE)
    return os.path.join(checkpoints, ROLLOUT_FOLDER, f"{name}_{rollout_id}{extension}")


# ------------------------------------------------------------------------------------------------- reading a Sample
def _reward(args: Namespace, sample: Sample) -> float:
    reward: Any = sample.reward
    key = getattr(args, "reward_key", None)
    if reward is not None and key:
        reward = reward[key]
    return float("nan") if reward is None else float(reward)


def _prompt_group(sample: Sample) -> int:
    if sample.group_index is None:
        raise ValueError("group_index: expected the number of the prompt; got None. Set it in your data source")
    return int(sample.group_index)


def _mask(sample: Sample) -> Tensor:
    """Return ``[T]``, 1 at the tokens that slime is going to train on."""
    if sample.remove_sample:
        return torch.zeros(sample.response_length)
    return torch.ones(sample.response_length) if sample.loss_mask is None else torch.as_tensor(sample.loss_mask)


def _outputs(samples: Sequence[Sample]) -> tuple[list[int], list[int]]:
    """Number the outputs: which one each sample is a part of, and which sample is the first of each output."""
    first: dict[Hashable, int] = {}
    keys = [("alone", i) if s.rollout_id is None else ("together", s.rollout_id) for i, s in enumerate(samples)]
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    numbers = {key: number for number, key in enumerate(first)}
    return [numbers[key] for key in keys], list(first.values())


def _expect_one_each(name: str, values: Sequence[float], outputs: list[int], first: list[int]) -> None:
    for value, output in zip(values, outputs, strict=True):
        expected = values[first[output]]
        if value != expected and not (value != value and expected != expected):
            raise ValueError(
                f"{name}: expected one for all samples of a rollout_id, which are one output; got {expected} and "
                f"{value}. Give every sample the {name} of the whole"
            )


def _divides_by_tokens(args: Namespace) -> bool:
    return not (
        getattr(args, "calculate_per_token_loss", False)
        or getattr(args, "custom_pg_loss_reducer_function_path", None) is not None
    )
