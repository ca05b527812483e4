"""Does less gradient variance learn faster? The demo task with each baseline, at its own best learning rate.

    python -m benchmarks.learning_curves                         # 140 runs: 45 minutes on two cores
    python -m benchmarks.learning_curves --baselines rloo snr-optim --seeds 0 1 --resume

Two schedules: constant, and S / (S + V) under a ceiling by ``SNRAdaptiveLR`` with its defaults; AdamW and 20 steps of
warm-up in both. The learning rate of each pair of baseline and schedule is the best of a grid on seeds of its own; the
curves are of other seeds. All runs see the same problems. "paper" and "snr-optim" have logit gradient norms as weights.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.demo_task import GROUP, LAST, PROMPTS, WARM_UP, logged_runs, prepare, run_missing, train_on_demo_task
from benchmarks.harness import environment, print_table, pyplot, tidy, write_json
from examples.common.policy import Rollout, logit_weights, tiny_qwen3
from examples.qwen3_arithmetic import METHODS
from snr_optim import SNRAdaptiveLR

LRS = {"constant": [1e-4, 2e-4, 4e-4], "snr": [1e-3, 2e-3, 4e-3]}
TUNING_SEEDS = [100, 101]
BASELINES = {  # those of the demo; "paper" and "snr-optim" are given logit gradient norms: what any model can afford
    "none": METHODS["reinforce"],
    "grpo": METHODS["grpo"],
    "rloo": METHODS["rloo"],
    "paper": replace(METHODS["rloo"], colour="#c28e0e", weighted=True),
    "snr-optim": METHODS["oblr-po"],
}
SCOPE = "shrink"  # of the baseline of "snr-optim"


@dataclass(frozen=True)
class Setting:
    """One run."""

    baseline: str
    schedule: str
    lr: float
    seed: int
    steps: int


def train(setting: Setting, weights_file: Path) -> list[float]:
    """The mean reward of every step."""
    model, tokenizer = tiny_qwen3(setting.seed)
    model.load_state_dict(torch.load(weights_file, weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr, weight_decay=0.0)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (1 + step) / WARM_UP))
    scheduler: Any = warm_up
    if setting.schedule == "snr":
        scheduler = SNRAdaptiveLR(optimizer, schedule=warm_up)
        scheduler.attach(model)
    method = BASELINES[setting.baseline]
    baseline = method.baseline(SCOPE)
    learning = {"update": True} if setting.baseline == "snr-optim" else {}

    def step() -> None:
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def advantages(rewards: Tensor, rollout: Rollout) -> Tensor:
        weights = logit_weights(model, rollout) if method.weighted else None
        found: Tensor = baseline.advantages(rewards, weights, groups=GROUP, **learning)
        return found

    return train_on_demo_task(model, tokenizer, setting.seed, setting.steps, advantages, step)


def run(job: tuple[Setting, Path]) -> dict[str, Any]:
    setting, weights_file = job
    rewards = train(setting, weights_file)
    return asdict(setting) | {"final": mean(rewards[-LAST:]), "mean": mean(rewards), "rewards": rewards}


def best_lr(rows: list[dict[str, Any]], baseline: str, schedule: str, steps: int) -> float:
    """Of the grid, on the tuning seeds: the highest mean reward over all steps, the area under the curve."""
    areas: dict[float, list[float]] = {}
    for row in rows:
        wanted = (row["baseline"], row["schedule"], row["steps"]) == (baseline, schedule, steps)
        if wanted and row["seed"] in TUNING_SEEDS and row["lr"] in LRS[schedule]:
            areas.setdefault(row["lr"], []).append(row["mean"])
    return max(areas, key=lambda lr: mean(areas[lr]))


def interval(values: np.ndarray) -> list[float]:
    """95 % of bootstrap means over the first axis."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return np.quantile(means, [0.025, 0.975]).tolist()


def summary(rows: list[dict[str, Any]], chosen: dict[tuple[str, str], float], seeds: list[int]) -> list[dict[str, Any]]:
    """Final and mean reward of each pair, and its gain over RLOO with the same schedule, seed by seed."""
    curves = {}
    for (baseline, schedule), lr in chosen.items():
        of_seed = {row["seed"]: row for row in rows
                   if (row["baseline"], row["schedule"], row["lr"]) == (baseline, schedule, lr)}  # fmt: skip
        curves[baseline, schedule] = [of_seed[seed] for seed in seeds]
    result = []
    for (baseline, schedule), runs in curves.items():
        final, area = (np.array([row[key] for row in runs]) for key in ("final", "mean"))
        entry = {
            "baseline": baseline, "schedule": schedule, "lr": chosen[baseline, schedule],
            "final": float(final.mean()), "final_interval": interval(final),
            "mean": float(area.mean()), "mean_interval": interval(area),
        }  # fmt: skip
        if ("rloo", schedule) in curves:
            gain = area - np.array([row["mean"] for row in curves["rloo", schedule]])
            entry |= {"mean_minus_rloo": float(gain.mean()), "mean_minus_rloo_interval": interval(gain)}
        result.append(entry)
    return result


def draw(rows: list[dict[str, Any]], chosen: dict[tuple[str, str], float], seeds: list[int], path: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for axis, schedule in zip(axes, LRS, strict=True):
        for (baseline, of_schedule), lr in chosen.items():
            if of_schedule != schedule:
                continue
            colour = BASELINES[baseline].colour
            runs = [row["rewards"] for row in rows if row["seed"] in seeds
                    and (row["baseline"], row["schedule"], row["lr"]) == (baseline, schedule, lr)]  # fmt: skip
            curves = np.array(runs)
            smooth = np.stack([np.convolve(curve, np.ones(LAST) / LAST, "valid") for curve in curves])
            samples = (np.arange(smooth.shape[1]) + LAST) * PROMPTS * GROUP
            low, high = np.array([interval(smooth[:, k]) for k in range(smooth.shape[1])]).T
            axis.plot(samples, smooth.mean(0), color=colour, label=f"{baseline}, lr {lr:g}", lw=1.8)
            axis.fill_between(samples, low, high, color=colour, alpha=0.12, lw=0)
        axis.set(xlabel="sampled outputs", title=f"lr: {schedule}")
        tidy(axis)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel(f"reward, mean of {LAST} steps")
    figure.suptitle(f"Mean over {len(seeds)} seeds with 95 % bootstrap intervals", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--schedules", nargs="+", default=list(LRS), choices=LRS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/learning_curves"))
    parser.add_argument("--resume", action="store_true", help="go on with the runs that --out lacks")
    args = parser.parse_args()
    if set(args.seeds) & set(TUNING_SEEDS):
        raise SystemExit(f"error: --seeds: {TUNING_SEEDS} choose the learning rates")
    origin = environment(torch.device("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "runs.jsonl"
    rows = logged_runs(log, args.resume)
    starts = prepare(args.out, [*TUNING_SEEDS, *args.seeds])
    pairs = [(baseline, schedule) for baseline in args.baselines for schedule in args.schedules]

    def do(settings: list[Setting]) -> None:
        done = [Setting(*(row[field.name] for field in fields(Setting))) for row in rows]
        jobs = [(setting, starts[setting.seed]) for setting in settings if setting not in done]
        run_missing(run, jobs, rows, log, args.jobs, lambda row: f"{row['baseline']} {row['schedule']} {row['lr']:g}")

    do([Setting(b, s, lr, seed, args.steps) for seed in TUNING_SEEDS for b, s in pairs for lr in LRS[s]])
    chosen = {(b, s): best_lr(rows, b, s, args.steps) for b, s in pairs}
    do([Setting(b, s, lr, seed, args.steps) for seed in args.seeds for (b, s), lr in chosen.items()])
    result = summary(rows, chosen, args.seeds)
    for row in rows:
        row["rewards"] = [round(reward, 6) for reward in row["rewards"]]
    path = args.out / "learning_curves.json"
    write_json(path, "learning_curves", origin, seeds=str(args.seeds), steps=args.steps, summary=result, runs=rows)
    draw(rows, chosen, args.seeds, args.out / "learning_curves.png")
    print_table(result, ("baseline", "schedule", "lr", "final", "mean", "mean_minus_rloo", "mean_minus_rloo_interval"))


if __name__ == "__main__":
    main()
