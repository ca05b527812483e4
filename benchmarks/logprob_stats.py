"""`logprob_stats` against its peers: time, peak memory, error, and the share of the machine's limit that is reached.

    python -m benchmarks.logprob_stats                          # on a GPU 8192 x 151,936, on a CPU 512 x 151,936
    python -m benchmarks.logprob_stats --rows 4096 --dtypes bfloat16 --plot roofline.png

Peers that are installed are measured in the same run, each by its own functions, ours with the outputs that they give;
`make peers` installs those that a CPU can run. Half of the rows are confident, as after reinforcement learning.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import (
    Limits,
    Row,
    Timing,
    attempt,
    conclude,
    copies,
    draw_roofline,
    environment,
    left_out,
    measure_limits,
    mebibytes,
    parse_arguments,
    peak_memory,
    progress,
    time_calls,
    version,
    write_json,
)
from benchmarks.roofline import Cost, logprob_stats_cost
from snr_kernels.logprob_stats import LogprobStats, logprob_stats, logprob_stats_reference

NAME = "logprob_stats"
ALL = LogprobStats._fields
COLUMNS = [
    "dtype",
    "outputs",
    "implementation",
    "pass",
    "ms",
    "host_ms",
    "of_limit",
    "peak_mib",
    "worst_error",
    "refused",
]
ROWS = {"cpu": 512, "cuda": 8192, "small": 4}
VOCAB = {"cpu": 151_936, "cuda": 151_936, "small": 300}
SECONDS = {"cpu": 1.0, "cuda": 1.0, "small": 0.0}


class Implementation(NamedTuple):
    """``call(logits, labels)`` gives the ``outputs``, in this order."""

    name: str
    outputs: tuple[str, ...]
    call: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    graph_once: bool = False  # its graph cannot be kept for a second backward pass


def ours(outputs: tuple[str, ...]) -> Implementation:
    def call(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        stats = logprob_stats(logits, labels, outputs=outputs)
        return tuple(getattr(stats, name) for name in outputs)

    return Implementation("snr-optim", outputs, call)


def plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """As one would write it, the norm by its usual formula."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    log_p_y = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    s2 = p.square().sum(-1)
    return log_p_y, -(p * log_p).sum(-1), s2, 1 - 2 * log_p_y.exp() + s2


def implementations(device: torch.device) -> list[Implementation]:
    """Ours and whatever else is installed."""
    found = [*verl(), *trl(), *(liger() + flash_attn() if device.type == "cuda" else [])]
    found += [
        Implementation(f"torch {torch.__version__}", ALL, plain),
        Implementation("torch.compile", ALL, torch.compile(plain, dynamic=False), graph_once=True),
    ]
    tasks = sorted({peer.outputs for peer in found}, key=len)
    return [which for task in tasks for which in (ours(task), *(peer for peer in found if peer.outputs == task))]


def verl() -> list[Implementation]:
    try:
        import verl.utils.torch_functional as F
    except Exception as error:  # one that is there, but not for this torch, fails in its own way
        return left_out("verl", error)

    def call(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        log_prob = F.logprobs_from_logits(logits, labels, inplace_backward=False)
        return log_prob, F.entropy_from_logits(logits), F.calculate_sum_pi_squared_from_logits(logits)

    name = f"verl {version('verl')}"
    return [
        Implementation(name, ALL[:1], lambda *a: (F.logprobs_from_logits(*a, inplace_backward=False),)),
        Implementation(name, ALL[:3], call),
    ]


def trl() -> list[Implementation]:
    try:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy
    except Exception as error:
        return left_out("trl", error)
    name = f"trl {version('trl')}"
    return [
        Implementation(name, ALL[:1], lambda *a: (selective_log_softmax(*a),)),
        Implementation(name, ALL[:2], lambda *a: selective_log_softmax_and_entropy(*a)),
    ]


def liger() -> list[Implementation]:
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy
    except Exception as error:
        return left_out("liger-kernel", error)

    def call(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (-liger_cross_entropy(logits, labels, reduction="none"),)

    return [Implementation(f"liger {version('liger-kernel')}", ALL[:1], call, graph_once=True)]


def flash_attn() -> list[Implementation]:
    try:
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
    except Exception as error:
        return left_out("flash-attn", error)

    def call(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return (-cross_entropy_loss(logits, labels)[0],)

    return [Implementation(f"flash-attn {version('flash-attn')}", ALL[:1], call)]


def make_data(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random logits; every other row with ``1 - p_y`` between 1e-6 and 1."""
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float32, device=device).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    missing = 10 ** (-6 * torch.rand(rows, generator=generator, device=device))
    level = math.log(vocab) + 4.5 + torch.log((1 - missing) / missing)  # E exp(3 x) = exp(4.5)
    confident = torch.arange(0, rows, 2, device=device)
    logits[confident, labels[confident]] = level[confident].to(dtype)
    return logits, labels


def worst_error(which: Implementation, logits: Tensor, labels: Tensor, rows: int = 16) -> float:
    """Largest relative error against float64, over the outputs and the first rows.

    Raises:
        FloatingPointError: it is not finite.
    """
    some, index = logits[:rows].clone(), labels[:rows]
    reference = logprob_stats_reference(some, index)
    with torch.no_grad():
        got = dict(zip(which.outputs, which.call(some, index), strict=True))
    errors = [(value.double() - getattr(reference, name)) / getattr(reference, name) for name, value in got.items()]
    worst = torch.stack([error.abs().max() for error in errors]).max().item()  # NaN if any is
    if not math.isfinite(worst):
        raise FloatingPointError("results that are not finite")
    return worst


def measure(which: Implementation, logits: Tensor, labels: Tensor, limits: Limits, seconds: float) -> list[Row]:
    """A row per pass, and one that says why there are no more."""
    about: Row = {
        "dtype": str(logits.dtype).removeprefix("torch."), "shape": list(logits.shape),
        "outputs": len(which.outputs), "names": list(which.outputs), "implementation": which.name,
    }  # fmt: skip
    return attempt(about, rows_of(which, logits, labels, limits, seconds), logits.device)


def rows_of(which: Implementation, logits: Tensor, labels: Tensor, limits: Limits, seconds: float) -> Iterator[Row]:
    device, error = logits.device, worst_error(which, logits, labels)
    inputs = [logits.clone().requires_grad_() for _ in range(copies(logits.nbytes))]
    gradients = [torch.randn(len(labels), device=device) for _ in which.outputs]

    def forward(turn: int = 0) -> None:
        with torch.no_grad():
            which.call(inputs[turn % len(inputs)], labels)

    def both(turn: int = 0) -> None:
        leaf = inputs[turn % len(inputs)]
        differentiate(which.call(leaf, labels), leaf)

    def differentiate(values: tuple[Tensor, ...], leaf: Tensor, **options: bool) -> None:
        torch.autograd.grad(values, leaf, [g.to(v.dtype) for g, v in zip(gradients, values, strict=True)], **options)

    def row(name: str, timing: Timing, peak: int | None = None) -> Row:
        cost = cost_of(name, logits, which.outputs)
        return {
            "pass": name, "ms": timing.median, "ms_20": timing.low, "ms_80": timing.high, "calls": timing.calls,
            "host_ms": timing.host, "of_limit": limits.seconds(cost) * 1e3 / timing.median, "bytes": cost.bytes,
            "flops": cost.flops, "peak_mib": mebibytes(peak), "worst_error": error if name == "forward" else None,
        }  # fmt: skip

    for name, call in {"forward": forward, "forward+backward": both}.items():
        call()  # compiled now, and tuned: neither is what it takes
        peak = peak_memory(call, device)
        yield row(name, time_calls(call, device, seconds=seconds), peak)
    if not which.graph_once:  # one graph, as peers keep copies of the logits in theirs
        values = which.call(inputs[0], labels)
        timing = time_calls(lambda _: differentiate(values, inputs[0], retain_graph=True), device, seconds=seconds)
        yield row("backward", timing)


def cost_of(name: str, logits: Tensor, outputs: tuple[str, ...]) -> Cost:
    each = [
        logprob_stats_cost(*logits.shape, logits.dtype, outputs=outputs, backward=part == "backward")
        for part in name.split("+")
    ]
    return Cost(*map(sum, zip(*each, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, help="8192 on a GPU, 512 on a CPU")
    parser.add_argument("--vocab", type=int, help="151936")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--seconds", type=float, help="of timing per pass: 1")
    parser.add_argument("--plot", type=Path, help="picture of the roofline")
    args = parse_arguments(parser, NAME)
    rows, vocab = args.rows or ROWS[args.sizes], args.vocab or VOCAB[args.sizes]
    seconds = SECONDS[args.sizes] if args.seconds is None else args.seconds
    where, limits = environment(args.device), measure_limits(args.device, args.sizes)
    measured: list[Row] = []
    found = implementations(args.device)
    with progress(len(found) * len(args.dtypes)) as done:
        for dtype in args.dtypes:
            logits, labels = make_data(rows, vocab, getattr(torch, dtype), args.device)
            for which in found:
                measured += measure(which, logits, labels, limits, seconds)
                write_json(args.json, NAME, where, limits=limits, rows=measured)
                done(f"{dtype} {', '.join(which.outputs)}: {which.name}")
    name = where["device"]
    print(f"{name}: copy {limits.bandwidth / 1e9:,.0f} GB/s, matmul {limits.matmul / 1e12:,.2f} TFLOP/s")
    if args.plot:
        draw(args.plot, f"{name}, {rows} x {vocab:,}", limits, [row for row in measured if "ms" in row])
    conclude(measured, COLUMNS, lambda row: row["implementation"] == "snr-optim")


def draw(path: Path, title: str, limits: Limits, measured: list[Row]) -> None:
    """The forward pass of the first dtype, every implementation at the most outputs that it has."""
    chosen = {
        row["implementation"]: row
        for row in sorted(measured, key=lambda row: row["outputs"])
        if row["pass"] == "forward" and row["dtype"] == measured[0]["dtype"]
    }
    points = {
        f"{name}, {row['outputs']} outputs": (Cost(row["bytes"], row["flops"]), row["ms"] / 1e3)
        for name, row in chosen.items()
    }
    draw_roofline(path, f"{title} {measured[0]['dtype']}, forward", limits, points)


if __name__ == "__main__":
    main()
