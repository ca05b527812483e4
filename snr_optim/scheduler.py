"""The learning rate set by measured gradient noise: ``SNRAdaptiveLR``, a true ``LRScheduler``.

``observe()`` owns the statistics; ``step()`` only writes ceiling x factor into the optimizer, so it may be
called as often as a trainer likes. Where moments come from is the business of :mod:`snr_optim.sources`.
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

from snr_optim.attachment import Attachment
from snr_optim.moments import GradientMoments, MomentAverages
from snr_optim.sources import AdamNorm, Norm, euclidean

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
    learning rate is the usual choice.

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
        metric: of the norms that ``attach()`` takes. ``"euclidean"``: plain 2-norms, as in the paper.
            ``"optimizer"``: the metric of Adam's step (:class:`AdamNorm`), known from the second step on; with an
            optimizer that is no Adam, Euclidean after one warning. What is given to ``observe()`` is taken as it is.
        adapt: ``False`` measures and reports but leaves the ceiling as the learning rate.
        per_group: a factor of its own for every parameter group, from its own gradients, in place of one for all.

    Raises:
        TypeError: ``optimizer`` is no ``Optimizer``, or ``schedule`` no ``LRScheduler`` that steps by itself.
        ValueError: ``schedule`` drives another optimizer, a number is out of its range, or ``metric`` is unknown.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        >>> scheduler = SNRAdaptiveLR(optimizer, smoothing=0.0)
        >>> scheduler.observe(GradientMoments(sq_norm_of_mean=2.0, mean_of_sq_norms=5.0, num=4))
        >>> scheduler.factor, optimizer.param_groups[0]["lr"]
        (0.5, 0.5)
        >>> optimizer.step()
        >>> scheduler.step()
    """

    _last_lr: list[float | Tensor]
    _written: list[tuple[float | Tensor, int]]

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        *,
        smoothing: float | Literal["auto"] = "auto",
        min_factor: float = 0.01,
        max_factor: float = 1.0,
        metric: str = "euclidean",
        adapt: bool = True,
        per_group: bool = False,
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if schedule is not None:
            if not isinstance(schedule, LRScheduler) or isinstance(schedule, (ReduceLROnPlateau, SNRAdaptiveLR)):
                raise TypeError(
                    "schedule: expected an LRScheduler that needs no metric and is no SNRAdaptiveLR, "
                    f"got {type(schedule).__name__}; of accelerate's wrapper, pass what was given to prepare()"
                )
            if unwrapped(schedule.optimizer) is not optimizer:
                raise ValueError("schedule: expected a scheduler of the same optimizer")
        if not 0 <= min_factor <= max_factor <= 1:
            raise ValueError(
                f"min_factor, max_factor: expected 0 <= min_factor <= max_factor <= 1, got {min_factor}, {max_factor}"
            )
        if metric not in ("euclidean", "optimizer"):
            raise ValueError(f"metric: expected 'euclidean' or 'optimizer', got {metric!r}")
        self.schedule = schedule
        # What the inner schedule wrote last. Not its get_last_lr(): in torch 2.6 a tensor there is the live lr.
        self._scheduled = [copy_of(group["lr"]) for group in optimizer.param_groups]
        self.min_factor, self.max_factor = float(min_factor), float(max_factor)
        self.metric, self.adapt, self.per_group = metric, adapt, per_group
        self._shrinks = smoothing == "auto"
        beta = AUTO_SMOOTHING if smoothing == "auto" else smoothing
        self._averages = MomentAverages(beta)
        self._group_averages = [MomentAverages(beta) for _ in optimizer.param_groups] if per_group else []
        self._floor_bound = torch.zeros((), dtype=torch.float64)
        self._dropped = 0
        self._attachment: Attachment | None = None
        self._warned = self._loaded = self._overwritten_before = self._observed = False
        super().__init__(optimizer)

    # -- statistics ---------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> Attachment:
        """Measure every batch of a training loop, and set the lr of its own ``optimizer.step()``.

        Hooks on the parameters of the optimizer catch the raw gradient of every ``backward()``, before clipping and
        unscaling; each is a sub-batch, on each data-parallel rank. Gradient accumulation, ``GradScaler`` (through its
        ``step()``), autocast, DDP, ``fully_shard``, LoRA, checkpointing and compiled models need nothing more. With
        one ``backward()`` per step on one rank the noise is unknown, and the factor stays as it is.

        A backward pass that reaches none of the optimizer's parameters is not seen: state it as an empty
        ``sub_batch``. A closure is measured every time that the optimizer calls it. While attached, do not call
        :meth:`observe` for the same batches too.

        Args:
            model: holds the parameters of the optimizer. Wrap, shard and prepare it first.

        Returns:
            A handle: ``.remove()``, ``.sub_batch(size)`` for micro-batches of unequal size; also a context manager.

        Raises:
            RuntimeError: attached already; or the model is parallelised in a way that cannot be measured.
            ValueError: parameters of the optimizer are not in ``model``, or none requires grad.
            TypeError: the optimizer runs no step hooks (a wrapper of another kind), or is ``LBFGS``.
            NotImplementedError: ``metric="optimizer"`` with a sharded model, whose second moments are in pieces.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if self._attachment is not None and self._attachment.attached:
            raise RuntimeError("attach: already attached; remove() the first handle before")
        norm = euclidean if self.metric == "euclidean" else self._optimizer_norm(model)
        self._attachment = Attachment(self.optimizer, model, norm, self._observe_step)
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
        self._observed = True
        parts = [moments] if isinstance(moments, GradientMoments) else moments
        if not isinstance(parts, Sequence) or not all(isinstance(part, GradientMoments) for part in parts):
            raise TypeError(f"moments: expected GradientMoments, or one for each group, got {type(moments).__name__}")
        self._adopt_new_groups()
        groups = len(self.optimizer.param_groups)
        if len(parts) != groups and (self.per_group or parts is moments):
            raise ValueError(f"moments: expected one for each of the {groups} parameter groups, got {len(parts)}")
        before = self._averages.observations
        self._averages.update(GradientMoments.of_parts(parts))
        for averages, part in zip(self._group_averages, parts, strict=False):
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
        ``critical_batch_size = noise / signal`` x the number of sub-batches, so in units of one sub-batch
        (inf where no signal is left); and the counts ``observations``, ``floor_bound`` (observations that found
        a factor below ``min_factor``), ``skipped_single`` (fewer than two sub-batches), ``skipped_flat`` (all gradients
        zero), ``skipped_invalid`` (NaN, inf, impossible or not measurable) and ``skipped_unstepped`` (gradients
        cleared without a step of this optimizer, as when a ``GradScaler`` skips it, or after the backward pass of
        another optimizer's loss). With ``per_group=True`` also
        ``factor_group_0``, ``lr_group_0``, ...
        """
        averages = self._averages
        tensors = {
            "factor": self._factor(averages),
            "signal": averages.signal(),
            "noise": averages.noise(),
            "ratio_error": averages.ratio_standard_error(),
            "degrees_of_freedom": averages.degrees_of_freedom(),
            "num": averages.num,
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
        signal, noise, num, error = (metrics[name] for name in ("signal", "noise", "num", "ratio_error"))
        del metrics["num"], metrics["ratio_error"]
        metrics["lr"], metrics["ceiling"] = float(self._last_lr[0]), float(self._ceilings()[0])
        metrics["snr"] = signal / noise if noise else math.copysign(math.inf, signal)
        # d (r / (1 - r)) = dr / (1 - r)^2, and 1 - r = V / (S + V)
        metrics["snr_standard_error"] = error * ((signal + noise) / noise) ** 2 if noise else math.nan
        metrics["critical_batch_size"] = math.inf if signal <= 0 else noise / signal * num
        metrics["skipped_unstepped"] = float(self._dropped)
        for number, lr in enumerate(self._last_lr if self.per_group else []):
            metrics[f"lr_group_{number}"] = float(lr)
        return metrics

    def _optimizer_norm(self, model: nn.Module) -> Norm:
        if not AdamNorm.suits(self.optimizer):
            warnings.warn(
                f"metric='optimizer': {type(self.optimizer).__name__} keeps no second moment as Adam does; "
                "norms are Euclidean.",
                stacklevel=3,
            )
            return euclidean
        if any(hasattr(p, "placements") for p in model.parameters()):
            raise NotImplementedError("metric='optimizer': not with sharded parameters; use metric='euclidean'")
        return AdamNorm(self.optimizer)

    def _observe_step(self, moments: list[GradientMoments], dropped: int) -> None:
        self._dropped += dropped
        self.observe(moments)
        overwritten = self.last_epoch >= 0 and not self._in_charge()
        # A single step may be at another lr: torch.distributed.checkpoint makes an optimizer's state by one of lr 0.
        if overwritten and self._overwritten_before:
            self._warn_if_overwritten()
        self._overwritten_before = overwritten

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
        starting = self.last_epoch < 0
        self._step_count = getattr(self, "_step_count", 0) + 1
        self.last_epoch += 1
        if not starting:
            self._warn_if_overwritten()
            self._warn_if_not_measured()
            self._step_schedule()
        self._write_lr()

    def get_lr(self) -> list[float | Tensor]:
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
        """A copy is not attached: its optimizer is a copy without hooks, too."""
        return {**self.__dict__, "_attachment": None}

    def _update_lr(self, epoch: int | None = None) -> None:
        """What ``SequentialLR`` calls, instead of ``step()``, to hand over to this scheduler."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write_lr()

    def _ceilings(self) -> list[float | Tensor]:
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
        write_lrs(self.optimizer, self._scheduled)  # recursive schedules read their own last lr in the optimizer
        with warnings.catch_warnings():
            # A GradScaler that skips the first step would raise this false alarm (pytorch#44511).
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            self.schedule.step()
        self._scheduled = [copy_of(lr) for lr in self._lrs()]

    def _write_lr(self) -> None:
        self._adopt_new_groups()
        write_lrs(self.optimizer, self.get_lr())
        self._last_lr = [copy_of(lr) for lr in self._lrs()]
        self._written = [(lr, _version(lr)) for lr in self._lrs()]
        self._loaded = False

    def _lrs(self) -> list[float | Tensor]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def _in_charge(self) -> bool:
        """Whether the lrs in the optimizer are those that this scheduler wrote last."""
        if self.last_epoch < 0:
            return False  # a SequentialLR has not come to this scheduler yet
        for lr, (ours, version), last in zip(self._lrs(), self._written, self._last_lr, strict=False):
            # Another scheduler may write an equal value, so only the very object counts; except where a checkpoint
            # has just put an equal one in its place.
            same = lr is ours and _version(lr) == version
            replaced = lr is not ours and (isinstance(lr, Tensor) or self._loaded)
            if not same and not (replaced and bool(lr == last)):
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
        if self._attachment is None and not self._observed:
            self._observed = True  # said once
            warnings.warn(
                "SNRAdaptiveLR: nothing measures the gradients, so every step is done at the full ceiling. Call "
                "attach(model) once, before the loop, or observe() at every step.",
                stacklevel=3,
            )

    def _adopt_new_groups(self) -> None:
        """A group added since then: its lr is its ceiling."""
        added = self.optimizer.param_groups[len(self.base_lrs) :]
        if added and self.schedule is not None:
            raise RuntimeError(
                "optimizer: a param group was added after schedule= was built, which torch's schedulers do not "
                "support; build both schedulers anew"
            )
        for group in added:
            lr = group.setdefault("initial_lr", group["lr"])
            self.base_lrs.append(copy_of(lr))
            if self.per_group:
                self._group_averages.append(MomentAverages(self._averages.smoothing))

    # -- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Statistics, counters, ceilings and the inner schedule's state: loads with ``weights_only=True``.

        The settings (``smoothing``, ``min_factor``, ...) are not in it; they are the constructor's.
        """
        return {
            "averages": self._averages.state_dict(),
            "group_averages": [averages.state_dict() for averages in self._group_averages],
            "floor_bound": self._floor_bound,
            "unstepped": self._dropped,
            "base_lrs": list(self.base_lrs),
            "scheduled": list(self._scheduled),
            "last_lr": list(self._last_lr),
            "last_epoch": self.last_epoch,
            "step_count": self._step_count,
            "in_charge": self._in_charge(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
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
            raise ValueError("state_dict: expected the state of a scheduler with the same per_group")
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
        self._averages.load_state_dict(state_dict["averages"])
        for averages, state in zip(self._group_averages, state_dict["group_averages"], strict=True):
            averages.load_state_dict(state)
        self._floor_bound, self._dropped = state_dict["floor_bound"], state_dict["unstepped"]
        self.base_lrs, self._scheduled = list(state_dict["base_lrs"]), list(state_dict["scheduled"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        if state_dict["in_charge"]:
            self._write_lr()
        self._last_lr = list(state_dict["last_lr"])
        self._loaded = True


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that does the step, within wrappers such as accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _version(lr: float | Tensor) -> int:
    """How often a tensor was written in place; a float is never."""
    return lr._version if isinstance(lr, Tensor) else 0


def write_lrs(optimizer: Optimizer, lrs: list[float | Tensor]) -> None:
    """Put one lr into each group."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].copy_(torch.as_tensor(lr))  # never replaced: compiled and captured steps hold it
        else:
            group["lr"] = lr


def copy_of(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr
