"""The learning rate set by measured gradient noise: ``SNRAdaptiveLR``, a true ``LRScheduler``.

``observe()`` owns the statistics; ``step()`` only writes ceiling x factor into the optimizer, so it may be
called as often as a trainer likes. Where moments come from is the business of :mod:`snr_optim.sources`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from snr_optim.moments import GradientMoments, MomentAverages


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

    Timing: ``observe()`` *before* ``optimizer.step()`` lets batch ``t`` set its own step, as in the paper;
    *after* it, the factor lags one step and is independent of the noise in the step that it scales.

    Args:
        optimizer: any ``torch.optim.Optimizer``; unwrap an accelerate one (``.optimizer``).
        schedule: an inner scheduler on the same optimizer that moves the ceiling: warm-up, cosine,
            ``SequentialLR``, ... ``step()`` steps it, so do not step it yourself. (``ChainedScheduler``
            would let its closed-form members overwrite the factor.)
        smoothing: weight of the past in the averages; ``0`` uses the current batch alone, as in the paper.
        min_factor: floor that keeps the learning rate alive where no signal can be measured.
        max_factor: upper clamp, at most 1; also the factor until anything is known.
        metric: ``"euclidean"``: norms are plain 2-norms of the gradient, as in the paper.
        adapt: ``False`` measures and reports but leaves the ceiling as the learning rate.

    Raises:
        TypeError: ``optimizer`` is no ``Optimizer``, or ``schedule`` no ``LRScheduler`` that steps by itself.
        ValueError: ``schedule`` drives another optimizer, or a number is out of its range.
        NotImplementedError: another ``metric``.

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
        smoothing: float = 0.9,
        min_factor: float = 0.01,
        max_factor: float = 1.0,
        metric: str = "euclidean",
        adapt: bool = True,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if schedule is not None:
            if not isinstance(schedule, LRScheduler) or isinstance(schedule, (ReduceLROnPlateau, SNRAdaptiveLR)):
                raise TypeError(
                    "schedule: expected an LRScheduler that needs no metric and is no SNRAdaptiveLR, "
                    f"got {type(schedule).__name__}"
                )
            if schedule.optimizer is not optimizer:
                raise ValueError("schedule: expected a scheduler of the same optimizer")
        if not 0 <= min_factor <= max_factor <= 1:
            raise ValueError(
                f"min_factor, max_factor: expected 0 <= min_factor <= max_factor <= 1, got {min_factor}, {max_factor}"
            )
        if metric != "euclidean":
            raise NotImplementedError(f"metric: only 'euclidean' is implemented, got {metric!r}")
        self.schedule = schedule
        # What the inner schedule wrote last. Not its get_last_lr(): in torch 2.6 a tensor there is the live lr.
        self._scheduled = [_copy(group["lr"]) for group in optimizer.param_groups]
        self.min_factor, self.max_factor = float(min_factor), float(max_factor)
        self.metric, self.adapt = metric, adapt
        self._averages = MomentAverages(smoothing)
        self._floor_bound = torch.zeros((), dtype=torch.float64)
        self._warned = self._loaded = False
        super().__init__(optimizer)

    # -- statistics ---------------------------------------------------------------------------------

    def observe(self, moments: GradientMoments) -> None:
        """Fold the moments of one batch in, and set the lr of the next ``optimizer.step()``.

        Moments that carry no information (one sub-batch, all gradients zero, NaN or inf) leave factor and
        lr as they were, and are counted in :meth:`metrics`. Inside a ``SequentialLR``, while another
        scheduler is in charge, only the statistics move.

        Raises:
            TypeError: ``moments`` is no :class:`GradientMoments`.
        """
        if not isinstance(moments, GradientMoments):
            raise TypeError(f"moments: expected GradientMoments, got {type(moments).__name__}")
        before = self._averages.observations
        self._averages.update(moments)
        folded_in = self._averages.observations > before.to(self._averages.observations.device)
        floor_binds = folded_in & (self._averages.ratio() < self.min_factor)
        self._floor_bound = self._floor_bound.to(floor_binds.device) + floor_binds
        if self._in_charge():
            self._write_lr()

    @property
    def factor(self) -> float:
        """``S / (S + V)`` averaged, clamped to ``[min_factor, max_factor]``; ``max_factor`` until known."""
        return self._factor().item()

    def metrics(self) -> dict[str, float]:
        """What a tracker should log, as plain floats; NaN where nothing is known yet.

        Keys: ``factor``; ``lr`` and ``ceiling`` (first group, of the next ``optimizer.step()``);
        averaged ``signal``, ``noise`` and ``snr = signal / noise``;
        ``critical_batch_size = noise / signal`` x the number of sub-batches, so in units of one sub-batch
        (inf where no signal is left); and the counts ``observations``, ``floor_bound`` (observations whose
        factor was raised to ``min_factor``), ``skipped_single``, ``skipped_flat``, ``skipped_invalid``.
        """
        averages = self._averages
        tensors = (
            self._factor(),
            averages.signal(),
            averages.noise(),
            averages.observations,
            self._floor_bound,
            averages.skipped_flat,
            averages.skipped_invalid,
        )
        factor, signal, noise, observations, floor_bound, flat, invalid = torch.stack(tensors).tolist()  # one wait
        return {
            "factor": factor,
            "lr": float(self._last_lr[0]),
            "ceiling": float(self._ceilings()[0]),
            "signal": signal,
            "noise": noise,
            "snr": signal / noise if noise else math.copysign(math.inf, signal),
            "critical_batch_size": math.inf if signal <= 0 else noise / signal * averages.num,
            "observations": observations,
            "floor_bound": floor_bound,
            "skipped_single": float(averages.skipped_single),
            "skipped_flat": flat,
            "skipped_invalid": invalid,
        }

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
            self._step_schedule()
        self._write_lr()

    def get_lr(self) -> list[float | Tensor]:
        """Ceiling x factor, one per parameter group."""
        ceilings = self._ceilings()
        if not self.adapt:
            return list(ceilings)
        factor = self._factor()
        if all(isinstance(lr, Tensor) for lr in ceilings):
            return [torch.as_tensor(lr) * factor.to(torch.as_tensor(lr).device) for lr in ceilings]  # waits for nothing
        number = factor.item()
        return [lr * number for lr in ceilings]

    def _update_lr(self, epoch: int | None = None) -> None:
        """What ``SequentialLR`` calls, instead of ``step()``, to hand over to this scheduler."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._write_lr()

    def _ceilings(self) -> list[float | Tensor]:
        return self.base_lrs if self.schedule is None else self._scheduled

    def _factor(self) -> Tensor:
        averages = self._averages
        clamped = averages.ratio().clamp(self.min_factor, self.max_factor)
        return torch.where(averages.observations > 0, clamped, self.max_factor)

    def _step_schedule(self) -> None:
        if self.schedule is None:
            return
        self._adopt_new_groups()
        self._write(self._scheduled)  # recursive schedules read their own last lr in the optimizer
        with warnings.catch_warnings():
            # A GradScaler that skips the first step would raise this false alarm (pytorch#44511).
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step\\(\\)` before")
            self.schedule.step()
        self._scheduled = [_copy(lr) for lr in self._lrs()]

    def _write_lr(self) -> None:
        self._adopt_new_groups()
        self._write(self.get_lr())
        self._last_lr = [_copy(lr) for lr in self._lrs()]
        self._written = [(lr, _version(lr)) for lr in self._lrs()]
        self._loaded = False

    def _write(self, lrs: list[float | Tensor]) -> None:
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(torch.as_tensor(lr))  # never replaced: compiled and captured steps hold it
            else:
                group["lr"] = lr

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
                "another scheduler, pass it as SNRAdaptiveLR(optimizer, schedule=...), which composes them.",
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
            self.base_lrs.append(_copy(lr))

    # -- checkpoints --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Statistics, counters, ceilings and the inner schedule's state: loads with ``weights_only=True``.

        The settings (``smoothing``, ``min_factor``, ...) are not in it; they are the constructor's.
        """
        return {
            "averages": self._averages.state_dict(),
            "floor_bound": self._floor_bound,
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
        if self.schedule is not None:
            self.schedule.load_state_dict(state_dict["schedule"])
        self._averages.load_state_dict(state_dict["averages"])
        self._floor_bound = state_dict["floor_bound"]
        self.base_lrs, self._scheduled = list(state_dict["base_lrs"]), list(state_dict["scheduled"])
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["step_count"]
        if state_dict["in_charge"]:
            self._write_lr()
        self._last_lr = list(state_dict["last_lr"])
        self._loaded = True


def _version(lr: float | Tensor) -> int:
    """How often a tensor was written in place; a float is never."""
    return lr._version if isinstance(lr, Tensor) else 0


def _copy(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr
