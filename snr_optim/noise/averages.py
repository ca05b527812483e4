"""Running averages of signal and noise over batches, and how well their ratio is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snr_kernels.precision import widest_dtype
from snr_optim.noise.moments import ROUNDING, GradientMoments, Number, noise_of


class MomentAverages:
    r"""Exponential moving averages of ``S_hat`` and ``||g_hat||^2``, equally weighted, divided once.

    .. math::
        \bar S \leftarrow \beta \bar S + (1 - \beta) \hat S, \qquad
        \bar Q \leftarrow \beta \bar Q + (1 - \beta) \|\hat g\|^2, \qquad
        \text{factor} = \bar S / \bar Q

    The order matters. ``S_hat`` of one batch is often negative; clamping it, or averaging ratios, turns
    noise into signal. Both averages start empty and carry the same weight, so their ratio needs no bias
    correction.

    A batch that cannot be folded in moves nothing but a counter: fewer than two sub-batches (noise unknown), all
    gradients zero (flat rewards carry no information), or NaN, inf or impossible moments. No branch
    depends on the value of a tensor, so an accelerator is never waited for.

    Args:
        smoothing: ``beta`` in ``[0, 1)``; ``0`` is the current batch alone, as in the paper.

    Raises:
        ValueError: ``smoothing`` is outside ``[0, 1)``.

    Example:
        >>> averages = MomentAverages(smoothing=0.5)
        >>> averages.update(GradientMoments(4.0, 12.0, 5))      # S_hat =  2
        >>> averages.update(GradientMoments(1.0, 13.0, 5))      # S_hat = -2
        >>> averages.ratio().item()                             # (2/4 - 2/2) / (4/4 + 1/2)
        -0.3333333333333333
    """

    def __init__(self, smoothing: float) -> None:
        if not isinstance(smoothing, (int, float)) or not 0 <= smoothing < 1:
            raise ValueError(f"smoothing: expected a number in [0, 1) (or 'auto' for SNRAdaptiveLR), got {smoothing!r}")
        self.smoothing = float(smoothing)
        zero = torch.zeros((), dtype=torch.float64)
        # Sums over batches of S, Q = ||g_hat||^2, m - 1 and 1, weighted by w_t = (1 - beta) beta^age.
        self.signal_sum, self.sq_norm_sum, self.dof_sum, self.weight = zero, zero, zero, zero
        # Sums of S^2, S Q and Q^2 weighted by w_t^2: what the spread of the ratio over batches is computed from.
        self.signal_signal_sum, self.signal_sq_norm_sum, self.sq_norm_sq_norm_sum = zero, zero, zero
        self.weight_squared, self.weight_cubed = zero, zero
        self.num_sub_batches = zero
        self.observations, self.skipped_single, self.skipped_flat, self.skipped_invalid = zero, zero, zero, zero

    @torch.no_grad()
    def update(self, moments: GradientMoments) -> None:
        """Fold one batch in, or count why it could not be."""
        sq_norm, mean_sq = self._to_state(moments.sq_norm_of_mean), self._to_state(moments.mean_of_sq_norms)
        num = self._to_state(moments.num_sub_batches)
        single = num < 2
        valid = torch.isfinite(sq_norm) & torch.isfinite(mean_sq) & (sq_norm >= 0)
        valid &= mean_sq >= (1 - ROUNDING) * sq_norm
        flat = ~single & valid & (mean_sq == 0)
        usable = ~single & valid & ~flat
        signal = torch.where(usable, sq_norm - noise_of(sq_norm, mean_sq, num), 0)
        sq_norm = torch.where(usable, sq_norm, 0)
        gain = (1 - self.smoothing) * usable.to(self.weight.dtype)
        keep = 1 - gain
        self.signal_sum = keep * self.signal_sum + gain * signal
        self.sq_norm_sum = keep * self.sq_norm_sum + gain * sq_norm
        self.dof_sum = keep * self.dof_sum + gain * (num - 1)
        self.weight = keep * self.weight + gain
        self.signal_signal_sum = keep**2 * self.signal_signal_sum + (gain * signal) ** 2
        self.signal_sq_norm_sum = keep**2 * self.signal_sq_norm_sum + gain**2 * signal * sq_norm
        self.sq_norm_sq_norm_sum = keep**2 * self.sq_norm_sq_norm_sum + (gain * sq_norm) ** 2
        self.weight_squared = keep**2 * self.weight_squared + gain**2
        self.weight_cubed = keep**3 * self.weight_cubed + gain**3
        self.num_sub_batches = torch.where(usable, num, self.num_sub_batches)
        self.observations = self.observations + usable
        self.skipped_single = self.skipped_single + single
        self.skipped_flat = self.skipped_flat + flat
        self.skipped_invalid = self.skipped_invalid + (~single & ~valid)

    def ratio(self) -> Tensor:
        """The averaged ``S / (S + V)``, not clamped; NaN until a batch was folded in."""
        return self.signal_sum / self.sq_norm_sum

    def signal(self) -> Tensor:
        """The averaged ``S_hat``, bias-corrected; NaN until known."""
        return self.signal_sum / self.weight

    def noise(self) -> Tensor:
        """The averaged ``V_hat``, bias-corrected; NaN until known."""
        return (self.sq_norm_sum - self.signal_sum) / self.weight

    def effective_observations(self) -> Tensor:
        """How many equally weighted batches the averages are worth, ``(sum w)^2 / sum w^2``."""
        return self.weight.square() / self.weight_squared

    def degrees_of_freedom(self) -> Tensor:
        """Of the averaged noise: ``m - 1`` per batch, times the effective number of batches."""
        return self.dof_sum / self.weight * self.effective_observations()

    def ratio_standard_error(self) -> Tensor:
        r"""Standard error of :meth:`ratio`, from the spread over batches; NaN below two of them.

        The delta method for a ratio of means, with normalised weights ``a_t`` and residuals ``e_t = S_t - r Q_t``:

        .. math::
            \operatorname{se}^2 = \frac{\sum_t a_t^2 e_t^2}{(\sum_t a_t Q_t)^2} \cdot \frac{A_2}{A_2 - 2 A_3 + A_2^2},
            \qquad A_k = \sum_t a_t^k

        where the last fraction, ``n / (n - 1)`` for equal weights, undoes that residuals are smaller than errors. It
        takes the batches for independent draws with one ``S`` and ``V``; where these drift, the drift counts as spread.
        """
        ratio = self.ratio()
        residuals = self.signal_signal_sum - 2 * ratio * self.signal_sq_norm_sum + ratio**2 * self.sq_norm_sq_norm_sum
        a2, a3 = self.weight_squared / self.weight**2, self.weight_cubed / self.weight**3
        shrunk = a2 - 2 * a3 + a2**2  # zero with one batch, where nothing is known
        correction = a2 / torch.where(shrunk > 1e-12, shrunk, torch.nan)
        return (residuals.clamp_min(0) / self.sq_norm_sum.square() * correction).sqrt()

    def shrunk_ratio(self) -> Tensor:
        r"""The ratio ``r``, within [0, 1], pulled towards zero as it sinks into its own standard error.

        .. math::
            r \cdot \frac{r^2}{r^2 + (2 \operatorname{se})^2}

        Half of it is left where it is two standard errors from zero, all of it where it is well known, or where nothing
        is known of its error yet. With ``smoothing=0.95`` its regret as a learning-rate factor is the lowest, at every
        SNR, of all the estimators in ``benchmarks/estimators.py``, averaged over its scenarios.
        """
        ratio, error = self.ratio().clamp(0, 1), self.ratio_standard_error()
        square = ratio.square()
        kept = square / (square + (2 * error).square()).clamp_min(torch.finfo(square.dtype).tiny)
        return torch.where(error.isnan(), ratio, ratio * kept)

    def state_dict(self) -> dict[str, Any]:
        """Averages and counters (not ``smoothing``): tensors only."""
        return {name: value.clone() for name, value in vars(self).items() if name != "smoothing"}

    def expect_state(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless :meth:`load_state_dict` can take this over."""
        unexpected = set(state) ^ set(self.state_dict())
        if unexpected:
            raise ValueError(f"state_dict: missing or unexpected keys {sorted(unexpected)}")
        wrong = sorted(name for name, value in state.items() if not isinstance(value, Tensor) or value.dim())
        if wrong:
            raise ValueError(f"state_dict: expected 0-d tensors, got something else for {wrong}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take averages and counters over, bit for bit."""
        self.expect_state(state)
        vars(self).update({name: value.clone() for name, value in state.items()})

    def _to_state(self, value: Number) -> Tensor:
        """The value in the state's precision; the state follows the moments to their device."""
        if not isinstance(value, Tensor):
            # Filled in place, where copying a number over would wait for the device.
            return torch.full((), value, dtype=self.weight.dtype, device=self.weight.device)
        if value.device != self.weight.device:
            dtype = widest_dtype(value.device)
            for name, state in vars(self).items():
                if isinstance(state, Tensor):
                    setattr(self, name, state.to(value.device, dtype))
        return value.detach().to(self.weight.dtype)
