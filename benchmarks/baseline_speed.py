"""How long does a baseline take? Against verl's OPO and Optimal Token Baseline, from the same tensors, in the same run.

    python -m benchmarks.baseline_speed                  # a minute; `make peers` first, for verl
    python -m benchmarks.baseline_speed --device cuda

Everything from what the rollout gives to advantages is timed: rewards-to-go, token weights and their sums included.
verl loops over groups in Python and puts each output into its own baseline; ours is vectorised and leaves it out. (In
earnest the token weights come from ``logprob_stats``, without the cancellation that ``1 - 2 p + sum p^2`` has.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, print_table, progress, time_calls, write_json
from snr_optim import GradWeightedBaseline

GROUP = 8
COLUMNS = ["what", "implementation", "size", "ms", "low", "high", "times_faster"]


def outputs(batch: int, length: int, device: torch.device) -> dict[str, Tensor]:
    """What a rollout gives: a reward at the last token, a mask, log-probs and sums of squared probabilities."""
    lengths = torch.randint(length // 10, length + 1, (batch,), device=device)
    mask = (torch.arange(length, device=device) < lengths[:, None]).float()
    rewards = torch.zeros(batch, length, device=device)
    rewards[torch.arange(batch, device=device), lengths - 1] = torch.randint(0, 2, (batch,), device=device).float()
    probabilities = torch.rand(batch, length, device=device).clamp_min(1e-3)
    return {
        "rewards": rewards, "mask": mask, "log_probs": probabilities.log(), "sum_p_squared": probabilities.square(),
    }  # fmt: skip


def by_token(scope: str, update: bool = False) -> Callable[[dict[str, Tensor]], Tensor]:
    """Rewards-to-go and cumulative weights, then the baseline of each token."""
    baseline = GradWeightedBaseline(scope)

    def call(o: dict[str, Tensor]) -> Tensor:
        to_go = o["rewards"].flip(1).cumsum(1).flip(1)
        weights = o["log_probs"].exp().mul_(-2).add_(o["sum_p_squared"]).add_(1).mul_(o["mask"])
        cumulative = weights.cumsum(1).mul_(o["mask"])
        return baseline.advantages(to_go, cumulative, groups=GROUP, update=update).mul_(o["mask"])

    return call


def by_output(scope: str, update: bool = False) -> Callable[[dict[str, Tensor]], Tensor]:
    """Lengths as weights, as OPO has it."""
    baseline = GradWeightedBaseline(scope)

    def call(o: dict[str, Tensor]) -> Tensor:
        rewards, lengths = o["rewards"].sum(1), o["mask"].sum(1)
        return baseline.advantages(rewards, lengths, groups=GROUP, update=update)[:, None] * o["mask"]

    return call


def peers() -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    try:
        from verl.trainer.ppo import core_algos
    except ImportError:
        return {}

    def index(o: dict[str, Tensor]) -> Any:
        return (torch.arange(len(o["rewards"])) // GROUP).numpy()

    return {
        "opo": lambda o: core_algos.compute_opo_outcome_advantage(o["rewards"], o["mask"], index(o))[0],
        "otb": lambda o: core_algos.compute_optimal_token_baseline_advantage(
            o["rewards"], o["mask"], index(o), o["log_probs"], o["sum_p_squared"]
        )[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--many", type=int, default=1 << 20, help="outputs, in the test of many")
    parser.add_argument("--seconds", type=float, default=3.0, help="to spend on each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/baseline_speed"))
    args = parser.parse_args()
    device = torch.device(args.device)
    origin = environment(device)
    torch.manual_seed(0)
    batch = outputs(args.batch, args.length, device)
    rewards, weights = torch.randint(0, 2, (args.many,), device=device).float(), torch.rand(args.many, device=device)
    ids = torch.randperm(args.many, device=device) // GROUP
    size, many = f"{args.batch} x {args.length}", f"{args.many} outputs"
    calls = {("otb", "verl"): peers().get("otb"), ("otb", "snr-optim group"): by_token("group"),
             ("otb", "snr-optim shrink"): by_token("shrink"), ("opo", "verl"): peers().get("opo"),
             ("opo", "snr-optim group"): by_output("group"),
             ("opo", "snr-optim shrink, update"): by_output("shrink", update=True)}  # fmt: skip
    cases = [(what, name, size, partial(call, batch)) for (what, name), call in calls.items() if call]
    group, shrink = GradWeightedBaseline("group"), GradWeightedBaseline()
    cases += [
        ("many", "snr-optim group", many, partial(group.advantages, rewards, weights, GROUP)),
        ("many", "snr-optim shrink", many, partial(shrink.advantages, rewards, weights, GROUP)),
        ("many", "snr-optim shrink, update", many, partial(shrink.advantages, rewards, weights, GROUP, update=True)),
        ("many", "snr-optim shrink, scattered ids", many, partial(shrink.advantages, rewards, weights, ids)),
    ]
    rows: list[dict[str, Any]] = []
    with progress(len(cases)) as report:
        for what, name, of_size, call in cases:
            timing = time_calls(lambda _, call=call: call(), device, seconds=args.seconds)
            rows.append(
                {"what": what, "implementation": name, "size": of_size, "ms": timing.median, "low": timing.low,
                 "high": timing.high, "calls": timing.calls}
            )  # fmt: skip
            report(f"{what} {name}")
    for row in rows:
        theirs = [other["ms"] for other in rows if other["what"] == row["what"] and other["implementation"] == "verl"]
        row["times_faster"] = theirs[0] / row["ms"] if theirs else None
    write_json(args.out / "baseline_speed.json", "baseline_speed", origin, rows=rows)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    main()
