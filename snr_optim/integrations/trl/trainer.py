"""``OBLRTrainerMixin``: the gradient-weighted baseline in TRL's GRPOTrainer and RLOOTrainer.

Here: the mixin, and all that it has to know about TRL. It does not import TRL: the class that it is mixed with brings
it. The learning rate belongs to :class:`~snr_optim.integrations.transformers.SNRCallback`.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from snr_optim.baseline import GradWeightedBaseline
from snr_optim.causal_lm import IGNORE_INDEX, model_logprob_stats
from snr_optim.grad_norms import logit_grad_norms
from snr_optim.integrations._checkpoint import BASELINE_FILE, load_baseline, save_baseline
from snr_optim.integrations.trl.settings import check_unbiased

PROMPT_GROUP = "oblr_prompt_group"  # in a batch of TRL: which prompt each row belongs to
KNOWN_LOSSES = ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")  # modules whose losses are sum A log pi
TESTED = "1.14, 1.15 and 1.16"
OVERRIDDEN = ("_generate_and_score_completions", "_calculate_rewards", "_prepare_inputs", "_save_checkpoint")
RELIED_ON = (
    "model", "args", "accelerator", "temperature", "reward_weights", "num_generations", "num_generations_eval",
    "_buffered_inputs", "_step", "_metrics", "_logs",
)  # fmt: skip
EXPECTED_IN_BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")

_Trainer: Any = object


class OBLRTrainerMixin(_Trainer):  # type: ignore[misc]  # GRPOTrainer or RLOOTrainer, as the user chooses
    r"""Advantages from :class:`GradWeightedBaseline` in TRL's trainers, instead of the mean of the prompt group.

    .. math::
        A_i = r_i - b_i, \qquad
        b_i = \frac{\sum_{j \neq i} w_j r_j + \ldots}{\sum_{j \neq i} w_j + \ldots}, \qquad
        w_j = \sum_t \|e_{y_t} - p_t\|^2

    This is theorem 7 of OBLR-PO (arXiv 2511.23310), with the weights of :func:`logit_grad_norms` summed over the tokens
    of the completion. They cost one forward pass without gradient for each generated batch, which makes no logits
    (:func:`model_logprob_stats`). Override :meth:`gradient_weights` to use other weights. The baseline learns once from
    every generated batch, after it has computed the advantages, and never from evaluation.

    The rewards are TRL's: it calls the reward functions, weights and sums what they return, and gathers all ranks. A
    completion that no function scored (NaN) gets advantage 0. TRL's table of completions shows the advantages that were
    trained with, its log has :meth:`GradWeightedBaseline.metrics` as ``baseline/kappa``, ``baseline/second_moment``,
    ..., and its checkpoints hold what the baseline has learned, in ``snr_optim_baseline.pt``.

    TRL shuffles all completions before it splits them into micro-batches. The mixin gives whole prompts to every
    micro-batch if ``per_device_train_batch_size`` is a multiple of ``num_generations``. Then micro-batches are
    independent, as :class:`~snr_optim.integrations.transformers.SNRCallback` needs them; otherwise the callback warns.

    Args:
        args: arguments of the trainer, as are ``kwargs``.
        baseline: use this one instead of ``GradWeightedBaseline()``. It must not have a ``process_group``.
        require_unbiased: raise where :func:`check_unbiased` finds something, instead of warning once.
        kwargs: arguments of the trainer.

    Raises:
        TypeError: the class is not mixed with such a trainer, or comes after it.
        RuntimeError: the trainer of this version of TRL lacks something that the mixin needs.
        ValueError: RLOO has ``beta``, whose KL penalty goes into rewards that nobody else sees; the baseline has a
            ``process_group``; settings bias the gradient and ``require_unbiased`` is set.

    Example:
        >>> from snr_optim.integrations.trl import OBLRTrainerMixin
        >>> # from trl import GRPOTrainer
        >>> # class MyTrainer(OBLRTrainerMixin, GRPOTrainer): pass
        >>> # MyTrainer(model, reward_funcs, GRPOConfig(...), train_dataset=..., callbacks=[SNRCallback()]).train()
    """

    baseline: GradWeightedBaseline
    _rewards_per_func: Tensor | None  # the rewards of the batch that is being generated
    _buffered_inputs: Any  # TRL keeps its micro-batches here

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _expect_trainer_after_mixin(cls)

    def __init__(
        self, *args: Any, baseline: GradWeightedBaseline | None = None, require_unbiased: bool = False, **kwargs: Any
    ) -> None:
        self.baseline = GradWeightedBaseline() if baseline is None else baseline
        if self.baseline.process_group is not None:
            raise ValueError("baseline: expected one without process_group: the rewards of all ranks are gathered here")
        self._rewards_per_func = None
        for argument in (*args, *kwargs.values()):
            _expect_rewards_without_kl(argument)  # one is the config: refuse before TRL loads a reference model
        super().__init__(*args, **kwargs)
        missing = [name for name in RELIED_ON if not hasattr(self, name)]
        if missing:
            raise _unsupported(type(self), missing)
        _expect_rewards_without_kl(self.args)
        findings = check_unbiased(self.args) + self._other_losses()
        if findings and require_unbiased:
            raise ValueError("require_unbiased:\n- " + "\n- ".join(findings))
        if findings:
            warnings.warn(
                "OBLRTrainerMixin: these settings bias the gradient, or are replaced:\n- " + "\n- ".join(findings),
                stacklevel=2,
            )

    def _other_losses(self) -> list[str]:
        """Name what the loss has that no setting shows."""
        found = []
        if getattr(self, "aux_loss_enabled", False):
            found.append("the router's auxiliary loss is added to the objective: set router_aux_loss_coef=0.0")
        for name in ("compute_loss", "_compute_loss"):
            theirs = getattr(getattr(type(self), name, None), "__module__", KNOWN_LOSSES[0])
            if theirs not in KNOWN_LOSSES:
                found.append(f"{name} comes from {theirs}, not from TRL: make sure that it is sum A log pi")
        return found

    def gradient_weights(self, batch: dict[str, Any]) -> Tensor:
        r"""Return a stand-in for ``||grad log pi(o)||^2`` of every completion; only the ratios matter.

        Override this to use exact norms, or for models with images. The weight of a completion must depend on that
        completion alone.

        Args:
            batch: the batch of this rank, as TRL makes it: ``prompt_ids`` and ``prompt_mask`` ``[B, P]``,
                ``completion_ids`` and ``completion_mask`` ``[B, C]``, and ``tool_mask`` ``[B, C]`` if there are tools.

        Returns:
            ``[B]``, not negative.

        Raises:
            NotImplementedError: the batch has images.
        """
        if batch.get("pixel_values") is not None:
            raise NotImplementedError(
                "gradient_weights: images are not passed to the model here; override it, for example with the lengths: "
                "lambda self, batch: batch['completion_mask'].sum(1)"
            )
        chosen = batch["completion_mask"]  # the tokens that the policy chose, without what tools have said
        if batch.get("tool_mask") is not None:
            chosen = chosen * batch["tool_mask"]
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        predicted = torch.cat([torch.zeros_like(batch["prompt_mask"]), chosen], dim=1).bool()
        labels = input_ids.masked_fill(~predicted, IGNORE_INDEX)
        rows = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        weights = []
        with torch.no_grad(), self.accelerator.autocast(), warnings.catch_warnings():
            # Reentrant checkpointing says this of every pass without gradient.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            for part in torch.split(torch.arange(len(labels), device=labels.device), rows):
                weights.append(self._token_grad_norms(input_ids[part], attention_mask[part], labels[part]).sum(1))
        return torch.cat(weights)

    def _token_grad_norms(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        if getattr(self.args, "cast_lm_head_to_fp32", False):  # TRL has replaced the forward of the head
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return logit_grad_norms(logits[:, :-1], labels[:, 1:], temperature=self.temperature)
        outputs = ["grad_norm_squared"]
        norms = model_logprob_stats(
            self.model, input_ids, labels, temperature=self.temperature, outputs=outputs, attention_mask=attention_mask
        ).grad_norm_squared
        assert norms is not None  # it was asked for
        return norms

    # -- what TRL calls ---------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """Keep TRL's rewards, ``[B of all ranks, functions]``, until the advantages are computed."""
        self._rewards_per_func = rewards = super()._calculate_rewards(*args, **kwargs)
        return rewards  # type: ignore[no-any-return]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """Replace the advantages in TRL's batch."""
        self._rewards_per_func = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        missing = [name for name in EXPECTED_IN_BATCH if name not in batch]
        if missing or self._rewards_per_func is None:
            raise _unsupported(type(self), missing or ["a call of _calculate_rewards"])
        training = self.model.training
        mode = "train" if training else "eval"
        size = self.num_generations if training else self.num_generations_eval
        rewards = self._rewards(self._rewards_per_func)
        weights = self.accelerator.gather(self.gradient_weights(batch).to(rewards.device))
        # Every rank has the rewards and weights of all ranks, and so the same baseline.
        advantages = self.baseline.advantages(rewards, weights, groups=size, update=training)
        first = self.accelerator.process_index * len(batch["advantages"])
        rows = slice(first, first + len(batch["advantages"]))  # of this rank
        batch["advantages"] = advantages[rows].to(batch["advantages"])
        batch[PROMPT_GROUP] = torch.arange(len(rewards), device=rewards.device)[rows] // size
        _replace_last(self._logs["advantages"], advantages.tolist())
        for name, value in self.baseline.metrics().items():
            self._metrics[mode][f"baseline/{name}"].append(value)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Let TRL split a new batch into micro-batches, and then keep the rows of each prompt together."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        size = self.args.per_device_train_batch_size
        # Images have rows of their own, which are not the rows of the batch.
        images = self._buffered_inputs[0].get("pixel_values") is not None
        if len(self._buffered_inputs) > 1 and size % self.num_generations == 0 and not images:
            self._buffered_inputs = _split_by_prompt(self._buffered_inputs, size)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save TRL's checkpoint, and what the baseline has learned."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            save_baseline(self.baseline, os.path.join(folder, BASELINE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load TRL's part of a checkpoint, and what the baseline had learned; without a file it begins anew."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_baseline(self.baseline, os.path.join(checkpoint, BASELINE_FILE))

    def _rewards(self, rewards_per_func: Tensor) -> Tensor:
        """Weight and sum the rewards as TRL does it: ``[B]``, NaN where no function has scored."""
        weighted = rewards_per_func * self.reward_weights.to(rewards_per_func.device)
        rewards: Tensor = weighted.nansum(dim=1).masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        limits = getattr(self, "reward_clip_range", None)
        return rewards if limits is None else rewards.clamp(*limits)


def _expect_trainer_after_mixin(cls: type) -> None:
    if not hasattr(cls, "training_step"):
        return  # the class is a mixin itself, on top of this one
    order = cls.__mro__
    after = order[order.index(OBLRTrainerMixin) + 1 :]
    if any("training_step" in vars(each) for each in order[: order.index(OBLRTrainerMixin)] if each is not cls):
        raise TypeError(f"{cls.__name__}: put OBLRTrainerMixin first, class {cls.__name__}(OBLRTrainerMixin, ...)")
    missing = [name for name in OVERRIDDEN if not any(name in vars(each) for each in after)]
    if missing:
        raise _unsupported(cls, missing)


def _unsupported(cls: type, missing: list[str]) -> RuntimeError:
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        version = "none"
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not OBLRTrainerMixin)
    return RuntimeError(
        f"{cls.__name__}: expected a GRPOTrainer or RLOOTrainer as of TRL {TESTED}; {bases} (TRL {version} installed) "
        f"lacks {', '.join(missing)}. Install one of these, or call GradWeightedBaseline.advantages() where yours "
        "computes advantages"
    )


def _expect_rewards_without_kl(config: Any) -> None:
    if hasattr(config, "normalize_advantages") and config.beta != 0:  # an RLOOConfig; GRPO has the KL in the loss
        raise ValueError(
            f"beta={config.beta}: RLOOTrainer subtracts the KL divergence from the rewards where a baseline cannot see "
            "it. Set beta=0.0"
        )


def _replace_last(log: deque[float], values: list[float]) -> None:
    """Replace what TRL has just appended, or as much of it as the log holds."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)


def _split_by_prompt(parts: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Split the rows of all micro-batches again: prompts stay in their shuffled order, each in one piece."""
    prompts = torch.cat([part[PROMPT_GROUP] for part in parts])
    _, prompts = torch.unique(prompts, return_inverse=True)
    first = torch.full_like(prompts, len(prompts))
    first = first.scatter_reduce(0, prompts, torch.arange(len(prompts)).to(prompts), "amin")
    order = torch.argsort(first[prompts], stable=True)
    rows = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return [
        {name: _taken(value, indices, len(prompts)) for name, value in rows.items()}
        for indices in torch.split(order, size)
    ]


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], Tensor) and values[0].dim():
        return torch.cat(values)
    return [each for value in values for each in value] if isinstance(values[0], list) else values[0]


def _taken(value: Any, indices: Tensor, rows: int) -> Any:
    if isinstance(value, Tensor) and value.dim():
        return value[indices.to(value.device)]
    return [value[i] for i in indices.tolist()] if isinstance(value, list) and len(value) == rows else value
