"""What came out: a table, a picture and a summary of the runs of one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.common.runs import read_metrics

PANELS = {"reward": "reward", "lr": "learning rate", "snr": "batch SNR  S / V", "gradient_norm": "gradient norm"}
WINDOW = 20  # steps: what "final" means, and over how many a curve is smoothed

Curves = dict[str, np.ndarray]  # quantity -> [seeds, steps]


class Method(Protocol):
    """What the report has to know of a method."""

    @property
    def label(self) -> str: ...

    @property
    def colour(self) -> str: ...

    @property
    def adaptive(self) -> bool:
        """Whether its learning rate is not a constant one."""


def report(out: Path, folders: Mapping[str, Sequence[Path]], methods: Mapping[str, Method], console: Console) -> None:
    """Print the table of all methods that have a finished step, and write ``summary.json`` and ``curves.png``."""
    found = {name: curves for name, runs in folders.items() if (curves := load(runs))}
    if not found:
        console.print("Nothing to report: no step was finished.")
        return
    summary = {name: summarise(curves) for name, curves in found.items()}
    constant = [float(entry["final_reward"] or 0) for name, entry in summary.items() if not methods[name].adaptive]
    for name, curves in found.items():
        summary[name]["steps_to_best_constant"] = steps_to(max(constant), curves) if constant else None
    (out / "summary.json").write_text(json.dumps({"methods": summary}, indent=2) + "\n")
    draw(found, methods, out / "curves.png")
    console.print(table(summary, methods))
    console.print(f"{out / 'summary.json'}\n{out / 'curves.png'}", soft_wrap=True)


def load(runs: Sequence[Path]) -> Curves | None:
    """Every quantity of a method's runs, cut to the steps that all of them have."""
    rows = [run for folder in runs if (run := read_metrics(folder))]
    if not rows:
        return None
    steps = min(len(run) for run in rows)
    return {name: np.array([[row[name] for row in run[:steps]] for run in rows]) for name in rows[0][0]}


def summarise(curves: Curves) -> dict[str, float | int | None]:
    final = curves["reward"][:, -WINDOW:].mean(1)
    norms = curves["gradient_norm"]
    with np.errstate(invalid="ignore"):
        spread = float((norms.std(1) / norms.mean(1)).mean())
    return {
        "final_reward": float(final.mean()),
        "final_reward_std": float(final.std(ddof=1)) if len(final) > 1 else 0.0,
        "seeds": len(final),
        "steps": curves["reward"].shape[1],
        "gradient_norm_spread": spread if np.isfinite(spread) else None,  # not measured, or no gradient at all
        "seconds_per_step": float(np.median(curves["seconds"])),
    }


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over the last ``WINDOW`` steps, fewer at the start; ``[seeds, steps]`` like the input."""
    ends = np.arange(1, values.shape[1] + 1)
    starts = np.maximum(ends - WINDOW, 0)
    windows = [values[:, start:end] for start, end in zip(starts, ends, strict=True)]
    return np.stack(
        [np.nanmean(window, axis=1) if np.isfinite(window).any() else window[:, -1] for window in windows], axis=1
    )


def steps_to(reward: float, curves: Curves) -> int | None:
    """First step at which the reward, smoothed and averaged over seeds, is there."""
    reached = np.flatnonzero(smoothed(curves["reward"]).mean(0) >= reward - 1e-9)
    return int(reached[0]) + 1 if len(reached) else None


def table(summary: Mapping[str, Mapping[str, float | int | None]], methods: Mapping[str, Method]) -> Table:
    grid = Table(title=f"Final reward: mean of the last {WINDOW} steps, ± standard deviation over seeds")
    grid.add_column("method")
    for column in ("final reward", "seeds", "steps to best\nconstant lr", "gradient norm\nstd / mean", "s / step"):
        grid.add_column(column, justify="right")
    for name, entry in summary.items():
        grid.add_row(
            methods[name].label,
            f"{entry['final_reward']:.3f} ± {entry['final_reward_std']:.3f}",
            str(entry["seeds"]),
            str(entry["steps_to_best_constant"] or "never"),
            "-" if (spread := entry["gradient_norm_spread"]) is None else f"{spread:.2f}",
            f"{entry['seconds_per_step']:.2f}",
        )
    return grid


def draw(found: Mapping[str, Curves], methods: Mapping[str, Method], path: Path) -> None:
    """Reward, lr, SNR and gradient norm of all methods: the mean over seeds, and their spread."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="constrained")
    for axis, (quantity, label) in zip(axes.flat, PANELS.items(), strict=True):
        for name, curves in found.items():
            if np.isnan(curves[quantity]).all():  # not measured
                continue
            lines = curves[quantity] if quantity == "lr" else smoothed(curves[quantity])
            colour = methods[name].colour
            steps = np.arange(1, lines.shape[1] + 1)
            axis.plot(steps, lines.mean(0), color=colour, label=methods[name].label, lw=1.8)
            axis.fill_between(steps, lines.min(0), lines.max(0), color=colour, alpha=0.15, lw=0)
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 1].set_yscale("log")
    axes[1, 1].set_yscale("log")
    axes[1, 0].axhline(0, color="black", lw=0.6)
    for axis in axes[1]:
        axis.set_xlabel("step")
    axes[0, 0].legend(frameon=False)
    figure.suptitle(
        f"Mean over seeds, band from lowest to highest; smoothed over {WINDOW} steps (lr: as it was)", fontsize=10
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
