"""Signal and noise of one batch gradient, from the gradients of its sub-batches.

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
        num_sub_batches: ``m``, an int, or a 0-d tensor where reading it would wait for a device. With one, the noise is
            unknown (NaN).

    Raises:
        TypeError: a moment is neither a number nor a real 0-d tensor, or ``num_sub_batches`` neither an int nor a 0-d
            tensor.
        ValueError: ``num_sub_batches < 1``; a moment is negative; or ``mean_of_sq_norms`` is below ``sq_norm_of_mean``
            by more than rounding (1 %), which no gradients can give (Jensen) but wrongly scaled
            sub-batches can. Tensors on an accelerator are not looked at here, which would synchronise;
            :meth:`MomentAverages.update` leaves such moments out. NaN and inf are data, not mistakes.

    Example:
        >>> moments = GradientMoments(sq_norm_of_mean=3.0, mean_of_sq_norms=9.0, num_sub_batches=4)
        >>> moments.noise, moments.signal, moments.batch_snr
        (2.0, 1.0, 0.5)
        >>> round(moments.lr_factor, 4)
        0.3333
    """

    sq_norm_of_mean: Number
    mean_of_sq_norms: Number
    num_sub_batches: int | Tensor

    def __post_init__(self) -> None:
        num = self.num_sub_batches
        if isinstance(num, bool) or not (isinstance(num, int) or (isinstance(num, Tensor) and not num.dim())):
            raise TypeError(f"num_sub_batches: expected an int or a 0-d tensor, got {num!r}")
        if isinstance(num, int) and num < 1:
            raise ValueError(f"num_sub_batches: expected at least one, got {num}")
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
            GradientMoments(sq_norm_of_mean=4.0, mean_of_sq_norms=5.0, num_sub_batches=2)
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
            ValueError: no parts, or parts of differing ``num_sub_batches``.

        Example:
            >>> GradientMoments.of_parts([GradientMoments(3.0, 9.0, 4), GradientMoments(1.0, 2.0, 4)])
            GradientMoments(sq_norm_of_mean=4.0, mean_of_sq_norms=11.0, num_sub_batches=4)
        """
        if len(parts) == 0:
            raise ValueError("parts: expected the moments of at least one group")
        nums = [part.num_sub_batches for part in parts]
        if len({num for num in nums if isinstance(num, int)}) > 1:
            raise ValueError(f"parts: expected the same sub-batches in every group, got {nums}")
        sq_norm = sum(part.sq_norm_of_mean for part in parts)
        return cls(sq_norm, sum(part.mean_of_sq_norms for part in parts), nums[0])

    @property
    def noise(self) -> Number:
        """``V_hat``, the trace of the covariance of the batch gradient; NaN when ``num_sub_batches`` is 1."""
        noise: Number = noise_of(self.sq_norm_of_mean, self.mean_of_sq_norms, self.num_sub_batches)
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


def noise_of(sq_norm_of_mean: Any, mean_of_sq_norms: Any, num: Any) -> Any:
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
