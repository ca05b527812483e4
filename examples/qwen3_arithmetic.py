"""Reinforcement learning of a small Qwen3 on arithmetic: OBLR-PO beside GRPO, RLOO and REINFORCE.

    python -m examples.qwen3_arithmetic                        # OBLR-PO, one seed, a minute on a CPU
    python -m examples.qwen3_arithmetic --method all --seeds 0 1 2 --jobs 2 --out runs/demo
    python -m examples.qwen3_arithmetic --resume               # go on where Ctrl-C stopped it

``train`` is the loop to copy. The methods differ in how rewards become advantages, and in whether the measured
signal-to-noise ratio sets the learning rate; problems, seeds, samples and loss are the same.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from examples.common.arithmetic import is_correct, problems
from examples.common.launcher import run_all
from examples.common.options import parse_arguments
from examples.common.policy import (
    Policy,
    baseline_weights,
    local_model,
    sample,
    sequence_log_probs,
    tiny_qwen3,
    warm_start,
)
from examples.common.report import report
from examples.common.runs import OnRow, Run, save_atomically
from snr_optim import GradWeightedBaseline, PerSampleGradNorms, SNRAdaptiveLR


class GroupNormalised(nn.Module):
    """GRPO's advantages: the group's rewards, centred and divided by their standard deviation."""

    def advantages(self, rewards: Tensor, weights: Tensor | None, groups: int, update: bool = False) -> Tensor:
        of_group = rewards.view(-1, groups)
        centred = of_group - of_group.mean(1, keepdim=True)
        return (centred / (of_group.std(1, keepdim=True) + 1e-4)).flatten()


class NoBaseline(nn.Module):
    """REINFORCE: the reward itself."""

    def advantages(self, rewards: Tensor, weights: Tensor | None, groups: int, update: bool = False) -> Tensor:
        return rewards


@dataclass(frozen=True)
class Method:
    """How rewards become advantages, and who sets the learning rate."""

    baseline: Callable[[argparse.Namespace], nn.Module]
    weighted: bool  # does the baseline look at gradient norms?
    adaptive: bool  # does the measured SNR set the learning rate?
    lr: float  # ceiling, or the constant rate: the best of benchmarks/lr_ceilings.py


METHODS = {
    "oblr-po": Method(lambda args: GradWeightedBaseline(args.scope), weighted=True, adaptive=True, lr=1e-3),
    "grpo": Method(lambda args: GroupNormalised(), weighted=False, adaptive=False, lr=2e-4),
    "rloo": Method(lambda args: GradWeightedBaseline("group"), weighted=False, adaptive=False, lr=2e-4),
    "reinforce": Method(lambda args: NoBaseline(), weighted=False, adaptive=False, lr=2e-4),
}


OPTIMIZERS = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.0),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr),
}


def train(args: argparse.Namespace, method: Method, seed: int, run: Run) -> None:
    """One run: sample, verify, weigh, subtract the baseline, go backward in micro-batches, step."""
    model, tokenizer = starting_policy(args, seed)
    lr = args.lr or method.lr
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), lr)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=20)
    scheduler = SNRAdaptiveLR(optimizer, schedule=warm_up, smoothing=args.smoothing, adapt=method.adaptive)
    measured = scheduler.attach(model)  # every backward() below is a sub-batch
    baseline, norms = method.baseline(args), PerSampleGradNorms(model)
    torch.manual_seed(seed)
    first = run.restore(model=model, optimizer=optimizer, scheduler=scheduler, baseline=baseline)

    for step in run.steps(first, args.steps):
        started = time.perf_counter()
        batch = problems(args.prompts, seed, step)
        rollout, texts = sample(model, tokenizer, batch, args.group_size, args.max_new_tokens)
        rewards = torch.tensor([is_correct(text, batch[i // args.group_size]) for i, text in enumerate(texts)]).float()

        weights = baseline_weights(args.weights if method.weighted else "none", model, rollout, norms)
        advantages = baseline.advantages(rewards.to(model.device), weights, groups=args.group_size, update=True)

        size = args.prompts // args.micro_batches * args.group_size  # whole prompts: the independent unit
        for start in range(0, len(rewards), size):
            micro = {name: tensor[start : start + size] for name, tensor in rollout.items()}
            log_probs = sequence_log_probs(model, micro)
            (-(advantages[start : start + size] * log_probs).sum() / len(rewards)).backward()

        optimizer.step()  # its lr is set from the moments of this very batch
        used_lr, moments = scheduler.get_last_lr()[0], measured.moments
        scheduler.step()
        optimizer.zero_grad()

        run.log(
            step=step,
            reward=rewards.mean(),
            lr=used_lr,
            factor=scheduler.factor,
            snr=moments.batch_snr,
            signal=moments.signal,
            noise=moments.noise,
            gradient_norm=moments.sq_norm_of_mean**0.5,
            advantage_variance=advantages.var(),
            tokens=rollout["completion_mask"].sum(),
            seconds=time.perf_counter() - started,
        )
        run.checkpoint(step, model=model, optimizer=optimizer, scheduler=scheduler, baseline=baseline)


def starting_policy(args: argparse.Namespace, seed: int) -> Policy:
    """The model that RL starts from: a local one as it is, or the small Qwen3 after its supervised warm start."""
    if args.model:
        return local_model(args.model, args.device)
    model, tokenizer = tiny_qwen3(seed)
    model.load_state_dict(torch.load(warm_start_file(args, seed), weights_only=True))
    return model.to(args.device), tokenizer


def warm_start_file(args: argparse.Namespace, seed: int) -> Path:
    return args.out / "warm-start" / f"{args.warm_start_steps}-steps-seed-{seed}.pt"


@dataclass(frozen=True)
class WarmStart:
    """A job: the supervised warm start of one seed, shared by all methods."""

    args: argparse.Namespace
    seed: int

    @property
    def name(self) -> str:
        return f"warm start, seed {self.seed}"

    @property
    def total(self) -> int:
        return int(self.args.warm_start_steps)

    def __call__(self, on_row: OnRow) -> None:
        model, tokenizer = tiny_qwen3(self.seed)
        if warm_start(model.to(self.args.device), tokenizer, self.total, self.seed, on_row):
            save_atomically(model.state_dict(), warm_start_file(self.args, self.seed))


@dataclass(frozen=True)
class Training:
    """A job: one method on one seed."""

    args: argparse.Namespace
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"

    @property
    def total(self) -> int:
        return int(self.args.steps)

    @property
    def folder(self) -> Path:
        return Path(self.args.out) / f"{self.method}-seed-{self.seed}"

    def __call__(self, on_row: OnRow) -> None:
        independent = ("out", "resume", "jobs", "steps", "method", "seeds")  # what a resumed run may change
        settings = {name: str(value) for name, value in vars(self.args).items() if name not in independent}
        run = Run(self.folder, settings, resume=self.args.resume, on_row=on_row)
        train(self.args, METHODS[self.method], self.seed, run)


def main() -> None:
    args = parse_arguments()
    console = Console()
    if not args.resume:
        shutil.rmtree(args.out / "warm-start", ignore_errors=True)
    if not args.model:
        missing = [seed for seed in args.seeds if not warm_start_file(args, seed).exists()]
        run_all([WarmStart(args, seed) for seed in missing], args.jobs, console)
    jobs = [Training(args, method, seed) for seed in args.seeds for method in args.method]
    if all(args.model or warm_start_file(args, seed).exists() for seed in args.seeds):
        run_all(jobs, args.jobs, console)
    report(
        args.out,
        {method: [args.out / f"{method}-seed-{seed}" for seed in args.seeds] for method in args.method},
        console,
    )


if __name__ == "__main__":
    main()
