"""How much gradient variance does each baseline leave? Against the oracle, on policies at several stages of training.

    python -m benchmarks.baseline_variance                       # builds the policies first: an hour on two cores
    python -m benchmarks.baseline_variance --tasks addition --stages 90 150 --groups 8 --prompts 64

Groups of outputs are drawn again and again from each policy of `benchmarks.policy_stages`; every baseline sees the same
draws. The figure is the trace of the covariance of the batch gradient over the draws, all parameters, exact gradients,
prompts held fixed (what differs between prompts is noise that no baseline can touch). For methods that are not
unbiased the gradient is scaled first so that its mean has the right length along the true gradient.

Ours learn from the 20 recorded batches that led to the policy, cut to as many prompts and outputs as the cell has, and
nothing is learned from the draws. "+ prompts" learns all prompts of the study at the two visits. The weights of those
batches are of the real policy, which has more outputs than the study's; logit and head weights are the real policy's
throughout.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import environment, print_table, progress, pyplot, tidy, write_json
from benchmarks.policy_stages import KINDS, VISITS, Stage, build_all, load
from snr_optim import GradWeightedBaseline

RESAMPLES = {8: 15, 64: 50, 128: 50}  # per set of prompts, of which there are 16, 2 and 1
FLOAT64 = torch.float64


# ------------------------------------------------------------------------------------------------------------ the draws
@dataclass
class Draw:
    """A batch: ``B = prompts * group`` outputs of it, neighbours share a prompt."""

    group: int
    rewards: Tensor  # [B]
    exact: Tensor  # [B] ||grad log pi||^2
    head: Tensor  # [B]
    tokens: Tensor  # [B, T] ||e_y - p||^2
    mask: Tensor  # [B, T]
    nodes: Tensor  # [B, T] into the coefficients
    prompts: Tensor  # [B] ids
    oracle: Tensor  # [B] the optimal baseline of the prompt

    @property
    def logit(self) -> Tensor:
        return self.tokens.sum(1)

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1).to(FLOAT64)


class Study:
    """Some prompts of a stage: draws from them, and the variance of what baselines make of the draws."""

    def __init__(self, stage: Stage, chosen: Tensor) -> None:
        self.chosen = chosen
        outputs = [stage.outputs[q] for q in chosen.tolist()]
        used = torch.unique(torch.cat([o.nodes[o.nodes >= 0] for o in outputs]))
        place = torch.full((len(stage.gram),), -1)
        place[used] = torch.arange(len(used))
        self.gram = stage.gram if len(used) == len(stage.gram) else stage.gram[used][:, used]
        most = max(len(o.rewards) for o in outputs)

        def padded(rows: list[Tensor], value: float = 0) -> Tensor:  # [prompts, outputs, ...]
            return torch.stack([pad(row, most, value) for row in rows])

        self.probability = padded([o.probability for o in outputs])
        self.rewards = padded([o.rewards for o in outputs])
        nodes = padded([o.nodes for o in outputs], -1)
        self.nodes = torch.where(nodes >= 0, place[nodes], -1)
        self.tokens = padded([o.token_weights for o in outputs])
        self.head = padded([o.head_weights for o in outputs])
        self.exact = squared_norms(self.nodes, self.gram)
        wr, w = ((self.probability * self.exact * x).sum(1) for x in (self.rewards, 1.0))
        self.oracle = torch.where(w > 0, wr / w, 0)  # a prompt with one output has no gradient
        self.prompts = stage.prompts[chosen]
        self.gradient = self.coefficients(
            self.nodes.flatten(0, 1), (self.probability * self.rewards).view(1, -1, 1) / len(chosen)
        )[0]

    def draw(self, group: int, generator: torch.Generator) -> Draw:
        u = torch.multinomial(self.probability, group, replacement=True, generator=generator)
        q = torch.arange(len(self.chosen))[:, None].expand_as(u)
        b = q.flatten()
        nodes = self.nodes[q, u].flatten(0, 1)
        return Draw(
            group, self.rewards[q, u].flatten(), self.exact[q, u].flatten(), self.head[q, u].flatten(),
            self.tokens[q, u].flatten(0, 1), nodes >= 0, nodes, self.prompts[b], self.oracle[b],
        )  # fmt: skip

    def coefficients(self, nodes: Tensor, advantages: Tensor) -> Tensor:
        """Of ``sum_it A_it grad log pi(token it)`` in gradients of tokens: ``[methods, B, T or 1] -> [methods, n]``."""
        kept = nodes >= 0
        values = advantages.expand(-1, *nodes.shape)[:, kept]
        return torch.zeros(len(values), len(self.gram), dtype=FLOAT64).index_add_(1, nodes[kept], values)

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of gradients given by their coefficients, row by row."""
        return ((left.to(self.gram.dtype) @ self.gram).to(FLOAT64) * right).sum(-1)


def pad(rows: Tensor, length: int, value: float) -> Tensor:
    return torch.cat([rows, rows.new_full((length - len(rows), *rows.shape[1:]), value)])


def squared_norms(nodes: Tensor, gram: Tensor) -> Tensor:
    """Of the gradients of whole outputs: all pairs of their tokens, ``[..., T] -> [...]``."""
    kept = nodes >= 0
    pairs = gram[nodes.clamp_min(0)[..., :, None], nodes.clamp_min(0)[..., None, :]].to(FLOAT64)
    return (pairs * kept[..., :, None] * kept[..., None, :]).sum((-2, -1)).clamp_min(0)


# ---------------------------------------------------------------------------------------------------------- the methods
Method = Callable[[Draw], Tensor]  # advantages, [B] or [B, T]


def group_mean(d: Draw, values: Tensor) -> Tensor:
    return values.view(-1, d.group).mean(1).repeat_interleave(d.group)


def grpo(d: Draw) -> Tensor:
    """Shao et al. 2024, arXiv 2402.03300; as in verl 0.9.1."""
    std = d.rewards.view(-1, d.group).std(1).repeat_interleave(d.group)
    return (d.rewards - group_mean(d, d.rewards)) / (std + 1e-6)


def dr_grpo(d: Draw) -> Tensor:
    """Without the standard deviation, Liu et al. 2025, arXiv 2503.20783."""
    return d.rewards - group_mean(d, d.rewards)


def rloo(d: Draw) -> Tensor:
    """Ahmadian et al. 2024, arXiv 2402.14740."""
    return dr_grpo(d) * d.group / (d.group - 1)


def opo(d: Draw) -> Tensor:
    """Hao et al. 2025, arXiv 2505.23585; as in verl 0.9.1, the output itself included."""
    return d.rewards - group_mean(d, d.lengths * d.rewards) / group_mean(d, d.lengths)


def otb(d: Draw) -> Tensor:
    """Optimal Token Baseline, arXiv 2602.07078; as in verl 0.9.1: its own output included, no baseline where alone."""
    w = (d.tokens.cumsum(1) * d.mask).view(-1, d.group, d.mask.shape[1])
    baseline = (w * d.rewards.view(-1, d.group, 1)).sum(1, keepdim=True) / (w.sum(1, keepdim=True) + 1e-8)
    alone = d.mask.view_as(w).sum(1, keepdim=True) == 1
    return (d.rewards[:, None] - torch.where(alone, 0, baseline).expand_as(w).flatten(0, 1)) * d.mask


def james_stein(d: Draw) -> Tensor:
    """Zeng et al. 2025, arXiv 2511.03710: RLOO shrunk towards the mean of the other prompts, uniform weights."""
    r = d.rewards.view(-1, d.group)
    prompts, means, variances = len(r), r.mean(1), r.var(1) / d.group
    others = (means.sum() - means) / (prompts - 1)
    within = (variances.sum() - variances) / (prompts - 1)
    between = ((means.square().sum() - means.square()) / (prompts - 1) - others.square()).clamp_min(0)
    shrinkage = (within / (within + between + 1e-6))[:, None]
    own = (r.sum(1, keepdim=True) - r) / (d.group - 1)
    return (r - (1 - shrinkage) * own - shrinkage * others[:, None]).flatten()


PEERS: dict[str, Method] = {
    "none": lambda d: d.rewards,
    "batch mean": lambda d: d.rewards - d.rewards.mean(),
    "GRPO": grpo,
    "Dr. GRPO": dr_grpo,
    "RLOO": rloo,
    "OPO": opo,
    "OTB": otb,
    "James-Stein": james_stein,
    "the paper": lambda d: GradWeightedBaseline("group").advantages(d.rewards, d.exact, d.group),
}
# Length of the mean gradient along the true one: known, or estimated (by a formula for B outputs in groups of G).
KNOWN_SCALES: dict[str, Callable[[int, int], float]] = {
    "batch mean": lambda outputs, group: (outputs - 1) / outputs,
    "Dr. GRPO": lambda outputs, group: (group - 1) / group,
}
UNKNOWN_SCALES = ("GRPO", "OPO", "OTB")


def this_batch(weights: Callable[[Draw], Tensor | None]) -> Method:
    """Ours without a past: shrunk by 64 outputs towards the other prompts."""
    return lambda d: GradWeightedBaseline().advantages(d.rewards, weights(d), d.group)


def by_token(d: Draw) -> Tensor:
    """The same for every token, with the cumulative weights of OTB."""
    mask, w = d.mask.to(FLOAT64), d.tokens.cumsum(1)
    return GradWeightedBaseline().advantages(d.rewards[:, None] * mask, w * mask, d.group) * mask


WEIGHTS: dict[str, Method] = {
    "no past": this_batch(lambda d: d.exact),
    "no past, sum w ||h||^2": this_batch(lambda d: d.head),
    "no past, logit weights": this_batch(lambda d: d.logit),
    "no past, lengths": this_batch(lambda d: d.lengths),
    "no past, no weights": this_batch(lambda d: None),
    "no past, by token": by_token,
    "no past, batch": lambda d: GradWeightedBaseline("batch").advantages(d.rewards, d.exact, d.group),
}


def ours(stage: Stage, prompts: int, group: int) -> dict[str, Method]:
    """Baselines that have learned from the recorded batches."""
    plain, memory = GradWeightedBaseline(), GradWeightedBaseline()

    def learn(baseline: GradWeightedBaseline, remember: bool) -> None:
        for step, batch in enumerate(stage.history):
            parts = len(batch.rewards) if remember and step in VISITS else prompts
            for start in range(0, parts, prompts):
                rows = slice(start, start + prompts)
                rewards, weights = (x[rows, :group].flatten() for x in (batch.rewards, batch.weights))
                ids = batch.prompts[rows].repeat_interleave(group) if remember else None
                baseline.update(rewards, weights, group, prompts=ids)

    learn(plain, remember=False)
    learn(memory, remember=True)
    return {
        "snr-optim": lambda d: plain.advantages(d.rewards, d.exact, d.group),
        "before sampling": lambda d: d.rewards - plain.predict(),
        "+ prompts": lambda d: memory.advantages(d.rewards, d.exact, d.group, prompts=d.prompts),
    }  # fmt: skip


ORACLE: dict[str, Method] = {"oracle": lambda d: d.rewards - d.oracle}


# ---------------------------------------------------------------------------------------------------------- the figures
def mean_lengths(study: Study, group: int, draws: int = 200) -> dict[str, tuple[float, float]]:
    """Of biased methods: ``<E g, grad J> / ||grad J||^2`` and its standard error.

    From the difference to the oracle in the same draws, whose length is 1.
    """
    along = (study.gradient.to(study.gram.dtype) @ study.gram).to(FLOAT64)
    unit = float(along @ study.gradient)
    generator = torch.Generator().manual_seed(2)
    lengths: dict[str, list[float]] = {name: [] for name in UNKNOWN_SCALES}
    for _ in range(draws):
        d = study.draw(group, generator)
        projected = along[d.nodes.clamp_min(0)] * d.mask
        oracle = (d.rewards - d.oracle) * projected.sum(1)
        for name in UNKNOWN_SCALES:
            advantages = PEERS[name](d)
            projections = (advantages if advantages.dim() > 1 else advantages[:, None]) * projected
            lengths[name].append(1 + float((projections.sum(1) - oracle).mean()) / unit)
    return {name: (mean(values), stdev(values) / draws**0.5) for name, values in lengths.items()}


def measure(
    stage: Stage, prompts: int, group: int, studies: list[Study], resamples: int, scales: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """The variance left by every method in one cell of the table, with a bootstrap over the draws."""
    methods = PEERS | WEIGHTS | ours(stage, prompts, group) | ORACLE
    generator = torch.Generator().manual_seed(1)
    squares = []
    for study in studies:
        rows = []
        for _ in range(resamples):
            d = study.draw(group, generator)
            advantages = [method(d).to(FLOAT64) for method in methods.values()]
            width = d.nodes.shape[1]
            table = torch.stack([a if a.dim() > 1 else a[:, None].expand(-1, width) for a in advantages])
            rows.append(study.coefficients(d.nodes, table / len(d.rewards)))
        gradients = torch.stack(rows, dim=1)  # [methods, resamples, nodes]
        centred = gradients - gradients.mean(1, keepdim=True)
        squares.append(torch.stack([study.inner(of_method, of_method) for of_method in centred]))
    names = list(methods)
    known = {name: (formula(prompts * group, group), 0.0) for name, formula in KNOWN_SCALES.items()} | scales
    scale = torch.tensor([known.get(name, (1.0, 0.0))[0] for name in names], dtype=FLOAT64)
    spread = torch.cat(squares, dim=1) * resamples / (resamples - 1) / scale[:, None] ** 2  # [methods, draws]
    reference = spread[names.index("oracle")]
    rng = np.random.default_rng(0)
    again = torch.from_numpy(rng.integers(0, spread.shape[1], (500, spread.shape[1])))
    ratios = spread[:, again].mean(-1) / reference[again].mean(-1)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=FLOAT64), dim=1)
    return [
        {
            "task": stage.task, "pass_rate": stage.pass_rate, "prompts": prompts, "group": group, "method": name,
            "variance": float(spread[k].mean()), "to_oracle": float(spread[k].mean() / reference.mean()),
            "low": float(low[k]), "high": float(high[k]), "scale": float(scale[k]),
            "scale_error": known.get(name, (1.0, 0.0))[1],
        }
        for k, name in enumerate(names)
    ]  # fmt: skip


def measure_stage(job: tuple[Path, argparse.Namespace]) -> list[dict[str, Any]]:
    """All cells of one stage."""
    path, args = job
    stage = load(path)
    everyone, rows = torch.arange(len(stage.outputs)), []
    whole = Study(stage, everyone)
    scales = {group: mean_lengths(whole, group) for group in args.groups}
    order = everyone[torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0))]
    for prompts in args.prompts:
        studies = [Study(stage, chosen) for chosen in order.split(prompts)] if prompts < len(everyone) else [whole]
        resamples = max(3, round(args.resamples * RESAMPLES[prompts]))
        for group in args.groups:
            rows += measure(stage, prompts, group, studies, resamples, scales[group])
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the cells: how far from the oracle each method is, how often below all peers, and below RLOO."""
    cells: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in rows:
        cell = tuple(row[key] for key in ("task", "pass_rate", "prompts", "group"))
        cells.setdefault(cell, {})[row["method"]] = row["to_oracle"]
    result = []
    for name in next(iter(cells.values())):
        values = np.array([cell[name] for cell in cells.values()])
        peers = np.array([min(cell[peer] for peer in PEERS) for cell in cells.values()])
        rloo_values = np.array([cell["RLOO"] for cell in cells.values()])
        large = values[rloo_values >= 1.5]
        result.append(
            {
                "method": name,
                "median": float(np.median(values)),
                "worst": float(values.max()),
                "worst_where_rloo_1.5": float(large.max()) if len(large) else None,
                "within_1.5": float((large <= 1.5).mean()) if len(large) else None,
                "within_2.1": float((large <= 2.1).mean()) if len(large) else None,
                "to_rloo_worst": float((values / rloo_values).max()),
                "below_all_peers": float((values < peers).mean()),
                "cells": len(values),
            }
        )
    return result


def draw_picture(rows: list[dict[str, Any]], path: Path, group: int, prompts: int) -> None:
    """Variance against pass rate: what the oracle could do, and who gets near it."""
    plt = pyplot()
    shown = {
        "RLOO": ("#8d99ae", "o"), "James-Stein": ("#b08968", "v"), "the paper": ("#c28e0e", "s"),
        "OTB": ("#8a5cd6", "^"), "snr-optim": ("#0b6fb8", "D"), "oracle": ("black", ""),
    }  # fmt: skip
    tasks = sorted({row["task"] for row in rows})
    figure, all_axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4), layout="constrained", sharey=True)
    for axes, task in zip(np.atleast_1d(all_axes), tasks, strict=True):
        cells = [row for row in rows if (row["task"], row["group"], row["prompts"]) == (task, group, prompts)]
        for name, (colour, marker) in shown.items():
            points = sorted((row["pass_rate"], row["to_oracle"], row["low"], row["high"]) for row in cells
                            if row["method"] == name)  # fmt: skip
            x, y, low, high = np.array(points).T
            axes.plot(x, y, color=colour, marker=marker, ms=5, label=name, lw=2.4 if name == "snr-optim" else 1.2)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
        axes.set(yscale="log", xlabel="pass rate of the policy", title=f"{task}: {prompts} prompts x {group} outputs")
        axes.yaxis.set_major_formatter("{x:g}")
        tidy(axes, which="both")
    np.atleast_1d(all_axes)[0].set_ylabel("gradient variance / the oracle's")
    np.atleast_1d(all_axes)[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--stages", type=int, nargs="+", help="by their supervised steps")
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 64, 128], choices=RESAMPLES)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--resamples", type=float, default=1.0, help="times as many draws as the study's")
    parser.add_argument("--jobs", type=int, default=2, help="policies built at a time")
    parser.add_argument("--policies", type=Path, default=Path("runs/policy_stages"), help="where they are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/baseline_variance"))
    args = parser.parse_args()
    origin = environment(torch.device("cpu"))
    stages = build_all(args.policies, args.tasks, args.stages, args.jobs)
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with progress(len(stages)) as report, context.Pool(args.jobs, torch.set_num_threads, (1,)) as pool:
        for of_stage in pool.imap(measure_stage, [(path, args) for path in stages]):
            rows += of_stage
            report(f"{of_stage[0]['task']}, pass rate {of_stage[0]['pass_rate']:.2f}")
    result = summary(rows)
    unit = "trace of the covariance of the batch gradient, relative to the oracle's"
    path = args.out / "baseline_variance.json"
    write_json(path, "baseline_variance", origin, unit=unit, summary=result, rows=rows)
    draw_picture(rows, args.out / "baseline_variance.png", args.groups[len(args.groups) // 2], args.prompts[-1])
    print_table(result, list(result[0]))


if __name__ == "__main__":
    main()
