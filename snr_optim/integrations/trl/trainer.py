"""TRL's GRPOTrainer and RLOOTrainer with the gradient-weighted baseline, and which of their settings bias the gradient.

Here: ``OBLRTrainerMixin``, ``check_unbiased``, and all that has to be known of TRL, which is not imported: the class
that is mixed with brings it. The learning rate is the business of
:class:`~snr_optim.integrations.transformers.SNRCallback`.
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
from snr_optim.integrations.trl.settings import check_unbiased

BASELINE_FILE = "oblr_baseline.pt"
GROUP = "oblr_group"  # which prompt of the generated batch a row belongs to
LOSSES = ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")  # whose losses are known
TESTED = "1.14, 1.15 and 1.16"
OVERRIDDEN = ("_generate_and_score_completions", "_calculate_rewards", "_prepare_inputs", "_save_checkpoint")
RELIED_ON = (
    "model", "args", "accelerator", "temperature", "reward_weights", "num_generations", "num_generations_eval",
    "_buffered_inputs", "_step", "_metrics", "_logs",
)  # fmt: skip
BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")

_Trainer: Any = object


class OBLRTrainerMixin(_Trainer):  # type: ignore[misc]  # GRPOTrainer or RLOOTrainer, known only to who mixes
    r"""Advantages from :class:`GradWeightedBaseline`, in place of the mean of the group, in TRL's trainers.

    .. math::
        A_i = r_i - b_i, \qquad
        b_i = \frac{\sum_{j \neq i} w_j r_j + \ldots}{\sum_{j \neq i} w_j + \ldots}, \qquad
        w_j = \sum_t \|e_{y_t} - p_t\|^2

    OBLR-PO (arXiv 2511.23310, theorem 7), with the weights of :func:`logit_grad_norms` summed over the tokens of the
    completion. They cost one forward pass without gradient for each generated batch, and no logits
    (:func:`model_logprob_stats`); :meth:`gradient_weights` is there to be overridden. The baseline learns from every
    generated batch once, after its advantages, and not from evaluation.

    Rewards are TRL's: those of its reward functions, weighted and summed, those of all ranks; NaN, where no function
    scored a completion, gives advantage 0. The advantages in TRL's table of completions are the ones trained with, and
    :meth:`GradWeightedBaseline.metrics` are logged as ``baseline/kappa``, ``baseline/second_moment``, ... Checkpoints
    hold what was learned, in ``oblr_baseline.pt``.

    TRL shuffles all completions before it splits them into micro-batches. Here every micro-batch gets whole prompts, if
    ``per_device_train_batch_size`` is a multiple of ``num_generations``: then micro-batches are independent, as
    :class:`~snr_optim.integrations.transformers.SNRCallback` takes them to be. Otherwise it warns.

    Args:
        args: of the trainer, as are ``kwargs``.
        baseline: another one than ``GradWeightedBaseline()``; without ``process_group``.
        require_unbiased: raise for what :func:`check_unbiased` finds, instead of one warning.
        kwargs: of the trainer.

    Raises:
        TypeError: mixed with something else than such a trainer, or not before it.
        RuntimeError: the trainer of this version of TRL lacks something.
        ValueError: RLOO with ``beta``: its KL penalty is part of rewards that nobody else sees; a baseline with a
            ``process_group``; ``require_unbiased``, and settings that bias the gradient.

    Example:
        >>> from snr_optim.integrations.trl import OBLRTrainerMixin
        >>> # from trl import GRPOTrainer
        >>> # class MyTrainer(OBLRTrainerMixin, GRPOTrainer): pass
        >>> # MyTrainer(model, reward_funcs, GRPOConfig(...), train_dataset=..., callbacks=[SNRCallback()]).train()
    """

    baseline: GradWeightedBaseline
    _rewards_per_func: Tensor | None  # of the batch that is being generated
    _buffered_inputs: Any  # TRL's micro-batches

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
            _expect_rewards_without_kl(argument)  # of the config, before TRL loads a reference model for it
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
        """What of the loss is not in the settings."""
        found = []
        if getattr(self, "aux_loss_enabled", False):
            found.append("the router's auxiliary loss is added to the objective: set router_aux_loss_coef=0.0")
        for name in ("compute_loss", "_compute_loss"):
            theirs = getattr(getattr(type(self), name, None), "__module__", LOSSES[0])
            if theirs not in LOSSES:
                found.append(f"{name} is that of {theirs}, not TRL's: make sure that it is sum A log pi")
        return found

    def gradient_weights(self, batch: dict[str, Any]) -> Tensor:
        r"""``||grad log pi(o)||^2`` of every completion, or what stands for it; only their ratios matter.

        To override, for exact norms or for models with images. It must look at each completion by itself.

        Args:
            batch: of this rank, as TRL makes it: ``prompt_ids`` and ``prompt_mask`` ``[B, P]``, ``completion_ids`` and
                ``completion_mask`` ``[B, C]``, maybe ``tool_mask`` ``[B, C]``.

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
        chosen = batch["completion_mask"]  # by the policy: not what tools have said
        if batch.get("tool_mask") is not None:
            chosen = chosen * batch["tool_mask"]
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        predicted = torch.cat([torch.zeros_like(batch["prompt_mask"]), chosen], dim=1).bool()
        labels = input_ids.masked_fill(~predicted, IGNORE_INDEX)
        rows = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        weights = []
        with torch.no_grad(), self.accelerator.autocast(), warnings.catch_warnings():
            # Reentrant checkpoints say so wherever no gradient is wanted.
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
            for part in torch.split(torch.arange(len(labels), device=labels.device), rows):
                weights.append(self._grad_norms(input_ids[part], attention_mask[part], labels[part]).sum(1))
        return torch.cat(weights)

    def _grad_norms(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        if getattr(self.args, "cast_lm_head_to_fp32", False):  # TRL has put another forward into the head
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
            return logit_grad_norms(logits[:, :-1], labels[:, 1:], temperature=self.temperature)
        names = ["grad_norm_squared"]
        norms = model_logprob_stats(
            self.model, input_ids, labels, temperature=self.temperature, outputs=names, attention_mask=attention_mask
        ).grad_norm_squared
        assert norms is not None  # it was asked for
        return norms

    # -- what TRL calls ---------------------------------------------------------------------------------------

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's, of all ranks, ``[B of all ranks, functions]``; kept until the advantages are computed."""
        self._rewards_per_func = rewards = super()._calculate_rewards(*args, **kwargs)
        return rewards  # type: ignore[no-any-return]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's, but for the advantages."""
        self._rewards_per_func = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        missing = [name for name in BATCH if name not in batch]
        if missing or self._rewards_per_func is None:
            raise _unsupported(type(self), missing or ["a call of _calculate_rewards"])
        training = self.model.training
        mode = "train" if training else "eval"
        size = self.num_generations if training else self.num_generations_eval
        rewards = self._rewards(self._rewards_per_func)
        weights = self.accelerator.gather(self.gradient_weights(batch).to(rewards.device))
        # Every rank has all of them, and so the same baseline.
        advantages = self.baseline.advantages(rewards, weights, groups=size, update=training)
        first = self.accelerator.process_index * len(batch["advantages"])
        mine = slice(first, first + len(batch["advantages"]))
        batch["advantages"] = advantages[mine].to(batch["advantages"])
        batch[GROUP] = torch.arange(len(rewards), device=rewards.device)[mine] // size
        _replace_last(self._logs["advantages"], advantages.tolist())
        for name, value in self.baseline.metrics().items():
            self._metrics[mode][f"baseline/{name}"].append(value)
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but for the order in which a new batch is split into micro-batches."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if not self.model.training or self._buffered_inputs is before:
            return inputs
        size = self.args.per_device_train_batch_size
        images = self._buffered_inputs[0].get("pixel_values") is not None  # their rows are not those of the batch
        if len(self._buffered_inputs) > 1 and size % self.num_generations == 0 and not images:
            self._buffered_inputs = _by_prompt(self._buffered_inputs, size)
            inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]
        return inputs

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, and what the baseline has learned."""
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            torch.save(self.baseline.state_dict(), os.path.join(folder, BASELINE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """TRL's, and what the baseline had learned; a checkpoint made without it starts it anew."""
        super()._load_optimizer_and_scheduler(checkpoint)
        path = os.path.join(checkpoint or "", BASELINE_FILE)
        if checkpoint is not None and os.path.isfile(path):
            self.baseline.load_state_dict(torch.load(path, weights_only=True))

    def _rewards(self, of_functions: Tensor) -> Tensor:
        """``[B]``: weighted and summed as TRL does it; NaN where no function has scored."""
        weighted = of_functions * self.reward_weights.to(of_functions.device)
        rewards: Tensor = weighted.nansum(dim=1).masked_fill(of_functions.isnan().all(dim=1), torch.nan)
        limits = getattr(self, "reward_clip_range", None)
        return rewards if limits is None else rewards.clamp(*limits)


def _expect_trainer_after_mixin(cls: type) -> None:
    if not hasattr(cls, "training_step"):
        return  # a mixin on top of this one
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
    if hasattr(config, "normalize_advantages") and config.beta != 0:  # RLOOConfig; GRPO's KL is a part of the loss
        raise ValueError(
            f"beta={config.beta}: RLOOTrainer subtracts the KL divergence from the rewards where a baseline cannot see "
            "it. Set beta=0.0"
        )


def _replace_last(log: deque[float], values: list[float]) -> None:
    """What TRL has just appended, or as much of it as the log holds."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)


def _by_prompt(parts: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """The rows of all micro-batches again, prompts in their shuffled order, but each as a whole."""
    group = torch.cat([part[GROUP] for part in parts])
    _, group = torch.unique(group, return_inverse=True)
    first = torch.full_like(group, len(group)).scatter_reduce(0, group, torch.arange(len(group)).to(group), "amin")
    order = torch.argsort(first[group], stable=True)
    rows = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return [
        {name: _taken(value, indices, len(group)) for name, value in rows.items()}
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
