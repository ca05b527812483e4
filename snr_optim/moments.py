"""Signal and noise of one batch gradient, from the gradients of its sub-batches; and their running averages.

The estimates are unbiased for sub-batches of any sizes. No model, no optimizer: numbers in, numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | Tensor
Gradient: TypeAlias = Tensor | Iterable[Tensor | None]

# How far mean_of_sq_norms may lie below sq_norm_of_mean before it is a mistake and not rounding: sums of
# squares in float32 agree to 1e-6, a .grad that bfloat16 micro-batches were accumulated into to about 1e-3.
ROUNDING = 1e-2


@dataclass(frozen=True)
class GradientMoments:
    r"""What one batch tells about its gradient: two squared norms over ``m`` independent sub-batches.

    .. math::
        \hat g = \sum_k c_k g_k, \qquad
        \hat V = \frac{\sum_k c_k \|g_k\|^2 - \|\hat g\|^2}{m - 1}, \qquad
        \hat S = \|\hat g\|^2 - \hat V

    ``V_hat`` and ``S_hat`` are unbiased estimates of ``V = tr Cov(g_hat)`` and ``S = ||E g_hat||^2``,
    where ``g_k`` is the mean gradient of sub-batch ``k`` and ``c_k = n_k / N`` its share of the units.
    For equal shares this is the estimate of McCandlish et al. 2018 (arXiv 1812.06162, appendix A.1);
    ``S / V`` is the ``N_t SNR_t`` of OBLR-PO (arXiv 2511.23310, theorem 4).

    The independent unit is the prompt group: sub-batches must not share a prompt.

    Args:
        sq_norm_of_mean: ``||g_hat||^2``, a float or a 0-d tensor.
        mean_of_sq_norms: ``sum_k c_k ||g_k||^2``, a float or a 0-d tensor.
        num: number of sub-batches ``m``, an int, or a 0-d tensor where reading it would wait for a device. With one,
            the noise is unknown (NaN).

    Raises:
        TypeError: a moment is neither a number nor a real 0-d tensor, or ``num`` neither an int nor a 0-d tensor.
        ValueError: ``num < 1``; a moment is negative; or ``mean_of_sq_norms`` is below ``sq_norm_of_mean``
            by more than rounding (1 %), which no gradients can give (Jensen) but wrongly scaled
            sub-batches can. Tensors on an accelerator are not looked at here, which would synchronise;
            :meth:`MomentAverages.update` leaves such moments out. NaN and inf are data, not mistakes.

    Example:
        >>> moments = GradientMoments(sq_norm_of_mean=3.0, mean_of_sq_norms=9.0, num=4)
        >>> moments.noise, moments.signal, moments.batch_snr
        (2.0, 1.0, 0.5)
        >>> round(moments.lr_factor, 4)
        0.3333
    """

    sq_norm_of_mean: Number
    mean_of_sq_norms: Number
    num: int | Tensor

    def __post_init__(self) -> None:
        if isinstance(self.num, bool) or not (
            isinstance(self.num, int) or (isinstance(self.num, Tensor) and not self.num.dim())
        ):
            raise TypeError(f"num: expected the number of sub-batches as an int or a 0-d tensor, got {self.num!r}")
        if isinstance(self.num, int) and self.num < 1:
            raise ValueError(f"num: expected at least one sub-batch, got {self.num}")
        sq_norm = _checked_sq_norm("sq_norm_of_mean", self.sq_norm_of_mean)
        mean_sq = _checked_sq_norm("mean_of_sq_norms", self.mean_of_sq_norms)
        if mean_sq < (1 - ROUNDING) * sq_norm:
            raise ValueError(
                f"mean_of_sq_norms ({mean_sq:.6g}) is below sq_norm_of_mean ({sq_norm:.6g}), which no gradients "
                "give. Was .grad not zeroed before the batch, or clipped? "
                "sum_k c_k ||g_k||^2 takes the mean gradient of each sub-batch: was it still divided by "
                "the number of sub-batches?"
            )

    @classmethod
    def from_gradients(
        cls, gradients: Sequence[Gradient], shares: Sequence[float] | Tensor | None = None
    ) -> GradientMoments:
        """The reference constructor: moments of explicit sub-batch gradients, in float64.

        Args:
            gradients: one gradient per sub-batch, each a tensor or a list of tensors, one per parameter
                (``None`` where a parameter took no part). ``g_k`` is the *mean* gradient of sub-batch ``k``.
            shares: ``c_k = n_k / N``, or the sizes ``n_k`` themselves; equal when left out.

        Raises:
            ValueError: no gradients, gradients of differing shapes, or shares that are not one positive
                finite number per gradient.

        Example:
            >>> GradientMoments.from_gradients([torch.tensor([3.0]), torch.tensor([1.0])])
            GradientMoments(sq_norm_of_mean=4.0, mean_of_sq_norms=5.0, num=2)
        """
        if len(gradients) == 0:
            raise ValueError("gradients: expected at least one sub-batch gradient, got none")
        flat = [[g] if isinstance(g, Tensor) else list(g) for g in gradients]
        if len({len(parts) for parts in flat}) > 1:
            raise ValueError("gradients: expected one tensor per parameter from every sub-batch, got differing lengths")
        c = _normalised(shares, len(flat))
        sq_norm_of_mean = mean_of_sq_norms = 0.0
        for column in zip(*flat, strict=True):
            present = [(c_k, g.detach().double()) for c_k, g in zip(c, column, strict=True) if g is not None]
            if len({g.shape for _, g in present}) > 1:
                raise ValueError(
                    f"gradients: expected one shape per parameter, got {[list(g.shape) for _, g in present]}"
                )
            if present:
                mean_of_sq_norms += sum(c_k * g.square().sum().item() for c_k, g in present)
                sq_norm_of_mean += torch.stack([c_k * g for c_k, g in present]).sum(0).square().sum().item()
        return cls(sq_norm_of_mean, mean_of_sq_norms, len(flat))

    @classmethod
    def of_parts(cls, parts: Sequence[GradientMoments]) -> GradientMoments:
        """Moments of a whole gradient from those of disjoint groups of its parameters, over the same sub-batches.

        Raises:
            ValueError: no parts, or parts of differing ``num``.

        Example:
            >>> GradientMoments.of_parts([GradientMoments(3.0, 9.0, 4), GradientMoments(1.0, 2.0, 4)])
            GradientMoments(sq_norm_of_mean=4.0, mean_of_sq_norms=11.0, num=4)
        """
        if len(parts) == 0:
            raise ValueError("parts: expected the moments of at least one group")
        nums = [part.num for part in parts]
        if len({num for num in nums if isinstance(num, int)}) > 1:
            raise ValueError(f"parts: expected the same sub-batches in every group, got num {nums}")
        sq_norm = sum(part.sq_norm_of_mean for part in parts)
        return cls(sq_norm, sum(part.mean_of_sq_norms for part in parts), nums[0])

    @property
    def noise(self) -> Number:
        """``V_hat``, the trace of the covariance of the batch gradient; NaN when ``num`` is 1."""
        noise: Number = _noise(self.sq_norm_of_mean, self.mean_of_sq_norms, self.num)
        return noise

    @property
    def signal(self) -> Number:
        """``S_hat``, the squared norm of the true gradient; unbiased, so it can be negative."""
        return self.sq_norm_of_mean - self.noise

    @property
    def batch_snr(self) -> Number:
        """``S_hat / V_hat`` of this batch, raw; the critical batch size is ``1 / batch_snr`` such batches."""
        return _ratio(self.signal, self.noise)

    @property
    def lr_factor(self) -> Number:
        """``S_hat / (S_hat + V_hat) = S_hat / ||g_hat||^2``, neither averaged nor clamped."""
        return _ratio(self.signal, self.sq_norm_of_mean)


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
        self.num = zero
        self.observations, self.skipped_single, self.skipped_flat, self.skipped_invalid = zero, zero, zero, zero

    @torch.no_grad()
    def update(self, moments: GradientMoments) -> None:
        """Fold one batch in, or count why it could not be."""
        sq_norm, mean_sq = self._to_state(moments.sq_norm_of_mean), self._to_state(moments.mean_of_sq_norms)
        num = self._to_state(moments.num)
        single = num < 2
        valid = torch.isfinite(sq_norm) & torch.isfinite(mean_sq) & (sq_norm >= 0)
        valid &= mean_sq >= (1 - ROUNDING) * sq_norm
        flat = ~single & valid & (mean_sq == 0)
        usable = ~single & valid & ~flat
        signal = torch.where(usable, sq_norm - _noise(sq_norm, mean_sq, num), 0)
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
        self.num = torch.where(usable, num, self.num)
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
            dtype = torch.float32 if value.device.type == "mps" else torch.float64
            for name, state in vars(self).items():
                if isinstance(state, Tensor):
                    setattr(self, name, state.to(value.device, dtype))
        return value.detach().to(self.weight.dtype)


def _noise(sq_norm_of_mean: Any, mean_of_sq_norms: Any, num: Any) -> Any:
    if isinstance(num, Tensor):
        return (mean_of_sq_norms - sq_norm_of_mean) / torch.where(num > 1, num - 1, torch.nan)
    return math.nan * sq_norm_of_mean if num == 1 else (mean_of_sq_norms - sq_norm_of_mean) / (num - 1)


def _ratio(numerator: Number, denominator: Number) -> Number:
    if isinstance(numerator, Tensor) or isinstance(denominator, Tensor) or denominator:
        return numerator / denominator
    return math.nan if numerator == 0 or math.isnan(numerator) else math.copysign(math.inf, numerator)


def _checked_sq_norm(name: str, value: Number) -> float:
    """The value if it can be read without waiting for a device, else NaN; refused if it is no squared norm."""
    if isinstance(value, Tensor):
        if value.dim() or value.is_complex():
            raise TypeError(f"{name}: expected a real 0-d tensor, got {value.dtype} of shape {list(value.shape)}")
        number = value.item() if value.device.type == "cpu" else math.nan
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    else:
        raise TypeError(f"{name}: expected a float or a 0-d tensor, got {type(value).__name__}")
    if number < 0:
        raise ValueError(f"{name}: expected a squared norm, got {number}")
    return number


def _normalised(shares: Sequence[float] | Tensor | None, num: int) -> list[float]:
    sizes = [1.0] * num if shares is None else [float(share) for share in shares]
    if len(sizes) != num or not all(0 < size < math.inf for size in sizes):
        raise ValueError(f"shares: expected {num} positive finite numbers, one per gradient, got {sizes}")
    total = math.fsum(sizes)
    return [size / total for size in sizes]
