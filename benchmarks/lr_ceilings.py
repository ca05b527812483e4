"""How wide is the range of learning rates at which each method learns? Final reward against the lr (or its ceiling).

    python -m benchmarks.lr_ceilings                     # about 12 minutes on two cores
    python -m benchmarks.lr_ceilings --seeds 10 11 12 --lrs 2e-4 1e-3 --steps 100

Its seeds are not those of the demo, so that the demo's learning rates are not tuned on the runs that it shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, pyplot, tidy, write_json
from examples.qwen3_arithmetic import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/lr_ceilings"))
    args = parser.parse_args()
    origin = environment(torch.device("cpu")) | {"machine": f"{args.jobs} processes of one thread"}
    rows = {lr: run(lr, args) for lr in args.lrs}
    final = {
        method: {f"{lr:g}": [row[method]["final_reward"], row[method]["final_reward_std"]] for lr, row in rows.items()}
        for method in METHODS
    }
    path = args.out / "lr_ceilings.json"
    write_json(path, "lr_ceilings", origin, steps=args.steps, seeds=str(args.seeds), final_reward=final)
    draw(final, f"{args.steps} steps, mean ± std over seeds {args.seeds}", args.out / "lr_ceilings.png")
    for method, rewards in final.items():
        print(f"{method:10}", "  ".join(f"{lr}: {mean:.3f}±{std:.3f}" for lr, (mean, std) in rewards.items()))


def run(lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """All methods at one learning rate: the summary that the example writes."""
    out = args.out / f"{lr:g}"
    options = {
        "--method": METHODS,
        "--seeds": args.seeds,
        "--lr": [lr],
        "--steps": [args.steps],
        "--jobs": [args.jobs],
        "--out": [out],
    }
    words = [str(word) for name, values in options.items() for word in (name, *values)]
    # Rewards are all that is read here, so that the noise of constant rates need not be measured.
    subprocess.run([sys.executable, "-m", "examples.qwen3_arithmetic", *words, "--no-measure"], check=True)
    methods: dict[str, Any] = json.loads((out / "summary.json").read_text())["methods"]
    return methods


def draw(final: dict[str, dict[str, list[float]]], title: str, path: Path) -> None:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, rewards in final.items():
        lrs = [float(lr) for lr in rewards]
        mean, std = zip(*rewards.values(), strict=True)
        axis.errorbar(
            lrs, mean, std, color=METHODS[method].colour, label=METHODS[method].label, marker="o", capsize=3, lw=1.8
        )
    axis.set(xscale="log", xlabel="constant learning rate, or ceiling of OBLR-PO", ylabel="final reward")
    tidy(axis)
    axis.legend(frameon=False)
    axis.set_title(title, fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
