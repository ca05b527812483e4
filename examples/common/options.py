"""The command line of the example: its options, and one clear line for each that cannot be."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

import torch

METHOD_NAMES = ("oblr-po", "grpo", "rloo", "reinforce")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"error: {message}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Reinforcement learning of a small Qwen3 on arithmetic.")
    add = parser.add_argument
    add("--method", nargs="+", default=["oblr-po"], help=f"any of {', '.join(METHOD_NAMES)}; or all (default: oblr-po)")
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
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--scope", choices=("group", "batch", "shrink"), default="shrink", help="of the baseline of oblr-po")
    add("--weights", choices=("exact", "logit", "none"), default="exact", help="gradient norms in that baseline")
    add("--smoothing", type=float, default=0.9, help="of the signal-to-noise ratio; 0 is the paper's")
    add("--max-new-tokens", type=int, default=7, help="length of an output")
    add("--warm-start-steps", type=int, default=500, help="supervised steps before RL")
    add("--model", type=Path, help="folder of a Hugging Face causal LM, instead of the built-in tiny Qwen3")
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("runs/qwen3_arithmetic"), help="folder for metrics, checkpoints and picture")
    add("--jobs", type=int, default=1, help="runs at the same time, each in a process of its own")
    add("--resume", action="store_true", help="go on with the runs in --out, bit for bit")
    args = parser.parse_args(argv)

    args.method = list(METHOD_NAMES) if args.method == ["all"] else args.method
    for method in args.method:
        if method not in METHOD_NAMES:
            parser.error(f"--method: expected any of {', '.join(METHOD_NAMES)}, or all; got {method!r}")
    for name, least in {"steps": 1, "prompts": 2, "group_size": 2, "micro_batches": 2, "max_new_tokens": 1,
                        "warm_start_steps": 1, "jobs": 1}.items():  # fmt: skip
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(args, name)}")
    if args.prompts % args.micro_batches:
        parser.error(f"--micro-batches: expected a divisor of --prompts {args.prompts}, got {args.micro_batches}")
    if len(set(args.seeds)) < len(args.seeds) or len(set(args.method)) < len(args.method):
        parser.error("--seeds, --method: expected each only once")
    if args.lr is not None and not 0 < args.lr < float("inf"):
        parser.error(f"--lr: expected a positive number, got {args.lr}")
    if not 0 <= args.smoothing < 1:
        parser.error(f"--smoothing: expected a number in [0, 1), got {args.smoothing}")
    if args.model and not (args.model / "config.json").is_file():
        parser.error(f"--model: no Hugging Face model in {args.model} (config.json is not there)")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: {args.out} is a file")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device: {args.device!r} is not available here")
    return args
