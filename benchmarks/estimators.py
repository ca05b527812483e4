"""How good is the lr factor S / (S + V) that each estimator gives? Regret on gradients of known signal and noise.

    python -m benchmarks.estimators                      # ten seconds on one core
    python -m benchmarks.estimators --steps 1000 --replicates 300 --seed 1

Per step the descent bound promises a progress proportional to 2 f S - f^2 (S + V), most at f* = S / (S + V); the regret
is the share of that most which is lost, (f / f* - 1)^2 on average: 1 is no progress, above 1 is worse than standing
still. A factor is computed after its batch was seen, and every step counts, the first too. Gradients are Gaussian with
an isotropic covariance of `d` dimensions, V = 1 and S = rho V; over the steps rho stays, falls or rises tenfold.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from benchmarks.harness import environment, print_table, progress, pyplot, write_json
from snr_optim.noise.averages import MomentAverages
from snr_optim.noise.moments import GradientMoments

Array: TypeAlias = np.ndarray
RHOS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DIMENSIONS = (4, 100, 10_000)
SCENARIOS = {"stationary": 0.0, "falling": -1.0, "rising": 1.0}  # decades of rho over the steps
M = 8  # sub-batches


# ------------------------------------------------------------------------------------------------------ the gradients
class Batches(NamedTuple):
    """What estimators see, each ``[steps, replicates]``."""

    sq_norm: Array  # ||g_hat||^2
    noise: Array  # V_hat
    last_sq_norm: Array  # ||g_m||^2 of the last sub-batch

    @property
    def signal(self) -> Array:
        return self.sq_norm - self.noise


def draw(rng: np.random.Generator, signal: Array, d: int, replicates: int) -> Batches:
    """Exact draws without the vectors: projections of Gaussians are independent chi-squares.

    g_hat = mu + N(0, 1/d) and g_m - g_hat = N(0, (M - 1)/d) per coordinate, independent; the sub-batches' squared
    distances to g_hat are M/d chi-square with d (M - 1) degrees of freedom, of which g_m - g_hat takes d.
    """
    shape = (len(signal), replicates)
    sq_norm = (np.sqrt(signal)[:, None] + rng.standard_normal(shape) / math.sqrt(d)) ** 2
    sq_norm += rng.chisquare(d - 1, shape) / d
    along = rng.standard_normal(shape)  # of g_m - g_hat, along g_hat
    last = along**2 + rng.chisquare(d - 1, shape)
    noise = (last + rng.chisquare(d * (M - 2), shape)) / (d * (M - 1))
    last_sq_norm = sq_norm + 2 * along * np.sqrt(sq_norm * (M - 1) / d) + last * (M - 1) / d
    return Batches(sq_norm, noise, last_sq_norm)


def draw_vectors(rng: np.random.Generator, signal: float, d: int, replicates: int) -> tuple[Array, Batches]:
    """The same from explicit sub-batch gradients ``[replicates, M, d]``."""
    gradients = math.sqrt(signal / d) + math.sqrt(M / d) * rng.standard_normal((replicates, M, d))
    sq_norm = (gradients.mean(1) ** 2).sum(-1)
    squares = (gradients**2).sum(-1)
    return gradients, Batches(sq_norm, (squares.mean(1) - sq_norm) / (M - 1), squares[:, -1])


# ----------------------------------------------------------------------------------------------------- the estimators
Estimator: TypeAlias = Callable[[Batches], Array]


def ema(values: Array, smoothing: float) -> Array:
    """Bias-corrected exponential moving average over the steps."""
    out, total, weight = np.empty_like(values), np.zeros(values.shape[1]), 0.0
    for t, value in enumerate(values):
        total = smoothing * total + (1 - smoothing) * value
        weight = smoothing * weight + 1 - smoothing
        out[t] = total / weight
    return out


def ours(smoothing: float, floor: float) -> Estimator:
    """`MomentAverages.ratio`, clamped last."""
    return lambda seen: (ema(seen.signal, smoothing) / ema(seen.sq_norm, smoothing)).clip(floor, 1)


def ratio_and_error(seen: Batches, smoothing: float) -> tuple[Array, Array]:
    """`MomentAverages.ratio` and the square of `ratio_standard_error`, which is 0 here for the first batch."""
    s, q = seen.signal, seen.sq_norm
    mean_s, mean_q = ema(s, smoothing), ema(q, smoothing)
    ratio = mean_s / mean_q
    ages = np.arange(1, len(s) + 1)[:, None]

    def weight(power: int) -> Array:
        """The sum of the powers of the weights, which themselves add up to 1."""
        each = (1 - smoothing) / (1 - smoothing**ages)
        return each**power * (1 - smoothing ** (power * ages)) / (1 - smoothing**power)

    # The squares want squared weights: the same average at smoothing^2, times their sum.
    ss, sq, qq = (ema(product, smoothing**2) for product in (s * s, s * q, q * q))
    spread = (ss - 2 * ratio * sq + ratio**2 * qq).clip(0) * weight(2) / mean_q**2
    spread[1:] *= (weight(2) / (weight(2) - 2 * weight(3) + weight(2) ** 2).clip(1e-300))[1:]
    spread[0] = 0
    return ratio, spread


def shrunk(value: Array, squared_error: Array) -> Array:
    """As `MomentAverages.shrunk_ratio`: half of the value is left at two standard errors."""
    square = value**2
    return value * square / np.maximum(square + 4 * squared_error, 1e-300)


def ours_shrunk(smoothing: float, floor: float) -> Estimator:
    """The default, at 0.95: the ratio, shrunk by its own standard error."""

    def factor(seen: Batches) -> Array:
        ratio, squared_error = ratio_and_error(seen, smoothing)
        return shrunk(ratio.clip(0, 1), squared_error).clip(floor, 1)

    return factor


def fairscale(seen: Batches) -> Array:
    """AdaScale of fairscale 0.4.13, fairscale/optim/adascale.py, `_final_callback`: clamps each batch, then averages.

    Its variance is that of one sub-batch (scale = M), smoothing 1 - M/1000.
    """
    smoothing = max(1 - M / 1000, 0)
    signal = ema(seen.signal.clip(0), smoothing)
    return signal / (signal + ema((M * seen.noise).clip(1e-6), smoothing) / M)


def adaptdl(seen: Batches) -> Array:
    """AdaptDL 0.2.11, adaptdl/torch/gradient_noise_scale.py: smoothing 0.999^M; sqr_avg, var_avg clamp last."""
    smoothing = 0.999**M
    signal = ema(seen.signal, smoothing).clip(0)
    return signal / (signal + ema(M * seen.noise, smoothing).clip(1e-6) / M)


def gpt_neox(seen: Batches) -> Array:
    """gpt-neox, megatron/gradient_noise_scale/gradient_noise_scale.py, beta 0.99: B_small is the last sub-batch only.

    With n_batches = M. Its bias correction is the same for both averages and cancels. It has no clamp.
    """
    signal = (M * seen.sq_norm - seen.last_sq_norm) / (M - 1)
    noise = (seen.last_sq_norm - seen.sq_norm) / (M - 1)
    return (ema(signal, 0.99) / ema(signal + noise, 0.99)).clip(0, 1)


def mean_of_ratios(seen: Batches) -> Array:
    """S and V of McCandlish et al. 2018, appendix A.1, but each batch's ratio clamped and those averaged."""
    return ema((seen.signal / seen.sq_norm).clip(0, 1), 0.99)


def plug_in(seen: Batches) -> Array:
    """||g_hat||^2 taken for the signal, without the noise in it subtracted."""
    signal = ema(seen.sq_norm, 0.99)
    return signal / (signal + ema(seen.noise, 0.99))


PEERS: dict[str, Estimator] = {
    "fairscale AdaScale": fairscale,
    "AdaptDL": adaptdl,
    "gpt-neox": gpt_neox,
    "mean of ratios 0.99": mean_of_ratios,
    "plug-in 0.99": plug_in,
}
FLOOR, NO_FLOOR = 0.01, 0.0
OURS: dict[str, Estimator] = {
    **{f"ours {beta:g}": ours(beta, FLOOR) for beta in (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)},
    **{f"ours {beta:g}, no floor": ours(beta, NO_FLOOR) for beta in (0.9, 0.95, 0.98)},
    "ours auto (default)": ours_shrunk(0.95, FLOOR),
    "ours auto, no floor": ours_shrunk(0.95, NO_FLOOR),
}
ESTIMATORS = PEERS | OURS


# --------------------------------------------------------------------------------------------------------- the checks
def check_draws(rng: np.random.Generator, d: int = 4, signal: float = 0.5, replicates: int = 100_000) -> float:
    """Means and mean products of the three scalars, short cut against vectors; the largest z score."""
    quick = np.stack(draw(rng, np.array([signal]), d, replicates))[:, 0]
    explicit = np.stack(draw_vectors(rng, signal, d, replicates)[1])
    worst = 0.0
    for power in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 2, 0), (0, 0, 2), (1, 1, 0), (1, 0, 1), (0, 1, 1)):
        a, b = ((part ** np.array(power)[:, None]).prod(0) for part in (quick, explicit))
        worst = max(worst, float(abs(a.mean() - b.mean()) / math.sqrt((a.var() + b.var()) / replicates)))
    if worst > 5:
        raise AssertionError(f"the drawn scalars are not those of explicit gradients: z = {worst:.1f}")
    return worst


def check_ours(rng: np.random.Generator, steps: int = 50) -> float:
    """One stream through `MomentAverages`; the largest difference of ratio and standard error."""
    seen, worst = draw(rng, np.full(steps, 0.3), 20, 1), 0.0
    for smoothing in (0.0, 0.5, 0.9, 0.99):
        averages = MomentAverages(smoothing)
        ratio, squared_error = ratio_and_error(seen, smoothing) if smoothing else (seen.signal / seen.sq_norm, None)
        unclamped = ema(seen.signal, smoothing) / ema(seen.sq_norm, smoothing)
        for t in range(steps):
            sq_norm = seen.sq_norm[t, 0]
            averages.update(GradientMoments(sq_norm, sq_norm + (M - 1) * seen.noise[t, 0], M))
            worst = max(worst, *(float(abs(averages.ratio().item() - r[t, 0])) for r in (ratio, unclamped)))
            if t and squared_error is not None:
                worst = max(worst, abs(averages.ratio_standard_error().item() - math.sqrt(squared_error[t, 0])))
                whole = shrunk(ratio[t].clip(0, 1), squared_error[t])[0]
                worst = max(worst, abs(averages.shrunk_ratio().item() - whole))
    if worst > 1e-9:
        raise AssertionError(f"the bench's averages are not those of snr_optim: {worst:.3g}")
    return worst


def check_fairscale(rng: np.random.Generator, d: int = 5, steps: int = 60) -> float | None:
    """The same gradients through the class itself; the largest difference, None where it is not installed."""
    try:
        from fairscale.optim.adascale import AdaScale
    except ImportError:
        return None
    gradients, seen = draw_vectors(rng, 0.1, d, steps)
    weight = torch.nn.Parameter(torch.zeros(d, dtype=torch.float64))
    optimizer = AdaScale(torch.optim.SGD([weight], lr=0.0), world_size=1, num_gradients_to_accumulate=M)
    expected, worst = fairscale(Batches(*(values[:, None] for values in seen))), 0.0
    for t in range(steps):
        weight.grad = None
        for gradient in torch.from_numpy(gradients[t]):
            (weight @ gradient / M).backward()
        signal, noise = optimizer._grad_sqr_avg(), optimizer._grad_var_avg() / optimizer.scale
        worst = max(worst, float(abs(signal / (signal + noise) - expected[t, 0])))
    if worst > 1e-4:  # it sums the squares in float32
        raise AssertionError(f"the bench's formula is not fairscale's: {worst:.3g}")
    return worst


# ----------------------------------------------------------------------------------------------------- the measurement
def measure(scenario: str, d: int, rho: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All estimators on the same streams."""
    place = [list(SCENARIOS).index(scenario), DIMENSIONS.index(d), RHOS.index(rho)]
    rng = np.random.default_rng([args.seed, *place])
    signal = rho * 10 ** (SCENARIOS[scenario] * np.linspace(0, 1, args.steps))
    seen, best = draw(rng, signal, d, args.replicates), (signal / (signal + 1))[:, None]
    rows = []
    for name, estimator in ESTIMATORS.items():
        relative = estimator(seen) / best
        regret = (relative - 1) ** 2
        late = slice(args.steps // 2, None)
        figures = {
            "regret": regret.mean(), "regret_se": regret.mean(0).std(ddof=1) / math.sqrt(args.replicates),
            "regret_late": regret[late].mean(),
            # of f / f*: the mean over replicates less 1, and the spread over them, both averaged over the steps
            "bias": relative.mean() - 1, "std": relative.std(1).mean(),
            "bias_late": relative[late].mean() - 1, "std_late": relative[late].std(1).mean(),
        }  # fmt: skip
        cell = {"estimator": name, "scenario": scenario, "d_eff": d, "rho": rho}
        rows.append(cell | {key: float(value) for key, value in figures.items()})
    return rows


def geometric(values: list[float]) -> float:
    # Of regrets between 1e-5 and 1e4 any other mean is that of the worst cell alone; 0.1 % of progress is no matter.
    return math.exp(sum(math.log(value + 1e-3) for value in values) / len(values)) - 1e-3


def regrets(cells: list[dict[str, Any]], key: str = "regret", **where: Any) -> list[float]:
    return [cell[key] for cell in cells if all(cell[name] == value for name, value in where.items())]


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per estimator: the geometric means of the regret per scenario, overall, and how it stands to the best peer."""
    by_cell = {(c["scenario"], c["d_eff"], c["rho"], c["estimator"]): c["regret"] for c in cells}
    places = sorted({key[:3] for key in by_cell})
    rows = []
    for name in ESTIMATORS:
        pairs = [(by_cell[(*place, name)], min(by_cell[(*place, peer)] for peer in PEERS)) for place in places]
        row: dict[str, Any] = {"estimator": name}
        row |= {scenario: geometric(regrets(cells, estimator=name, scenario=scenario)) for scenario in SCENARIOS}
        row |= {
            "all": geometric([mine for mine, _ in pairs]),
            "late": geometric(regrets(cells, "regret_late", estimator=name)),
            "worst": max(mine for mine, _ in pairs),
            "not_worse": sum(mine <= peer + 1e-3 for mine, peer in pairs),  # than the best of all peers in that cell
            "cells": len(pairs),
        }
        rows.append(row)
    return rows


def per_rho(cells: list[dict[str, Any]], **where: Any) -> list[dict[str, Any]]:
    return [
        {"estimator": name} | {f"{rho:g}": geometric(regrets(cells, estimator=name, rho=rho, **where)) for rho in RHOS}
        for name in ESTIMATORS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--replicates", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/estimators"), help="folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where, start = environment(torch.device("cpu")), time.perf_counter()
    rng = np.random.default_rng(args.seed)
    checks = {"draws_z": check_draws(rng), "ours": check_ours(rng), "fairscale": check_fairscale(rng)}
    cells = []
    with progress(len(SCENARIOS) * len(DIMENSIONS)) as done:
        for scenario in SCENARIOS:
            for d in DIMENSIONS:
                cells += [row for rho in RHOS for row in measure(scenario, d, rho, args)]
                done(f"{scenario}, d_eff {d}")
    summary, seconds = summarise(cells), time.perf_counter() - start
    write_json(
        args.out / "estimators.json", "estimators", where | {"numpy": np.__version__}, steps=args.steps,
        replicates=args.replicates, seed=args.seed, sub_batches=M, seconds=seconds, checks=checks, summary=summary,
        cells=cells,
    )  # fmt: skip
    draw_picture(cells, args.out / "estimators.png")
    columns = ["estimator", *(f"{rho:g}" for rho in RHOS)]
    for scenario in SCENARIOS:
        for d in DIMENSIONS:
            print(f"\nregret against rho, {scenario}, d_eff {d}")
            print_table(per_rho(cells, scenario=scenario, d_eff=d), columns)
    print("\nregret against rho, geometric mean of all scenarios and d_eff")
    print_table(per_rho(cells), columns)
    print("\ngeometric mean of the regret; cells in which it is not above the best peer's by more than 0.001")
    print_table(summary, list(summary[0]))
    print(f"\nchecks: {checks}; {seconds:.0f} s")


SHOWN = {
    "fairscale AdaScale": ("tab:orange", "-"),
    "AdaptDL": ("tab:green", "-"),
    "gpt-neox": ("tab:purple", "-"),
    "mean of ratios 0.99": ("tab:brown", "-"),
    "ours 0": ("tab:blue", ":"),
    "ours 0.9": ("tab:blue", "--"),
    "ours auto, no floor": ("tab:blue", "-."),
    "ours auto (default)": ("tab:blue", "-"),
}


def draw_picture(cells: list[dict[str, Any]], path: Path) -> None:
    """Regret against rho, a panel per dimension and scenario."""
    plt = pyplot()
    figure, axes = plt.subplots(
        len(SCENARIOS), len(DIMENSIONS), figsize=(12, 10), layout="constrained", sharex=True, sharey="row"
    )
    for line, scenario in zip(axes, SCENARIOS, strict=True):
        for axis, d in zip(line, DIMENSIONS, strict=True):
            for name, (colour, style) in SHOWN.items():
                values = regrets(cells, estimator=name, scenario=scenario, d_eff=d)
                axis.loglog(RHOS, values, style, color=colour, label=name, lw=1.5)
            axis.axhline(1, color="grey", lw=0.6)
            axis.set_title(f"{scenario}, d_eff = {d:,}", fontsize=10)
            axis.grid(alpha=0.25)
        line[0].set_ylabel("regret (1: no progress)")
    for axis in axes[-1]:
        axis.set_xlabel("rho = S / V at the first step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
