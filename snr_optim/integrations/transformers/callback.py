"""``SNRCallback``: the learning rate from measured gradient noise, in any ``transformers.Trainer``.

Here: the callback, and all that it has to know about the Trainer. What it does to the optimizer is in
:mod:`snr_optim.integrations._ceiling`.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from snr_optim._torch import depends_on
from snr_optim.causal_lm import IGNORE_INDEX
from snr_optim.integrations._ceiling import ScaledSteps, check_options
from snr_optim.scheduler import SNRAdaptiveLR


class SNRCallback(TrainerCallback, ExportableState):
    r"""Runs every optimizer step of a ``Trainer`` at the Trainer's own lr, times the signal share of its gradient.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}

    This is :class:`SNRAdaptiveLR` (OBLR-PO, arXiv 2511.23310, theorem 4) for trainers that own the loop:
    ``learning_rate``, warm-up and decay of the ``TrainingArguments`` set the ceiling ``eta_max``. Every backward pass
    of every process is a sub-batch, so a step has ``gradient_accumulation_steps`` x processes of them. Their gradients
    are measured before clipping. DDP and ``fully_shard`` (FSDP2) need nothing more.

    **In the log**, ``learning_rate`` is the lr of the step that was done. The metrics of :meth:`SNRAdaptiveLR.metrics`
    stand beside it as ``snr/factor``, ``snr/snr``, ``snr/ceiling``, ... (``train/snr/factor`` in TensorBoard and W&B);
    a metric that is not finite, or not known yet, is left out. **Checkpoints** of the Trainer hold the statistics in
    ``trainer_state.json``, and ``resume_from_checkpoint`` goes on bit for bit. From a checkpoint that was made without
    the callback, the statistics start anew.

    Where the Trainer divides the loss by the number of labels in the whole batch, as it does for causal LMs, a
    micro-batch counts in proportion to its labels. Some models are given that number and leave it unused; the losses of
    their micro-batches are means, which count equally, and a warning says so. Elsewhere all micro-batches count
    equally,
    which is right if they have equally many samples. The last ones of an epoch may have fewer:
    ``dataloader_drop_last=True`` leaves them out.

    Args:
        options: the options of :class:`SNRAdaptiveLR`: ``smoothing``, ``min_factor``, ``max_factor``, ``norm``,
            ``adapt``, ``per_group``.

    Attributes:
        scheduler: the :class:`SNRAdaptiveLR` of the present or last call of ``train()``; None before the first.

    Raises:
        TypeError: ``schedule=``, or an option that :class:`SNRAdaptiveLR` does not have.
        ValueError: :class:`SNRAdaptiveLR` refuses the value of an option.

    When training begins:
        ``ValueError`` where a step has one backward pass in one process, which leaves nothing to compare;
        ``RuntimeError`` under DeepSpeed and FSDP1, and wherever :meth:`SNRAdaptiveLR.attach` raises it.

    Example:
        >>> from transformers import Trainer
        >>> callback = SNRCallback(min_factor=0.05)
        >>> # Trainer(model, args, train_dataset=..., callbacks=[callback]).train()
        >>> callback.metrics()
        {}
    """

    def __init__(self, **options: Any) -> None:
        check_options(options)
        self.options = options
        self.scheduler: SNRAdaptiveLR | None = None
        self.statistics: dict[str, Any] | None = None  # a Trainer that restores callbacks from a checkpoint sets it
        self._steps: ScaledSteps | None = None
        self._shares: TokenShares | None = None

    def metrics(self) -> dict[str, float]:
        """Return :meth:`SNRAdaptiveLR.metrics` of the last step; they are empty before training begins."""
        return {} if self.scheduler is None else self.scheduler.metrics()

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into ``trainer_state.json``."""
        statistics = None if self.scheduler is None else _to_json(self.scheduler.state_dict())
        return {"args": dict(self.options), "attributes": {"statistics": statistics}}

    # -- what the Trainer calls -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to model and optimizer, which the Trainer has wrapped and sharded by now."""
        self._remove()  # after a train() that failed
        trainer = _trainer_of(self, state)
        _refuse_what_cannot_work(trainer, args)
        _warn_if_prompts_are_split(trainer, args)
        name = type(self).__name__
        callbacks = trainer.callback_handler.callbacks
        if sum(isinstance(callback, SNRCallback) for callback in callbacks) > 1:
            raise ValueError(f"callbacks: expected one {name}, the Trainer has several")
        # Before all others, so that those that write logs find our metrics in them.
        callbacks.remove(self)
        callbacks.insert(0, self)
        self._steps = ScaledSteps(kwargs["optimizer"], trainer.model_wrapped, **self.options)
        self._shares = TokenShares(trainer, self._steps)
        self.scheduler = self._steps.scheduler
        # The Trainer expects an entry when it saves; a checkpoint made without this callback has none.
        saved = _saved(state).setdefault(name, self.state())
        statistics = saved["attributes"]["statistics"]
        if state.global_step > 0 and statistics is not None:
            self._steps.load_state_dict(_from_json(statistics))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the Trainer, which is about to look it up, the lr of the step that was done."""
        if self._steps is None:
            return
        schedule = kwargs["lr_scheduler"]
        if _is_read_in_optimizer(schedule):
            self._steps.write_last_lrs()
        else:
            # What torch's get_last_lr() returns until the Trainer steps its schedule, which computes it anew: torch has
            # no public way to set it.
            schedule._last_lr = self._steps.scheduler.get_last_lr()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the ceilings back, now that the Trainer has looked the lr up."""
        if self._steps is not None:
            self._steps.restore_ceilings()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add our metrics to the log of a training step, and to the history where the Trainer has just put it."""
        if self._steps is None or logs is None or "learning_rate" not in logs:
            return
        metrics = {f"snr/{name}": value for name, value in self.metrics().items() if math.isfinite(value)}
        logs.update(metrics)
        if state.log_history and "learning_rate" in state.log_history[-1]:  # a log() of the user's own may keep none
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._remove()

    def _remove(self) -> None:
        if self._steps is not None and self._shares is not None:
            self._shares.remove()
            self._steps.remove()
            self._steps = self._shares = None


class TokenShares:
    """Lets each micro-batch count by its labels, in a Trainer that divides losses by the labels of the whole batch.

    The Trainer hands the number of these labels to every model that takes keywords, but some leave it unused
    (transformers#47688), and then each micro-batch is a mean, which counts as much as any other. The first loss tells
    which it is: either the number is in its graph, or else the loss is computed again with another number.

    Until it is removed, it stands in for three methods of the Trainer: those that fetch the micro-batches of a step,
    compute the loss of one, and run its backward pass. Each calls the method that it found, whoever put it there.
    """

    def __init__(self, trainer: Trainer, steps: ScaledSteps) -> None:
        self._trainer, self._steps = trainer, steps
        self._labels: list[float] = []  # how many labels each micro-batch to come has
        # Whether the loss divides by the labels of the batch; None until a loss was seen. The Trainer takes it for
        # granted of a loss function that the user has given.
        self._divides: bool | None = True if trainer.compute_loss_func is not None else None
        self._micro_batch: ExitStack | None = None  # ends with the micro-batch whose loss is computed next
        self._replacements = {
            "get_batch_samples": self._get_batch_samples,
            "compute_loss": self._compute_loss,
            "training_step": self._training_step,
        }
        self._originals = {name: getattr(trainer, name) for name in self._replacements}
        self._on_instance = vars(trainer).keys() & self._replacements.keys()
        vars(trainer).update(self._replacements)

    def remove(self) -> None:
        """Put the original methods back, except where somebody has replaced a replacement since."""
        for name, method in self._replacements.items():
            if vars(self._trainer).get(name) == method:
                del vars(self._trainer)[name]
                if name in self._on_instance:
                    vars(self._trainer)[name] = self._originals[name]

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, number = self._originals["get_batch_samples"](*args, **kwargs)
        if number is None:  # losses are means
            self._labels = []
        else:  # the host waits once for each step
            counts = [self._counted(batch).ne(IGNORE_INDEX).sum() for batch in batches]
            self._labels = torch.stack(counts).clamp_min(1).tolist()
        return batches, number

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the labels that the Trainer counts: all but the first for a causal LM, unless they are shifted."""
        if "shift_labels" in batch:
            return batch["shift_labels"]
        return batch["labels"][..., 1:] if getattr(self._trainer, "_loss_shifts_labels", False) else batch["labels"]

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as micro_batch:
            self._micro_batch = micro_batch if self._labels else None
            try:
                return self._originals["training_step"](*args, **kwargs)
            finally:
                self._micro_batch = None

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, and say what share of the batch the backward pass to come has: only now it can be known."""
        micro_batch, self._micro_batch = self._micro_batch, None
        compute = self._originals["compute_loss"]
        if micro_batch is None:  # an evaluation
            return compute(*args, **kwargs)
        labels = self._labels.pop(0)
        number = kwargs.get("num_items_in_batch")
        if self._divides is None and isinstance(number, Tensor):
            given = tuple(dict(value) if isinstance(value, dict) else value for value in args)  # compute pops labels
            number = number.detach().to(torch.float32).requires_grad_()
            returned = compute(*args, **{**kwargs, "num_items_in_batch": number})
            loss = _loss_of(returned)
            if loss.grad_fn is not None:
                self._divides = depends_on(loss, number) or self._differs_with_the_number(compute, given, kwargs)
                self._warn_if_the_number_is_unused()
        else:
            returned = compute(*args, **kwargs)
        if self._divides is not False:
            micro_batch.enter_context(self._steps.handle.sub_batch(size=labels))
        return returned

    def _differs_with_the_number(
        self, compute: Callable[..., Any], given: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether another number of labels gives another loss, which may have read it as a Python number."""
        losses = []
        for factor in (1, 2):
            number = {"num_items_in_batch": kwargs["num_items_in_batch"] * factor}
            copies = tuple(dict(value) if isinstance(value, dict) else value for value in given)
            with torch.random.fork_rng(), torch.no_grad():  # the same dropout for both
                losses.append(_loss_of(compute(*copies, **{**kwargs, **number})).detach())
        return bool(torch.ne(*losses))

    def _warn_if_the_number_is_unused(self) -> None:
        if self._divides or getattr(self._trainer, "loss_is_scaled_for_ga", None) is False:
            return  # in the second case the Trainer averages the micro-batches itself, as it should
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        warnings.warn(
            f"SNRCallback: the loss of {type(model).__name__} does not depend on num_items_in_batch, the number of "
            "labels in the batch that the Trainer passes (transformers#47688). So each micro-batch is a mean, and all "
            "count equally; but their gradients are summed, where the Trainer would otherwise average them: set "
            "trainer.model_accepts_loss_kwargs = False before train() to have that.",
            stacklevel=2,
        )


def _loss_of(returned: Any) -> Tensor:
    loss: Tensor = returned[0] if isinstance(returned, tuple) else returned
    return loss


def _trainer_of(callback: SNRCallback, state: TrainerState) -> Trainer:
    """Find the Trainer that calls this callback.

    A Trainer hands its callbacks the bare model, without the DistributedDataParallel around it, and no way to itself.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # the Trainer stands on the stack, above the handler of its callbacks
        found: Any = frame.f_locals.get("self")
        if issubclass(type(found), Trainer) and getattr(found, "state", None) is state:
            return found  # type: ignore[no-any-return]
        frame = frame.f_back
    for found in gc.get_objects():  # or a loop of somebody else's has called the handler
        if issubclass(type(found), Trainer) and getattr(found, "state", None) is state:
            return found  # type: ignore[no-any-return]
    raise RuntimeError(
        f"{type(callback).__name__}: no transformers Trainer calls it. In a loop of your own, use "
        "SNRAdaptiveLR(optimizer).attach(model)"
    )


def _saved(state: TrainerState) -> dict[str, Any]:
    """Return what the Trainer has saved of its callbacks, by class name; the type that it declares is wrong."""
    saved: Any = state.stateful_callbacks
    return saved  # type: ignore[no-any-return]


def _refuse_what_cannot_work(trainer: Trainer, args: TrainingArguments) -> None:
    if trainer.is_deepspeed_enabled:
        raise RuntimeError("deepspeed: it reduces gradients itself, where nothing can be measured; use DDP or FSDP2")
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) != 2:
        raise RuntimeError('fsdp: FSDP1 flattens parameters; set fsdp_config={"version": 2}, which is measured')
    if isinstance(trainer.lr_scheduler, SNRAdaptiveLR):
        raise ValueError(
            "optimizers: their scheduler is an SNRAdaptiveLR already; keep the callback and give the Trainer a plain "
            "one, or none"
        )
    if str(getattr(args.optim, "value", args.optim)) in ("lomo", "adalomo"):
        raise ValueError(f"optim={args.optim!s}: it steps inside backward(), before the batch is known; use another")
    if args.gradient_accumulation_steps * args.world_size < 2:
        raise ValueError(
            "gradient_accumulation_steps=1 in one process: one backward() per optimizer step says nothing about noise. "
            f"Set gradient_accumulation_steps to 2 or more (per_device_train_batch_size="
            f"{args.per_device_train_batch_size} divided by as much keeps the batch), best 4 to 16"
        )


def _warn_if_prompts_are_split(trainer: Any, args: TrainingArguments) -> None:
    """Warn where TRL spreads the outputs of a prompt over micro-batches, which are then not independent draws."""
    size, rows = getattr(trainer, "num_generations", 1), args.per_device_train_batch_size
    split = None
    if size > 1 and not hasattr(trainer, "gradient_weights"):
        split = "OBLRTrainerMixin of snr_optim.integrations.trl keeps prompts whole"
    elif size > 1 and rows % size:
        split = (
            f"per_device_train_batch_size={rows} is not a multiple of num_generations={size}: set it to a multiple, "
            "and gradient_accumulation_steps to 2 or more"
        )
    if split is not None:
        warnings.warn(
            "SNRCallback: outputs of one prompt lie in several micro-batches, so that the noise between prompts is not "
            f"seen and the factor is too high. {split}",
            stacklevel=2,
        )


def _is_read_in_optimizer(scheduler: Any) -> bool:
    """Whether the Trainer logs the lr that it finds in the optimizer, as it does for schedules that need a metric."""
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"


def _to_json(value: Any) -> Any:
    """Replace tensors by their numbers and the name of their dtype: Python's JSON keeps every bit of a float64."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if isinstance(value, dict):
        return {"items": {name: _to_json(each) for name, each in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_to_json(each) for each in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict) and "dtype" in value:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, dict):
        return {name: _from_json(each) for name, each in value["items"].items()}
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    return value
