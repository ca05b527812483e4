"""How wide is the range of learning rates at which each method learns? Final reward against the lr (or its ceiling).

    python -m benchmarks.lr_ceilings                     # about 12 minutes on two cores
    python -m benchmarks.lr_ceilings --seeds 10 11 12 --lrs 2e-4 1e-3 --steps 100

Its seeds are not those of the demo, so that the demo's learning rates are not tuned on the runs that it shows.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ROOT, commit
from examples.qwen3_arithmetic import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-4, 2e-4, 5e-4, 1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/lr_ceilings"))
    args = parser.parse_args()
    rows = {lr: run(lr, args) for lr in args.lrs}
    result = {
        "command": "python -m benchmarks.lr_ceilings " + " ".join(sys.argv[1:]),
        "environment": {
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {args.jobs} processes of one thread",
        },
        "steps": args.steps,
        "seeds": args.seeds,
        "final_reward": {
            method: {
                f"{lr:g}": [row[method]["final_reward"], row[method]["final_reward_std"]] for lr, row in rows.items()
            }
            for method in METHODS
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lr_ceilings.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, args.out / "lr_ceilings.png")
    for method, rewards in result["final_reward"].items():
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
    subprocess.run([sys.executable, "-m", "examples.qwen3_arithmetic", *words], check=True, cwd=ROOT)
    methods: dict[str, Any] = json.loads((out / "summary.json").read_text())["methods"]
    return methods


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for method, rewards in result["final_reward"].items():
        lrs = [float(lr) for lr in rewards]
        mean, std = zip(*rewards.values(), strict=True)
        axis.errorbar(
            lrs, mean, std, color=METHODS[method].colour, label=METHODS[method].label, marker="o", capsize=3, lw=1.8
        )
    axis.set(xscale="log", xlabel="constant learning rate, or ceiling of OBLR-PO", ylabel="final reward")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    axis.set_title(f"{result['steps']} steps, mean ± std over seeds {result['seeds']}", fontsize=10)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
