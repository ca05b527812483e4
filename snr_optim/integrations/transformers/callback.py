"""``SNRCallback``: the learning rate from measured gradient noise, in any ``transformers.Trainer``.

Here: the callback, and all that has to be known of the Trainer. What it does to the optimizer is next door, in
:mod:`snr_optim.integrations._ceiling`.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
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
    r"""Every optimizer step of a ``Trainer`` at the Trainer's own lr times the signal share of its batch gradient.

    .. math::
        \eta_t = \eta_{\max,t} \cdot \frac{S}{S + V}

    :class:`SNRAdaptiveLR` (OBLR-PO, arXiv 2511.23310, theorem 4), for trainers that own the loop: ``learning_rate``,
    warm-up and decay of the ``TrainingArguments`` are the ceiling ``eta_max``. Every backward pass is a sub-batch:
    ``gradient_accumulation_steps`` x processes of them, measured raw, before clipping. DDP and ``fully_shard``
    (FSDP2) need nothing more.

    **In the log**, ``learning_rate`` is the lr of the step that was done, and :meth:`SNRAdaptiveLR.metrics` are there
    as ``snr/factor``, ``snr/snr``, ``snr/ceiling``, ... (``train/snr/factor`` in TensorBoard and W&B; what is not
    finite, or not known yet, is left out). **Checkpoints** of the Trainer hold the statistics, in
    ``trainer_state.json``, and ``resume_from_checkpoint`` goes on bit for bit; a checkpoint made without the callback
    starts them anew.

    Where the loss is divided by the labels of the whole batch, as it is for causal LMs, a micro-batch counts as much as
    it has labels. A model that is given their number and leaves it unused has means for losses, which count equally: a
    warning says so. Elsewhere all count equally, as they should where they have the same number of samples; the last
    ones of an epoch may not: ``dataloader_drop_last=True`` leaves them out.

    Args:
        options: those of :class:`SNRAdaptiveLR`: ``smoothing``, ``min_factor``, ``max_factor``, ``norm``, ``adapt``,
            ``per_group``.

    Attributes:
        scheduler: the :class:`SNRAdaptiveLR` of the present or last call of ``train()``; None before the first.

    Raises:
        TypeError: ``schedule=``, or an option that :class:`SNRAdaptiveLR` does not have.
        ValueError: what :class:`SNRAdaptiveLR` raises.

    When training begins:
        ``ValueError`` where one backward pass per step in one process leaves nothing to compare; ``RuntimeError`` under
        DeepSpeed, FSDP1, and whatever else :meth:`SNRAdaptiveLR.attach` refuses.

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
        self.statistics: dict[str, Any] | None = None  # set by a Trainer that restores callbacks from a checkpoint
        self._steps: ScaledSteps | None = None
        self._shares: TokenShares | None = None

    def metrics(self) -> dict[str, float]:
        """:meth:`SNRAdaptiveLR.metrics`, about the last step; empty before training begins."""
        return {} if self.scheduler is None else self.scheduler.metrics()

    def state(self) -> dict[str, Any]:
        """What the Trainer puts into ``trainer_state.json``."""
        statistics = None if self.scheduler is None else _to_json(self.scheduler.state_dict())
        return {"args": dict(self.options), "attributes": {"statistics": statistics}}

    # -- what the Trainer calls -------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Model, optimizer and scheduler are as they will be: attach to them."""
        self._remove()  # after a train() that failed
        trainer = _trainer_of(self, state)
        _refuse_what_cannot_work(trainer, args)
        _say_where_prompts_are_split(trainer, args)
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
        """The step is done, and the Trainer is about to look up the lr that it was done with."""
        if self._steps is None:
            return
        theirs = kwargs["lr_scheduler"]
        if _is_read_in_optimizer(theirs):
            self._steps.show()
        else:
            theirs._last_lr = self._steps.scheduler.get_last_lr()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It has looked."""
        if self._steps is not None:
            self._steps.hide()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Into the logs of training steps, and the history that the Trainer has just added them to."""
        if self._steps is None or logs is None or "learning_rate" not in logs:
            return
        ours = {f"snr/{name}": value for name, value in self.metrics().items() if math.isfinite(value)}
        logs.update(ours)
        if state.log_history and "learning_rate" in state.log_history[-1]:  # a log() of one's own may keep none
            state.log_history[-1].update(ours)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hooks off."""
        self._remove()

    def _remove(self) -> None:
        if self._steps is not None and self._shares is not None:
            self._shares.remove()
            self._steps.remove()
            self._steps = self._shares = None


class TokenShares:
    """Micro-batches of a Trainer that divides losses by the labels of the whole batch: each counts by its labels.

    The Trainer hands the number of these labels to every model that takes keywords, but some leave it unused
    (transformers#47688), so that each micro-batch is a mean and counts as much as any other. Which it is, the first
    loss tells: whether that number is in its graph or, where it is not, whether the loss changes with it.

    In the place of three methods of the Trainer, until removed: those that fetch the micro-batches of a step, compute
    the loss of one, and run its backward pass. What somebody else has put there is what they call.
    """

    def __init__(self, trainer: Trainer, steps: ScaledSteps) -> None:
        self._trainer, self._steps = trainer, steps
        self._labels: list[float] = []  # of the micro-batches to come
        # Does the loss divide by the labels of the batch? None: not seen yet. Of a function of the user's own the
        # Trainer takes it for granted.
        self._divides: bool | None = True if trainer.compute_loss_func is not None else None
        self._micro_batch: ExitStack | None = None  # the one whose loss is to be computed
        self._ours = {
            "get_batch_samples": self._get_batch_samples,
            "compute_loss": self._compute_loss,
            "training_step": self._training_step,
        }
        self._theirs = {name: getattr(trainer, name) for name in self._ours}
        self._on_instance = vars(trainer).keys() & self._ours.keys()
        vars(trainer).update(self._ours)

    def remove(self) -> None:
        """Put back what was there, unless somebody has replaced ours since."""
        for name, method in self._ours.items():
            if vars(self._trainer).get(name) == method:
                del vars(self._trainer)[name]
                if name in self._on_instance:
                    vars(self._trainer)[name] = self._theirs[name]

    def _get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, number = self._theirs["get_batch_samples"](*args, **kwargs)
        if number is None:  # losses are means
            self._labels = []
        else:  # the host waits once for each step
            counts = [self._counted(batch).ne(IGNORE_INDEX).sum() for batch in batches]
            self._labels = torch.stack(counts).clamp_min(1).tolist()
        return batches, number

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels that the Trainer counts: a causal LM predicts all but the first, unless they came shifted."""
        if "shift_labels" in batch:
            return batch["shift_labels"]
        return batch["labels"][..., 1:] if getattr(self._trainer, "_loss_shifts_labels", False) else batch["labels"]

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as micro_batch:
            self._micro_batch = micro_batch if self._labels else None
            try:
                return self._theirs["training_step"](*args, **kwargs)
            finally:
                self._micro_batch = None

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Between the forward pass and the backward pass of a micro-batch: now its share can be known."""
        micro_batch, self._micro_batch = self._micro_batch, None
        compute = self._theirs["compute_loss"]
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
                self._divides = depends_on(loss, number) or self._changes(compute, given, kwargs)
                self._say_if_it_is_left_unused()
        else:
            returned = compute(*args, **kwargs)
        if self._divides is not False:
            micro_batch.enter_context(self._steps.handle.sub_batch(size=labels))
        return returned

    def _changes(self, compute: Any, given: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the loss is another one for another number of labels, which it may take as a Python number."""
        losses = []
        for factor in (1, 2):
            number = {"num_items_in_batch": kwargs["num_items_in_batch"] * factor}
            copies = tuple(dict(value) if isinstance(value, dict) else value for value in given)
            with torch.random.fork_rng(), torch.no_grad():  # the same dropout for both
                losses.append(_loss_of(compute(*copies, **{**kwargs, **number})).detach())
        return bool(torch.ne(*losses))

    def _say_if_it_is_left_unused(self) -> None:
        if self._divides or getattr(self._trainer, "loss_is_scaled_for_ga", None) is False:
            return  # and otherwise the Trainer takes their average, as it should
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
    """The Trainer whose callback this is.

    It hands callbacks the bare model, without the DistributedDataParallel around it, and no way from there to itself.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # it stands on the stack, above the handler of its callbacks
        found: Any = frame.f_locals.get("self")
        if issubclass(type(found), Trainer) and getattr(found, "state", None) is state:
            return found  # type: ignore[no-any-return]
        frame = frame.f_back
    for found in gc.get_objects():  # or its handler was called by a loop of somebody else's
        if issubclass(type(found), Trainer) and getattr(found, "state", None) is state:
            return found  # type: ignore[no-any-return]
    raise RuntimeError(
        f"{type(callback).__name__}: called by no transformers Trainer. In a loop of your own, use "
        "SNRAdaptiveLR(optimizer).attach(model)"
    )


def _saved(state: TrainerState) -> dict[str, Any]:
    """By the name of a callback's class; declared as a list, which is what it is made of."""
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


def _say_where_prompts_are_split(trainer: Any, args: TrainingArguments) -> None:
    """In TRL's trainers with groups of outputs, which are no independent draws."""
    size, rows = getattr(trainer, "num_generations", 1), args.per_device_train_batch_size
    split = None
    if size > 1 and not hasattr(trainer, "gradient_weights"):
        split = "OBLRTrainerMixin of snr_optim.integrations.trl keeps prompts whole"
    elif size > 1 and rows % size:
        split = (
            f"per_device_train_batch_size={rows} is no multiple of num_generations={size}: set it to a multiple, and "
            "gradient_accumulation_steps to 2 or more"
        )
    if split is not None:
        warnings.warn(
            "SNRCallback: outputs of one prompt lie in several micro-batches, so that the noise between prompts is not "
            f"seen and the factor is too high. {split}",
            stacklevel=2,
        )


def _is_read_in_optimizer(scheduler: Any) -> bool:
    """Does the Trainer look for the lr in the optimizer, as it does with schedulers that wait for a metric?"""
    return isinstance(scheduler, ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"


def _to_json(value: Any) -> Any:
    """Tensors as numbers and the name of their dtype: Python's JSON keeps every bit of a float64."""
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
