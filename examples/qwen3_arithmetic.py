"""Reinforcement learning of a small Qwen3 on arithmetic: OBLR-PO beside GRPO, RLOO and REINFORCE.

    python -m examples.qwen3_arithmetic                        # OBLR-PO, one seed, a minute on a CPU
    python -m examples.qwen3_arithmetic --method all --seeds 0 1 2 --jobs 2 --out runs/demo
    python -m examples.qwen3_arithmetic --resume               # go on where Ctrl-C stopped it

``train`` is the loop to copy. The methods differ in how rewards become advantages, and in whether the measured
signal-to-noise ratio sets the learning rate; problems, seeds, samples and loss are the same.
"""

from __future__ import annotations

import argparse
import math
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
from examples.common.options import Parser
from examples.common.policy import (
    Policy,
    completion_logits,
    local_model,
    logit_weights,
    sample,
    tiny_qwen3,
    warm_start,
)
from examples.common.report import report
from examples.common.runs import OnRow, Run, save_atomically
from snr_optim import GradientMoments, GradWeightedBaseline, PerSampleGradNorms, SNRAdaptiveLR, logprob_stats

# -- the methods, which the command line, the report and the benchmarks read here --------------------------------------


class GroupNormalised(nn.Module):
    """GRPO's advantages: the group's rewards, centred and divided by their standard deviation."""

    def advantages(self, rewards: Tensor, weights: Tensor | None, groups: int, update: bool = False) -> Tensor:
        of_group = rewards.view(-1, groups)
        centred = of_group - of_group.mean(1, keepdim=True)
        return (centred / (of_group.std(1, keepdim=True) + 1e-4)).flatten()

    def metrics(self) -> dict[str, float]:
        return {}


class NoBaseline(nn.Module):
    """REINFORCE: the reward itself."""

    def advantages(self, rewards: Tensor, weights: Tensor | None, groups: int, update: bool = False) -> Tensor:
        return rewards

    def metrics(self) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Method:
    """How rewards become advantages, who sets the learning rate, and how the report shows it."""

    label: str
    colour: str
    baseline: Callable[[str], nn.Module]  # given --scope, which is that of OBLR-PO alone
    weighted: bool  # does the baseline look at gradient norms?
    adaptive: bool  # does the measured SNR set the learning rate?
    lr: float  # ceiling, or the constant rate: the best of benchmarks/lr_ceilings.py


METHODS = {
    "oblr-po": Method("OBLR-PO", "#c1121f", GradWeightedBaseline, weighted=True, adaptive=True, lr=1e-3),
    "grpo": Method("GRPO", "#1d3557", lambda scope: GroupNormalised(), weighted=False, adaptive=False, lr=2e-4),
    "rloo": Method(
        "RLOO", "#2a9d8f", lambda scope: GradWeightedBaseline("group"), weighted=False, adaptive=False, lr=2e-4
    ),
    "reinforce": Method("REINFORCE", "#8d99ae", lambda scope: NoBaseline(), weighted=False, adaptive=False, lr=2e-4),
}

OPTIMIZERS = {
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr, weight_decay=0.0),
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr),
}


# -- the loop to copy --------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace, method: Method, seed: int, run: Run) -> None:
    """One run: sample, verify, weigh, subtract the baseline, go backward in micro-batches, step."""
    model, tokenizer = starting_policy(args, seed)
    optimizer = OPTIMIZERS[args.optimizer](model.parameters(), args.lr or method.lr)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 20, total_iters=20)

    # A method pays for the hooks that it uses. OBLR-PO steps by the noise; with the others, whose learning rate stays
    # that of the warm-up (adapt=False), the noise is measured for the picture alone, unless --no-measure leaves it out.
    scheduler, measured = warm_up, None
    if method.adaptive or args.measure:
        scheduler = SNRAdaptiveLR(optimizer, schedule=warm_up, smoothing=args.smoothing, adapt=method.adaptive)
        measured = scheduler.attach(model)  # every backward() below is a sub-batch
    baseline = method.baseline(args.scope)
    norms = PerSampleGradNorms(model) if method.weighted and args.weights == "exact" else None

    torch.manual_seed(seed)
    first = run.restore(model=model, optimizer=optimizer, scheduler=scheduler, baseline=baseline)
    for step in run.steps(first, args.steps):
        started = time.perf_counter()
        batch = problems(args.prompts, seed, step)
        rollout, texts = sample(model, tokenizer, batch, args.group_size, args.max_new_tokens)
        rewards = torch.tensor([is_correct(text, batch[i // args.group_size]) for i, text in enumerate(texts)]).float()
        rewards = rewards.to(model.device)

        # log pi(output | prompt), [outputs], of each micro-batch; a generator, so that each forward pass waits for its
        # turn (unless the norms are exact, see below).
        size = args.prompts // args.micro_batches * args.group_size  # whole prompts: the independent unit
        micro_batches = (
            {name: tensor[start : start + size] for name, tensor in rollout.items()}
            for start in range(0, len(rewards), size)
        )
        log_probs = (
            (logprob_stats(*completion_logits(model, micro)).log_prob * micro["completion_mask"]).sum(1)
            for micro in micro_batches
        )

        # The baseline's weights, ||grad log pi||^2 of each output, come before the loss, as advantages depend on all.
        weights = None
        if norms is not None:
            # From the graphs that the loss goes on to use, so that no forward pass is done twice. All of them are in
            # memory until then, and gradients of outputs within a block; where that is too much, use --weights logit.
            log_probs, squared = list(log_probs), []
            for of_micro in log_probs:
                with norms.sequences(batch_size=size):
                    norms.backward(of_micro.sum(), retain_graph=True)  # no weight gradients, no .grad
                squared.append(norms.squared())
            weights = torch.cat(squared)
        elif method.weighted and args.weights == "logit":
            # Not from the graphs of the loss, which need not be kept then: a forward pass without any.
            weights = logit_weights(model, rollout)
        advantages = baseline.advantages(rewards, weights, groups=args.group_size, update=True)

        for of_micro, advantage in zip(log_probs, advantages.split(size), strict=True):
            (-(advantage * of_micro).sum() / len(rewards)).backward()

        optimizer.step()  # its lr is set from the moments of this very batch
        used_lr, noise = scheduler.get_last_lr()[0], scheduler.metrics() if measured else {}
        scheduler.step()
        optimizer.zero_grad()

        run.log(
            step=step,
            reward=rewards.mean(),
            lr=used_lr,
            factor=noise.get("factor", 1.0),
            **of_this_batch(measured.moments if measured else None),
            advantage_variance=advantages.var(),
            tokens=rollout["completion_mask"].sum(),
            seconds=time.perf_counter() - started,
            **{f"snr/{name}": value for name, value in noise.items()},  # averaged over batches
            **{f"baseline/{name}": value for name, value in baseline.metrics().items()},
        )
        run.checkpoint(step, model=model, optimizer=optimizer, scheduler=scheduler, baseline=baseline)


def of_this_batch(moments: GradientMoments | None) -> dict[str, Tensor | float]:
    """Signal and noise of one batch, not averaged; NaN where they were not measured."""
    if moments is None:
        return dict.fromkeys(("snr", "signal", "noise", "gradient_norm"), math.nan)
    return {
        "snr": moments.batch_snr,
        "signal": moments.signal,
        "noise": moments.noise,
        "gradient_norm": moments.sq_norm_of_mean**0.5,
    }


def starting_policy(args: argparse.Namespace, seed: int) -> Policy:
    """The model that RL starts from: a local one as it is, or the small Qwen3 after its supervised warm start."""
    if args.model:
        return local_model(args.model, args.device)
    model, tokenizer = tiny_qwen3(seed)
    model.load_state_dict(torch.load(warm_start_file(args, seed), weights_only=True))
    return model.to(args.device), tokenizer


# -- from here on nothing to copy: many runs, one after another or at the same time ------------------------------------


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


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Reinforcement learning of a small Qwen3 on arithmetic.")
    add = parser.add_argument
    add("--method", nargs="+", default=["oblr-po"], help=f"any of {', '.join(METHODS)}; or all (default: oblr-po)")
    add("--seeds", type=int, nargs="+", default=[0], help="one run per method and seed")
    add("--steps", type=int, default=200, help="RL steps per run")
    add("--prompts", type=int, default=32, help="prompts per step")
    add("--group-size", type=int, default=8, help="sampled outputs per prompt")
    add("--micro-batches", type=int, default=8, help="backward passes per step, the sub-batches of the noise estimate")
    add(
        "--lr",
        type=float,
        help="constant learning rate, or ceiling of OBLR-PO (default: the best found for each method)",
    )
    add("--optimizer", choices=OPTIMIZERS, default="adamw")
    add("--scope", choices=("group", "batch", "shrink"), default="shrink", help="of the baseline of oblr-po")
    add("--weights", choices=("exact", "logit", "none"), default="exact", help="gradient norms in that baseline")
    add(
        "--smoothing",
        type=smoothing,
        default=0.9,
        help="of the signal-to-noise ratio: a number, of which 0 is the paper's, or auto, the library's default",
    )
    add(
        "--measure",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="report the noise of methods that do not step by it, too",
    )
    add("--max-new-tokens", type=int, default=7, help="length of an output")
    add("--warm-start-steps", type=int, default=500, help="supervised steps before RL")
    add("--model", type=Path, help="folder of a Hugging Face causal LM, instead of the built-in tiny Qwen3")
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("runs/qwen3_arithmetic"), help="folder for metrics, checkpoints and picture")
    add("--jobs", type=int, default=1, help="runs at the same time, each in a process of its own")
    add("--resume", action="store_true", help="go on with the runs in --out, bit for bit")
    args = parser.parse_args(argv)

    args.method = list(METHODS) if args.method == ["all"] else args.method
    for method in args.method:
        if method not in METHODS:
            parser.error(f"--method: expected any of {', '.join(METHODS)}, or all; got {method!r}")
    parser.expect_at_least(
        args, steps=1, prompts=2, group_size=2, micro_batches=2, max_new_tokens=1, warm_start_steps=1, jobs=1
    )
    if args.prompts % args.micro_batches:
        parser.error(f"--micro-batches: expected a divisor of --prompts {args.prompts}, got {args.micro_batches}")
    if len(set(args.seeds)) < len(args.seeds) or len(set(args.method)) < len(args.method):
        parser.error("--seeds, --method: expected each only once")
    if args.smoothing != "auto" and not 0 <= args.smoothing < 1:
        parser.error(f"--smoothing: expected auto or a number in [0, 1), got {args.smoothing}")
    parser.expect_positive_lr(args)
    parser.expect_model_folder(args)
    parser.expect_folder(args)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device: {args.device!r} is not available here")
    return args


def smoothing(text: str) -> float | str:
    return text if text == "auto" else float(text)


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
    folders = {method: [job.folder for job in jobs if job.method == method] for method in args.method}
    report(args.out, folders, METHODS, console)


if __name__ == "__main__":
    main()
