"""The learning rate set by measured gradient noise: ``SNRAdaptiveLR``, a true ``LRScheduler``.

``observe()`` and ``attach()`` fold moments into the averages; ``step()`` lets the inner schedule move, where there is
one, and writes ceiling x factor into the optimizer. Without ``schedule=`` it may be called as often as a trainer likes.
Where moments come from is the business of :mod:`snr_optim.noise`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from snr_optim._lr import (
    LR,
    Mark,
    copied,
    copies_of,
    expect_lrs,
    ignores_lr,
    lrs_of,
    separate_lrs,
    share_lrs,
    unwrapped_optimizer,
    write_lrs,
)
from snr_optim.attachment import Attachment, MeasuredBatch
from snr_optim.noise import AdamNorm, Norm, euclidean
from snr_optim.noise.averages import MomentAverages
from snr_optim.noise.moments import GradientMoments

AUTO_SMOOTHING = 0.95


class SNRAdaptiveLR(LRScheduler):
    r"""Scales every learning rate by the share of signal in the measured gradient.

    .. math::
        \eta_t = \eta_{\max} \cdot \frac{S}{S + V}, \qquad
        S = \|\nabla J\|^2, \quad V = \operatorname{tr} \operatorname{Cov}(\hat g)

    This is theorem 4 of OBLR-PO (arXiv 2511.23310) with ``rho = N_t SNR_t = S / V``; the same form as
    ``eps_opt = eps_max / (1 + B_noise / B)`` of McCandlish et al. 2018 (arXiv 1812.06162, eq. 2.7), and the
    factor by which James and Stein would shrink the gradient. It minimises the descent bound
    ``-eta S + (C / 2) eta^2 (S + V)``. ``S`` and ``V`` are averaged over batches (:class:`MomentAverages`),
    divided once, and clamped last.

    Each group's lr at construction is its ceiling ``eta_max``, or with ``schedule=`` whatever that
    scheduler says at the moment. Since the factor is often 0.05 to 0.5, a ceiling above the best constant
    learning rate is the usual choice. A tensor lr that several groups share becomes a tensor for each, before the
    first step: build the scheduler before steps are compiled or captured.

    :meth:`attach` measures the moments in any training loop; :meth:`observe` takes them from anywhere else.
    Timing: ``observe()`` *before* ``optimizer.step()`` lets batch ``t`` set its own step, as in the paper and in
    ``attach()``; *after* it, the factor lags one step and is independent of the noise in the step that it scales.

    Args:
        optimizer: any ``torch.optim.Optimizer``; a wrapper's own, such as accelerate's, is found in it.
        schedule: an inner scheduler on the same optimizer that moves the ceiling: warm-up, cosine,
            ``SequentialLR``, ... ``step()`` steps it, so do not step it yourself. (``ChainedScheduler``
            would let its closed-form members overwrite the factor.)
        smoothing: weight of the past in the averages, in ``[0, 1)``; ``0`` is the current batch alone, as in the paper.
            ``"auto"``: 0.95, and the factor is pulled to its floor where it cannot be told from zero
            (:meth:`MomentAverages.shrunk_ratio`).
        min_factor: floor that keeps the learning rate alive where no signal can be measured.
        max_factor: upper clamp, at most 1; also the factor until anything is known.
        norm: the norm that ``attach()`` takes of gradients. ``"euclidean"``: the 2-norm, as in the paper.
            ``"adam"``: the metric of Adam's step (:class:`AdamNorm`), known from the second step on; with an
            optimizer that is not an Adam variant, Euclidean after one warning. What is given to ``observe()`` is taken
            as it is.
        adapt: ``False`` measures and reports but leaves the ceiling as the learning rate.
        per_group: a factor of its own for every parameter group, from its own gradients, in place of one for all.

    Raises:
        TypeError: ``optimizer`` is not an ``Optimizer`` or has a group without an lr, or ``schedule`` is not an
            ``LRScheduler`` that steps by itself.
        ValueError: ``schedule`` drives another optimizer, or writes several lrs into one tensor; a number is out of its
            range, or ``norm`` is unknown.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
        >>> scheduler.observe(GradientMoments(sq_norm_of_mean=2.0, mean_of_sq_norms=5.0, num_sub_batches=4))
        >>> scheduler.factor, optimizer.param_groups[0]["lr"]
        (0.5, 0.5)
        >>> optimizer.step()
        >>> scheduler.step()
    """

    _last_lr: list[LR]

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        *,
        smoothing: float | Literal["auto"] = "auto",
        min_factor: float = 0.01,
        max_factor: float = 1.0,
        norm: Literal["euclidean", "adam"] = "euclidean",
        adapt: bool = True,
        per_group: bool = False,
    ) -> None:
        optimizer = unwrapped_optimizer(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        expect_lrs(optimizer)
        if schedule is not None:
            if not isinstance(schedule, LRScheduler) or isinstance(schedule, (ReduceLROnPlateau, SNRAdaptiveLR)):
                raise TypeError(
                    "schedule: expected an LRScheduler that needs no metric and is no SNRAdaptiveLR, "
                    f"got {type(schedule).__name__}; of accelerate's wrapper, pass what was given to prepare()"
                )
            if unwrapped_optimizer(schedule.optimizer) is not optimizer:
                raise ValueError("schedule: expected a scheduler of the same optimizer")
            if share_lrs(optimizer) and _differs_by_group(schedule):
                raise ValueError(
                    "schedule: it writes another lr for each parameter group, but several groups share one tensor, "
                    "which holds the last of them. Give every group an lr of its own before building the schedule: "
                    'for group in optimizer.param_groups: group["lr"] = group["lr"].clone()'
                )
        if not 0 <= min_factor <= max_factor <= 1:
            raise ValueError(
                f"min_factor, max_factor: expected 0 <= min_factor <= max_factor <= 1, got {min_factor}, {max_factor}"
            )
        if norm not in ("euclidean", "adam"):
            raise ValueError(f"norm: expected 'euclidean' or 'adam', got {norm!r}")
        if ignores_lr(optimizer):
            warnings.warn(
                f"optimizer: the steps of {type(optimizer).__name__} do not depend on the lr in its parameter groups, "
                "so that scaling it changes nothing. Use an optimizer that moves by its lr, or adapt=False to measure.",
                stacklevel=2,
            )
        separate_lrs(optimizer)
        self.schedule = schedule
        # What the inner schedule wrote last. Not its get_last_lr(): in torch 2.6 a tensor there is the live lr.
        self._scheduled = copies_of(lrs_of(optimizer))
        self.min_factor, self.max_factor = float(min_factor), float(max_factor)
        self.norm, self.adapt, self.per_group = norm, adapt, per_group
        self._shrinks = smoothing == "auto"
        beta = AUTO_SMOOTHING if smoothing == "auto" else smoothing
        self._averages = MomentAverages(beta)
        self._group_averages = [MomentAverages(beta) for _ in optimizer.param_groups] if per_group else []
        self._floor_bound = torch.zeros((), dtype=torch.float64)
        self._dropped = 0
        self._attachment: Attachment | None = None
        self._warned = self._overwritten_before = self._observed = False
        self._in_sequence = False  # of a SequentialLR, whose other children write the lr in their time
        self._marks: list[Mark] | None = None  # on what was written last; None while another scheduler is in charge
        self._by_value = False  # equal lrs stand for those marked: a checkpoint or a copy has put others in their place
        # In torch 2.6 a SequentialLR makes initial_lr the live tensor, which its first child then overwrites.
        self._initial_lrs = copies_of([group.get("initial_lr", group["lr"]) for group in optimizer.param_groups])
        self._at_construction: list[LR] | None = copies_of(lrs_of(optimizer))
        super().__init__(optimizer)
        self._at_construction = None

    # -- statistics ---------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> Attachment:
        """Measure every batch of a training loop, and set the lr of its own ``optimizer.step()``.

        Hooks on the parameters of the optimizer catch the raw gradient of every ``backward()``, before clipping and
        unscaling; each is a sub-batch, on each data-parallel rank. Gradient accumulation, ``GradScaler`` (through its
        ``step()``), autocast, DDP, ``fully_shard``, LoRA, checkpointing and compiled models need nothing more. With
        one ``backward()`` per step on one rank the noise is unknown, and the factor stays as it is.

        A backward pass that reaches none of the optimizer's parameters is not seen: state it as an empty
        ``sub_batch``. A closure is measured every time that the optimizer calls it. Moments come by another way than
        :meth:`observe`, which is not called, and is not to be called for the same batches too.

        Args:
            model: holds the parameters of the optimizer. Wrap, shard and prepare it first.

        Returns:
            A handle: ``.remove()``, ``.sub_batch(size)`` for micro-batches of unequal size; also a context manager.

        Raises:
            RuntimeError: attached already; or the model is parallelised in a way that cannot be measured.
            ValueError: parameters of the optimizer are not in ``model``, or none requires grad.
            TypeError: the optimizer runs no step hooks (a wrapper of another kind), or is ``LBFGS``.
            NotImplementedError: ``norm="adam"`` with a sharded model, whose second moments are in pieces.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if self._attachment is not None and self._attachment.attached:
            raise RuntimeError("attach: already attached; remove() the first handle before")
        self._dropped = self._unstepped()  # those of an earlier handle
        norm = euclidean if self.norm == "euclidean" else self._optimizer_norm(model)
        self._attachment = Attachment(self.optimizer, model, norm, self._take_over)
        return self._attachment

    def observe(self, moments: GradientMoments | Sequence[GradientMoments]) -> None:
        """Fold the moments of one batch in, and set the lr of the next ``optimizer.step()``.

        Moments that carry no information (one sub-batch, all gradients zero, NaN or inf) leave factor and
        lr as they were, and are counted in :meth:`metrics`. Inside a ``SequentialLR``, while another
        scheduler is in charge, only the statistics move.

        Args:
            moments: of the whole gradient; or one of each parameter group, in order, as ``per_group=True`` needs.

        Raises:
            TypeError: ``moments`` is no :class:`GradientMoments`, nor a sequence of them.
            ValueError: not one for each parameter group.
        """
        parts = [moments] if isinstance(moments, GradientMoments) else moments
        if not isinstance(parts, Sequence) or not all(isinstance(part, GradientMoments) for part in parts):
            raise TypeError(f"moments: expected GradientMoments, or one for each group, got {type(moments).__name__}")
        whole = moments if isinstance(moments, GradientMoments) else GradientMoments.of_parts(parts)
        self._fold_in(whole, parts, one_each=self.per_group or parts is moments)

    def _take_over(self, batch: MeasuredBatch) -> None:
        """A step of the optimizer begins, and ``attach()`` has measured its batch."""
        self._dropped += batch.dropped
        self._fold_in(batch.whole, batch.by_parameter_group, one_each=True)
        overwritten = self.last_epoch >= 0 and not self._in_charge()
        # A single step may be at another lr: torch.distributed.checkpoint makes an optimizer's state by one of lr 0.
        if overwritten and self._overwritten_before and not self._in_sequence:
            self._warn_if_overwritten()
        self._overwritten_before = overwritten

    def _fold_in(
        self, whole: GradientMoments, by_parameter_group: Sequence[GradientMoments], *, one_each: bool
    ) -> None:
        self._adopt_new_groups()
        groups, given = len(self.optimizer.param_groups), len(by_parameter_group)
        if one_each and given != groups:
            raise ValueError(f"moments: expected one for each of the {groups} parameter groups, got {given}")
        self._observed = True
        before = self._averages.observations
        self._averages.update(whole)
        for averages, part in zip(self._group_averages, by_parameter_group, strict=False):
            averages.update(part)
        folded_in = self._averages.observations > before.to(self._averages.observations.device)
        lowest = torch.stack([self._ratio(averages).nan_to_num(1.0) for averages in self._used_averages()]).min()
        floor_binds = folded_in & (lowest < self.min_factor)
        self._floor_bound = self._floor_bound.to(floor_binds.device) + floor_binds
        if self._in_charge():
            self._write_lr()

    @property
    def factor(self) -> float:
        """``S / (S + V)`` averaged, clamped to ``[min_factor, max_factor]``; ``max_factor`` until known."""
        return self._factor(self._averages).item()

    def metrics(self) -> dict[str, float]:
        """What a tracker should log, as plain floats; NaN where nothing is known yet.

        Keys: ``factor``; ``lr`` and ``ceiling`` (first group, as they stand: the lr of the last ``optimizer.step()``
        until ``step()`` moves the ceiling);
        averaged ``signal``, ``noise`` and ``snr = signal / noise`` with its ``snr_standard_error`` (from the spread
        over batches, so NaN below two, and with ``smoothing=0``); ``degrees_of_freedom`` of the noise;
        ``critical_batch_size = noise / signal`` x the number of sub-batches: the gradient noise scale
        ``tr(Sigma) / ||G||^2`` of McCandlish et al. 2018 (eq. 2.9), in units of one sub-batch (inf where no signal is
        left); and the counts ``observations``, ``floor_bound`` (observations that found
        a factor below ``min_factor``), ``skipped_single`` (fewer than two sub-batches), ``skipped_flat`` (all gradients
        zero), ``skipped_invalid`` (NaN, inf, impossible or not measurable) and ``skipped_unstepped`` (batches
        whose gradients were cleared without a step of this optimizer, as when a ``GradScaler`` skips it, or after the
        backward pass of another optimizer's loss; counted when the gradients are cleared). With ``per_group=True`` also
        ``factor_group_0``, ``lr_group_0``, ...
        """
        averages = self._averages
        tensors = {
            "factor": self._factor(averages),
            "signal": averages.signal(),
            "noise": averages.noise(),
            "ratio_error": averages.ratio_standard_error(),
            "degrees_of_freedom": averages.degrees_of_freedom(),
            "num_sub_batches": averages.num_sub_batches,
            "observations": averages.observations,
            "floor_bound": self._floor_bound,
            "skipped_single": averages.skipped_single,
            "skipped_flat": averages.skipped_flat,
            "skipped_invalid": averages.skipped_invalid,
        }
        for number, group in enumerate(self._group_averages):
            tensors[f"factor_group_{number}"] = self._factor(group)
        device = averages.weight.device
        values = torch.stack([tensor.to(device, averages.weight.dtype) for tensor in tensors.values()])
        metrics = dict(zip(tensors, values.tolist(), strict=True))  # waits once
        signal, noise, num, error = (metrics[name] for name in ("signal", "noise", "num_sub_batches", "ratio_error"))
        del metrics["num_sub_batches"], metrics["ratio_error"]
        metrics["lr"], metrics["ceiling"] = float(self._last_lr[0]), float(self._ceilings()[0])
        metrics["snr"] = signal / noise if noise else math.copysign(math.inf, signal)
        # d (r / (1 - r)) = dr / (1 - r)^2, and 1 - r = V / (S + V)
        metrics["snr_standard_error"] = error * ((signal + noise) / noise) ** 2 if noise else math.nan
        metrics["critical_batch_size"] = math.inf if signal <= 0 else noise / signal * num
        metrics["skipped_unstepped"] = float(self._unstepped())
        for number, lr in enumerate(self._last_lr if self.per_group else []):
            metrics[f"lr_group_{number}"] = float(lr)
        return metrics

    def _optimizer_norm(self, model: nn.Module) -> Norm:
        if not AdamNorm.suits(self.optimizer):
            warnings.warn(
                f"norm='adam': {type(self.optimizer).__name__} keeps no second moment as Adam does; "
                "norms are Euclidean.",
                stacklevel=3,
            )
            return euclidean
        if any(hasattr(p, "placements") for p in model.parameters()):
            raise NotImplementedError("norm='adam': not with sharded parameters; use norm='euclidean'")
        return AdamNorm(self.optimizer)

    def _unstepped(self) -> int:
        """Batches whose gradients were cleared without a step, those that were noticed since the last one included."""
        return self._dropped + (0 if self._attachment is None else self._attachment.dropped)

    # -- learning rate ------------------------------------------------------------------------------

    def step(self, epoch: int | None = None) -> None:
        """Let the inner schedule move, then write ceiling x factor into every group.

        Call it after ``optimizer.step()``, as always. Without an inner schedule it is a pure function of
        what was observed: eight calls are one call.

        Args:
            epoch: ignored; some trainers pass an increment, and torch's own schedulers pass 0.

        Raises:
            TypeError: a metric was passed; statistics go to :meth:`observe`.
        """
        if epoch is not None and not isinstance(epoch, int):
            raise TypeError(f"step: takes no metric, got {type(epoch).__name__}; statistics go to observe()")
        if self.last_epoch < 0:
            self._start()
        else:
            self._warn_if_overwritten()
            self._warn_if_not_measured()
            self._step_schedule()
        self._step_count = getattr(self, "_step_count", 0) + 1
        self.last_epoch += 1
        self._write_lr()

    def set_ceilings(self, ceilings: Sequence[LR]) -> None:
        """Take these ceilings from now on, and write ceiling x factor: for code that schedules them by other means.

        Args:
            ceilings: one for each parameter group, in order.

        Raises:
            RuntimeError: there is an inner ``schedule``, which says what they are.
            ValueError: not one for each parameter group.
        """
        if self.schedule is not None:
            raise RuntimeError("set_ceilings: schedule= says what the ceilings are; build the scheduler without it")
        self._adopt_new_groups()
        if len(ceilings) != len(self.base_lrs):
            raise ValueError(
                f"ceilings: expected one for each of the {len(self.base_lrs)} parameter groups, got {len(ceilings)}"
            )
        self.base_lrs = copies_of(list(ceilings))
        self._write_lr()

    @property
    def total_steps(self) -> int:
        """Steps until the inner schedule ends, where it has an end: accelerate does not step ``OneCycleLR`` past it."""
        steps: int = self.schedule.total_steps  # type: ignore[union-attr]  # no such attribute: hasattr() says so
        return steps

    def get_lr(self) -> list[LR]:
        """Ceiling x factor, one per parameter group."""
        ceilings = self._ceilings()
        if not self.adapt:
            return list(ceilings)
        factors = torch.stack([self._factor(averages) for averages in self._used_averages()])
        factors = factors.expand(len(ceilings))
        tensors = [lr for lr in ceilings if isinstance(lr, Tensor)]
        if len(tensors) == len(ceilings):  # waits for nothing
            return [lr * factor.to(lr.device) for lr, factor in zip(tensors, factors, strict=True)]
        return [lr * number for lr, number in zip(ceilings, factors.tolist(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        """A copy is not attached, as its optimizer is a copy without hooks; lrs that were ours are the copy's."""
        marks = self._marks if self._in_charge() else None
        observed = self._observed and self._attachment is None  # or it will be said that nothing measures
        changes = {"_observed": observed, "_marks": marks, "_by_value": True, "_dropped": self._unstepped()}
        return {**self.__dict__, "_attachment": None, **changes}

    def _start(self) -> None:
        """Choose the ceilings. When built, the lrs that are there: ``initial_lr`` may be that of an earlier scheduler.

        A ``SequentialLR`` starts its children anew, when it has put the ``initial_lr`` of all groups back.
        """
        self._in_sequence = self._at_construction is None
        if self._at_construction is not None:
            self.base_lrs = copies_of(self._at_construction)
            return
        initial = [group["initial_lr"] for group in self.optimizer.param_groups]
        for number, (lr, live) in enumerate(zip(self._initial_lrs, lrs_of(self.optimizer), strict=False)):
            if isinstance(live, Tensor) and initial[number] is live:  # which torch 2.6 has overwritten
                initial[number] = lr
        self.base_lrs = copies_of(initial)

    def _update_lr(self, epoch: int | None = None) -> None:
        """What ``SequentialLR`` calls, instead of ``step()``, to hand over to this scheduler."""
        if self.last_epoch < 0:
            self._start()
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write_lr()

    def _ceilings(self) -> list[LR]:
        return self.base_lrs if self.schedule is None else self._scheduled

    def _used_averages(self) -> list[MomentAverages]:
        return self._group_averages if self.per_group else [self._averages]

    def _ratio(self, averages: MomentAverages) -> Tensor:
        return averages.shrunk_ratio() if self._shrinks else averages.ratio()

    def _factor(self, averages: MomentAverages) -> Tensor:
        clamped = self._ratio(averages).clamp(self.min_factor, self.max_factor)
        return torch.where(averages.observations > 0, clamped, self.max_factor)

    def _step_schedule(self) -> None:
        if self.schedule is None:
            return
        self._adopt_new_groups()
        ours, in_charge = copies_of(lrs_of(self.optimizer)), self._in_charge()
        write_lrs(self.optimizer, self._scheduled)  # recursive schedules read their own last lr in the optimizer
        try:
            with warnings.catch_warnings():
                # A GradScaler that skips the first step would raise this false alarm (pytorch#44511).
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
                self.schedule.step()
        except BaseException:  # such as a OneCycleLR past its end: the full ceiling must not stay behind
            write_lrs(self.optimizer, ours)
            if in_charge:
                self._marks = [Mark.of(lr) for lr in lrs_of(self.optimizer)]
            raise
        self._scheduled = copies_of(lrs_of(self.optimizer))

    def _write_lr(self) -> None:
        self._adopt_new_groups()
        separate_lrs(self.optimizer)  # again: a checkpoint may bring one tensor for all groups
        write_lrs(self.optimizer, self.get_lr())
        lrs = lrs_of(self.optimizer)
        self._last_lr, self._marks, self._by_value = copies_of(lrs), [Mark.of(lr) for lr in lrs], False

    def _in_charge(self) -> bool:
        """Whether the lrs in the optimizer are those that this scheduler wrote last."""
        if self.last_epoch < 0 or self._marks is None:
            return False  # a SequentialLR has not come to this scheduler yet, or was elsewhere when it was copied
        for lr, mark, last in zip(lrs_of(self.optimizer), self._marks, self._last_lr, strict=False):
            # Another scheduler may write an equal value, so only the very object counts; except where a checkpoint or
            # a copy has put an equal one in its place.
            replaced = self._by_value or (lr is not mark.lr and isinstance(lr, Tensor))
            if not mark.is_on(lr) and not (replaced and bool(lr == last)):
                return False
        return True

    def _warn_if_overwritten(self) -> None:
        if not self._warned and not self._in_charge():
            self._warned = True
            warnings.warn(
                "Something other than SNRAdaptiveLR changed the learning rate since its last step. If that is "
                "another scheduler, pass it as SNRAdaptiveLR(optimizer, schedule=...), which composes them; if it was "
                "a checkpoint of the optimizer, load that of this scheduler after it.",
                stacklevel=3,
            )

    def _warn_if_not_measured(self) -> None:
        if self._attachment is not None:
            self._attachment.warn_if_never_stepped()
        if self._attachment is None and not self._observed:
            self._observed = True  # said once
            warnings.warn(
                f"SNRAdaptiveLR: nothing measures the gradients, so the factor stays {self.factor:.4g} (1: the full "
                "ceiling). Call attach(model) once, before the loop, for a copy too, or observe() at every step.",
                stacklevel=3,
            )

    def _adopt_new_groups(self) -> None:
        """A group added since then: its lr is its ceiling."""
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        if added and self.schedule is not None:
            raise RuntimeError(
                "optimizer: a param group was added after schedule= was built, which torch's schedulers do not "
                "support; remove() the handle, put the ceilings back into the groups, build both schedulers anew"
            )
        if added:
            separate_lrs(self.optimizer)  # a group without an lr of its own was given the very tensor of the defaults
        for group in added:
            [lr] = copies_of([group["lr"]])
            group.setdefault("initial_lr", lr)
            self.base_lrs += copies_of([lr])
            self._last_lr += copies_of([lr])
            if self.per_group:
                self._group_averages.append(MomentAverages(self._averages.smoothing))

    # -- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Statistics, counters, ceilings and the inner schedule's state: loads with ``weights_only=True``.

        Nobody else holds its tensors, so that loaders may fill them in place, as ``torch.distributed.checkpoint`` does.
        The settings (``smoothing``, ``min_factor``, ...) are not in it; they are the constructor's.
        """
        if self.schedule is None:
            self._adopt_new_groups()
        return {
            "averages": self._averages.state_dict(),
            "group_averages": [averages.state_dict() for averages in self._group_averages],
            "floor_bound": self._floor_bound.clone(),
            "unstepped": self._unstepped(),
            "base_lrs": copies_of(self.base_lrs),
            "scheduled": copies_of(self._scheduled),
            "last_lr": copies_of(self._last_lr),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "in_charge": self._in_charge(),
            "schedule": None if self.schedule is None else copied(self.schedule.state_dict()),
            "schedule_type": type(self.schedule).__name__,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit-exactly. As with every torch scheduler: construct it, load the optimizer, then this.

        Raises:
            ValueError: the state is of another kind of scheduler, or its inner schedule is of another class,
                or the number of parameter groups differs. Nothing was changed then.
        """
        expected = set(self.state_dict())
        if set(state_dict) != expected:
            raise ValueError(f"state_dict: missing or unexpected keys {sorted(set(state_dict) ^ expected)}")
        if state_dict["schedule_type"] != type(self.schedule).__name__:
            raise ValueError(
                f"state_dict: expected the state of an inner {type(self.schedule).__name__}, "
                f"got that of {state_dict['schedule_type']}"
            )
        if len(state_dict["base_lrs"]) != len(self.optimizer.param_groups):
            raise ValueError(
                f"state_dict: expected {len(self.optimizer.param_groups)} parameter groups, "
                f"got {len(state_dict['base_lrs'])}"
            )
        if len(state_dict["group_averages"]) != len(self._group_averages):
            raise ValueError(
                f"state_dict: expected that of a scheduler with per_group={self.per_group}, as here; it has another"
            )
        for averages in (state_dict["averages"], *state_dict["group_averages"]):
            self._averages.expect_state(averages)
        if self.schedule is not None:
            self.schedule.load_state_dict(copied(state_dict["schedule"]))
        self._averages.load_state_dict(state_dict["averages"])
        for averages, state in zip(self._group_averages, state_dict["group_averages"], strict=True):
            averages.load_state_dict(state)
        self._floor_bound, self._dropped = state_dict["floor_bound"].clone(), state_dict["unstepped"]
        self.base_lrs, self._scheduled = copies_of(state_dict["base_lrs"]), copies_of(state_dict["scheduled"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        self._marks = None
        if state_dict["in_charge"]:
            self._write_lr()
        self._last_lr, self._by_value = copies_of(state_dict["last_lr"]), True


def _differs_by_group(schedule: Any) -> bool:
    """Whether a schedule was given something else for each parameter group."""
    children = getattr(schedule, "_schedulers", ())
    functions = {id(function) for function in getattr(schedule, "lr_lambdas", ())}
    peaks = {float(group["max_lr"]) for group in schedule.optimizer.param_groups if "max_lr" in group}
    return len(functions) > 1 or len(peaks) > 1 or any(map(_differs_by_group, children))
