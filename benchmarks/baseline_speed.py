"""How long does a baseline take? Against verl's OPO and Optimal Token Baseline, from the same tensors, in the same run.

    python -m benchmarks.baseline_speed                  # a minute; `make peers` first, for verl
    python -m benchmarks.baseline_speed --device cuda

Everything from what the rollout gives to advantages is timed: rewards-to-go, token weights and their sums included.
Batches are taken in turn, so that none is in a cache when its turn comes. verl loops over groups in Python and puts
each output into its own baseline; ours is vectorised and leaves it out. (In earnest the token weights come from
``logprob_stats``, without the cancellation that ``1 - 2 p + sum p^2`` has.)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Row,
    attempt,
    conclude,
    copies,
    environment,
    left_out,
    parse_arguments,
    progress,
    time_calls,
    write_json,
)
from snr_optim import GradWeightedBaseline

GROUP = 8
COLUMNS = ["what", "implementation", "size", "ms", "host_ms", "low", "high", "times_faster", "refused"]
SIZES = {"cpu": (4096, 1024, 1 << 20), "cuda": (4096, 1024, 1 << 20), "small": (16, 20, 64)}
SECONDS = {"cpu": 3.0, "cuda": 3.0, "small": 0.0}


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
    except Exception as error:  # one that is there, but not for this torch, fails in its own way
        return dict(left_out("verl", error))

    def index(o: dict[str, Tensor]) -> Any:
        return (torch.arange(len(o["rewards"])) // GROUP).numpy()

    return {
        "opo": lambda o: core_algos.compute_opo_outcome_advantage(o["rewards"], o["mask"], index(o))[0],
        "otb": lambda o: core_algos.compute_optimal_token_baseline_advantage(
            o["rewards"], o["mask"], index(o), o["log_probs"], o["sum_p_squared"]
        )[0],
    }


Case = tuple[str, str, str, Callable[[int], Tensor]]  # what, by whom, of which size; the argument is the turn


def of_a_batch(num: int, length: int, device: torch.device) -> list[Case]:
    """Baselines of tokens and of outputs, verl's first."""
    torch.manual_seed(0)
    nbytes = 4 * 4 * num * length
    batches = [outputs(num, length, device) for _ in range(copies(nbytes))]
    theirs = peers()
    calls = {("otb", "verl"): theirs.get("otb"), ("otb", "snr-optim group"): by_token("group"),
             ("otb", "snr-optim shrink"): by_token("shrink"), ("opo", "verl"): theirs.get("opo"),
             ("opo", "snr-optim group"): by_output("group"),
             ("opo", "snr-optim shrink, update"): by_output("shrink", update=True)}  # fmt: skip

    def in_turn(call: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[int], Tensor]:
        return lambda turn: call(batches[turn % len(batches)])

    return [(what, name, f"{num} x {length}", in_turn(call)) for (what, name), call in calls.items() if call]


def of_many(num: int, device: torch.device) -> list[Case]:
    """A baseline of very many outputs, in groups in a row or anywhere."""
    inputs = [
        (torch.randint(0, 2, (num,), device=device).float(), torch.rand(num, device=device))
        for _ in range(copies(2 * 4 * num))
    ]
    ids = torch.randperm(num, device=device) // GROUP
    group, shrink = GradWeightedBaseline("group"), GradWeightedBaseline()

    def case(name: str, baseline: GradWeightedBaseline, groups: int | Tensor, **options: bool) -> Case:
        def call(turn: int) -> Tensor:
            rewards, weights = inputs[turn % len(inputs)]
            return baseline.advantages(rewards, weights, groups, **options)

        return "many", f"snr-optim {name}", f"{num} outputs", call

    return [
        case("group", group, GROUP),
        case("shrink", shrink, GROUP),
        case("shrink, update", shrink, GROUP, update=True),
        case("shrink, scattered ids", shrink, ids),
    ]


def measure(call: Callable[[int], Tensor], device: torch.device, seconds: float) -> Iterator[Row]:
    timing = time_calls(call, device, seconds=seconds)
    yield {
        "ms": timing.median, "low": timing.low, "high": timing.high, "calls": timing.calls, "host_ms": timing.host,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="4096")
    parser.add_argument("--length", type=int, help="1024")
    parser.add_argument("--many", type=int, help="outputs, in the test of many: 1048576")
    parser.add_argument("--seconds", type=float, help="to spend on each: 3")
    args = parse_arguments(parser, "baseline_speed")
    num, length, most = SIZES[args.sizes]
    num, length, most = args.batch or num, args.length or length, args.many or most
    seconds = SECONDS[args.sizes] if args.seconds is None else args.seconds
    origin = environment(args.device)
    rows: list[Row] = []
    cases = [*of_a_batch(num, length, args.device), *of_many(most, args.device)]
    with progress(len(cases)) as report:
        for what, name, size, call in cases:
            about = {"what": what, "implementation": name, "size": size}
            rows += attempt(about, measure(call, args.device, seconds), args.device)
            of_verl = [row for row in rows if row["what"] == what and row["implementation"] == "verl" and "ms" in row]
            if of_verl and "ms" in rows[-1]:
                rows[-1]["times_faster"] = of_verl[0]["ms"] / rows[-1]["ms"]
            write_json(args.json, "baseline_speed", origin, rows=rows)
            report(f"{what} {name}")
    conclude(rows, COLUMNS, lambda row: row["implementation"].startswith("snr-optim"))


if __name__ == "__main__":
    main()
