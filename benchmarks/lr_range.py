"""How wide is the range of learning rates that train? Final reward of the demo task over ceilings, schedules and seeds.

    python -m benchmarks.lr_range                              # 300 runs: about 45 minutes on two cores
    python -m benchmarks.lr_range --optimizers adamw --schedules constant snr --seeds 0 1
    python -m benchmarks.lr_range --resume                     # go on with the runs that --out lacks

All schedules share the task, the RLOO baseline, 20 steps of linear warm-up, seeds and samples. They differ in what the
learning rate does below its ceiling: nothing (constant), half a cosine to zero, AdaScale's gain (Johnson et al. 2020,
arXiv 2007.05105, with fairscale's averages), or S / (S + V) by ``SNRAdaptiveLR`` with its defaults.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.demo_task import GROUP, LAST, WARM_UP, logged_runs, prepare, run_missing, train_on_demo_task
from benchmarks.harness import environment, print_table, pyplot, tidy, write_json
from examples.common.policy import Rollout, tiny_qwen3
from examples.qwen3_arithmetic import OPTIMIZERS
from snr_optim import AccumulationSource, GradientMoments, GradWeightedBaseline, SNRAdaptiveLR

CEILINGS = {
    "adamw": [5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3, 1e-2],
    "sgd": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0],
}
SCHEDULES = ("constant", "cosine", "adascale", "snr")


@dataclass(frozen=True)
class Setting:
    """One run."""

    optimizer: str
    schedule: str
    ceiling: float
    seed: int
    steps: int


class AdaScale:
    """Gain / m of AdaScale: 1 where all is noise, 1 / m where there is none; the ceiling is m times its lr for one.

    The averages, their bias correction and their clamps are those of fairscale 0.4.13 (``optim/adascale.py``), where
    ``m`` sub-batches give ``smoothing = 1 - m / 1000``.
    """

    def __init__(self, optimizer: Optimizer, schedule: LambdaLR) -> None:
        self.optimizer, self.schedule = optimizer, schedule
        self.sqr = self.var = self.weight = 0.0

    def observe(self, moments: GradientMoments) -> None:
        keep = max(1 - moments.num_sub_batches / 1000, 0)
        self.sqr = keep * self.sqr + (1 - keep) * float(moments.signal)
        self.var = keep * self.var + (1 - keep) * float(moments.noise) * moments.num_sub_batches  # of one sub-batch
        self.weight = keep * self.weight + (1 - keep)
        var, sqr = max(self.var / self.weight, 1e-6), max(self.sqr / self.weight, 0.0)
        gain = (var + sqr) / (var / moments.num_sub_batches + sqr)
        for group, ceiling in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = ceiling * gain / moments.num_sub_batches

    def step(self) -> None:
        self.schedule.step()


def train(setting: Setting, weights: Path) -> list[float]:
    """The mean reward of every step."""
    model, tokenizer = tiny_qwen3(setting.seed)
    model.load_state_dict(torch.load(weights, weights_only=True))
    optimizer = OPTIMIZERS[setting.optimizer](model.parameters(), setting.ceiling)

    def shape(step: int) -> float:
        warm = min(1.0, (1 + step) / WARM_UP)
        return warm * (0.5 * (1 + math.cos(math.pi * step / setting.steps)) if setting.schedule == "cosine" else 1.0)

    inner = LambdaLR(optimizer, shape)
    source = AccumulationSource(model)
    scheduler: Any = {"snr": SNRAdaptiveLR, "adascale": AdaScale}.get(setting.schedule, lambda _, inner: inner)(
        optimizer, inner
    )
    baseline = GradWeightedBaseline("group")  # without weights: RLOO

    def step() -> None:
        moments = source.moments()
        if scheduler is not inner:
            scheduler.observe(moments)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def advantages(rewards: Tensor, rollout: Rollout) -> Tensor:
        return baseline.advantages(rewards, None, groups=GROUP)

    return train_on_demo_task(model, tokenizer, setting.seed, setting.steps, advantages, step)


def run(job: tuple[Setting, Path]) -> dict[str, Any]:
    setting, weights = job
    rewards = train(setting, weights)
    return asdict(setting) | {"final": mean(rewards[-LAST:]), "mean": mean(rewards)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By optimizer and schedule: final rewards, and which ceilings train."""
    result = []
    for optimizer, schedule in sorted({(row["optimizer"], row["schedule"]) for row in rows}):
        of_schedule = [row for row in rows if (row["optimizer"], row["schedule"]) == (optimizer, schedule)]
        finals: dict[float, list[float]] = {}
        for row in sorted(of_schedule, key=lambda row: row["ceiling"]):
            finals.setdefault(row["ceiling"], []).append(row["final"])
        means = {ceiling: mean(values) for ceiling, values in finals.items()}
        best = max(means.values())
        near = [ceiling for ceiling, value in means.items() if value >= 0.9 * best]
        result.append(
            {
                "optimizer": optimizer,
                "schedule": schedule,
                "best": best,
                "best_ceiling": max(means, key=lambda ceiling: means[ceiling]),
                "within_10_percent": [min(near), max(near)],
                "highest_at_80_percent": max(ceiling for ceiling, value in means.items() if value >= 0.8 * best),
                "final_reward": {
                    f"{ceiling:g}": [mean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None]
                    for ceiling, values in finals.items()
                },
            }
        )
    return result


def draw(result: list[dict[str, Any]], title: str, path: Path) -> None:
    plt = pyplot()
    colours = {"constant": "#777777", "cosine": "#c28e0e", "adascale": "#8a5cd6", "snr": "#0b6fb8"}
    optimizers = sorted({row["optimizer"] for row in result})
    figure, all_axes = plt.subplots(1, len(optimizers), figsize=(5.2 * len(optimizers), 3.8), layout="constrained")
    for axes, optimizer in zip([all_axes] if len(optimizers) == 1 else all_axes, optimizers, strict=True):
        for row in result:
            if row["optimizer"] == optimizer:
                means, errors = zip(*row["final_reward"].values(), strict=True)
                ceilings, bars = [float(c) for c in row["final_reward"]], [error or 0.0 for error in errors]
                colour, width = colours[row["schedule"]], 2.4 if row["schedule"] == "snr" else 1.4
                axes.errorbar(
                    ceilings, means, bars, color=colour, label=row["schedule"], marker="o", ms=4, capsize=2, lw=width
                )
        axes.set(xscale="log", xlabel="learning rate: constant, or ceiling", ylabel="final reward", title=optimizer)
        tidy(axes)
        axes.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--ceilings", type=float, nargs="+", help="in place of those of the study")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/lr_range"))
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    origin = environment(torch.device("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    rows = logged_runs(log, args.resume)
    settings = [
        Setting(optimizer, schedule, ceiling, seed, args.steps)
        for seed in args.seeds
        for optimizer in args.optimizers
        for ceiling in args.ceilings or CEILINGS[optimizer]
        for schedule in args.schedules
    ]
    done = {tuple(row[name] for name in asdict(settings[0])) for row in rows}
    missing = [setting for setting in settings if tuple(asdict(setting).values()) not in done]
    starts = prepare(args.out, args.seeds)
    jobs = [(setting, starts[setting.seed]) for setting in missing]
    run_missing(run, jobs, rows, log, args.jobs, lambda row: f"{row['optimizer']} {row['schedule']} {row['ceiling']:g}")
    result = summary(rows)
    path = args.out / "lr_range.json"
    write_json(path, "lr_range", origin, steps=args.steps, seeds=str(args.seeds), summary=result, runs=rows)
    draw(result, f"{args.steps} steps, mean ± standard error over seeds {args.seeds}", args.out / "lr_range.png")
    print_table(result, ("optimizer", "schedule", "best", "best_ceiling", "within_10_percent", "highest_at_80_percent"))


if __name__ == "__main__":
    main()
