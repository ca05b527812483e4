"""prime-rl without bias: a REINFORCE loss for its ``trainer.loss``, and an orchestrator whose GRPO has this baseline.

Copy this file next to your configs. ``import_path = "prime_rl_loss.reinforce"`` gives the loss; for the baseline, which
no config can name, start the orchestrator as ``python prime_rl_loss.py @ orchestrator.json``. See docs/prime-rl.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from snr_optim import GradWeightedBaseline
from snr_optim.grad_norms import chosen_token_grad_norms

DECAY = 0.99  # a group at a time: the pool is about the last hundred groups


class LossOutputs(NamedTuple):
    """What prime-rl reads of its own class of this name."""

    loss: Tensor
    metrics: dict[str, Tensor]


def reinforce(inputs: Any, *, off_policy: bool = False) -> LossOutputs:
    r"""``- c A log pi(o)`` of one sequence, summed over its tokens: neither clipped, masked nor regularised.

    Its gradient is ``- c A grad log pi(o)`` with ``c = 1``, which has the right mean if the sequence was sampled from
    the very policy. With ``off_policy`` it is the ratio of the whole sequence,

    .. math:: c = \exp \sum_t \big(\log \pi(o_t) - \log \mu(o_t)\big),

    which has the right mean whatever policy ``mu`` it was sampled from, and a variance that grows with its length.

    Args:
        inputs: prime-rl's ``LossInputs``: ``[seq]`` each of ``trainer_logprobs``, ``inference_logprobs``,
            ``advantages``, ``loss_mask``, and ``loss_weights`` or None.
        off_policy: multiply by ``c``; from ``[trainer.loss.kwargs]``.
    """
    mask = inputs.loss_mask
    ours, theirs = inputs.trainer_logprobs[mask], inputs.inference_logprobs[mask]
    log_ratio = (ours - theirs).detach()
    ratio = log_ratio.sum().exp() if off_policy else torch.ones_like(log_ratio.sum())
    credit = inputs.advantages[mask]
    if inputs.loss_weights is not None:
        credit = credit * inputs.loss_weights[mask]
    mismatch = (log_ratio.exp() - log_ratio - 1).sum() / max(1, len(log_ratio))
    return LossOutputs(-(ratio * credit * ours).sum(), {"sequence_ratio": ratio, "reinforce_mismatch_kl": mismatch})


def gradient_weight(trace: Any) -> float:
    """Sum of ``(1 - p)^2`` over the sampled tokens, between half and all of ``sum ||e_y - p||^2``."""
    log_probs = []
    for node in trace.nodes:
        if any(node.mask):
            if len(node.logprobs) != sum(node.mask):
                raise ValueError(
                    f"logprobs: expected one for each of the {sum(node.mask)} sampled tokens of a message in trace "
                    f"{trace.id!r}, got {len(node.logprobs)}"
                )
            log_probs += node.logprobs
    return float(chosen_token_grad_norms(torch.tensor(log_probs, dtype=torch.float64)).sum())


def group_advantages(baseline: GradWeightedBaseline, traces: list[Any]) -> list[float]:
    """Of the outputs of one prompt, from which the baseline then learns."""
    if not traces:
        return []
    unscored = float("nan")  # advantage 0
    rewards = torch.tensor([unscored if t.reward is None else t.reward for t in traces], dtype=torch.float64)
    weights = torch.tensor([gradient_weight(trace) for trace in traces], dtype=torch.float64)
    advantages: list[float] = baseline.advantages(rewards, weights, groups=len(traces), update=True).tolist()
    return advantages


def oblr_algorithm() -> type:
    """prime-rl's GRPO with ``r - b`` for its advantages."""
    from prime_rl.orchestrator.algo.base import iter_trainable_traces
    from prime_rl.orchestrator.algo.grpo import GRPOAlgorithm
    from prime_rl.orchestrator.algo.routing import assign_advantages

    class OBLRAlgorithm(GRPOAlgorithm):  # type: ignore[misc]
        def __init__(self, config: Any, policy_pool: Any) -> None:
            super().__init__(config, policy_pool)
            if config.length_penalty is not None:
                raise ValueError("length_penalty: makes rewards relative to those of the group; remove it")
            self.baseline = GradWeightedBaseline(decay=DECAY)

        async def score_group(self, episodes: list[Any]) -> None:
            traces = [trace for _, trace in iter_trainable_traces(episodes)]
            if len(traces) > sum(1 for episode in episodes if any(True for _ in iter_trainable_traces([episode]))):
                raise ValueError(
                    "episodes: expected one trainable trace in each; traces of one episode are no independent "
                    "outputs. Use prime-rl's rae or hierarchical_grpo for several agents"
                )
            for trace, advantage in zip(traces, group_advantages(self.baseline, traces), strict=True):
                assign_advantages(trace, advantage)

    return OBLRAlgorithm


def main() -> None:
    """prime-rl's orchestrator; ``type = "grpo"`` now means this."""
    from prime_rl.entrypoints import orchestrator
    from prime_rl.orchestrator.algo import ALGORITHM_CLASSES

    ALGORITHM_CLASSES["grpo"] = oblr_algorithm()
    orchestrator.main()


if __name__ == "__main__":
    main()
