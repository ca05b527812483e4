"""`linear_grad_norms` against its peers: time, peak memory, error, and the share of the machine's limit reached.

    python -m benchmarks.linear_grad_norms                      # on a GPU layers of Qwen3-4B and 8B, on a CPU smaller
    python -m benchmarks.linear_grad_norms --batches 4x2048 --layers 2560x9728 --methods gram direct

Batches are dense, as the peers take no packed ones. Opacus and BackPACK are measured by the rules that they register
for `nn.Linear`, on the same tensors, without what surrounds them; `einsum` is the gradient of every sequence, squared
and summed. Activations share a direction, as those of language models do: their cosine is 1/2.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import (
    Limits,
    Row,
    attempt,
    conclude,
    copies,
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
from benchmarks.roofline import linear_grad_norms_cost
from snr_kernels.linear_grad_norms import Method, linear_grad_norms
from snr_kernels.segments import Segments

NAME = "linear_grad_norms"
COLUMNS = [
    "dtype",
    "batch",
    "layer",
    "implementation",
    "ms",
    "host_ms",
    "of_limit",
    "peak_mib",
    "worst_error",
    "refused",
]
DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16"], "small": ["float32", "bfloat16"]}
SECONDS = {"cpu": 1.0, "cuda": 1.0, "small": 0.0}
BATCHES = {"cpu": ["8x128", "4x512"], "cuda": ["8x1024", "4x2048", "1x8192"], "small": ["2x9"]}
LAYERS = {
    "cpu": ["512x1536", "768x3072", "512x8192"],
    "cuda": ["2560x1024", "2560x4096", "2560x9728", "4096x1024", "4096x4096", "4096x12288"],
    "small": ["8x12", "12x8"],
}


class Implementation(NamedTuple):
    """``call(activations [S, T, d_in], gradients [S, T, d_out])`` gives ``[S]``."""

    name: str
    call: Callable[[Tensor, Tensor], Tensor]


def ours(method: Method, batch: tuple[int, int], device: torch.device) -> Implementation:
    segments = Segments.uniform(*batch, device)

    def call(a: Tensor, g: Tensor) -> Tensor:
        return linear_grad_norms(a.flatten(0, 1), g.flatten(0, 1), segments, method)

    return Implementation(f"snr-optim {method}", call)


def einsum() -> Implementation:
    return Implementation("einsum", lambda a, g: torch.einsum("sti,sto->sio", a, g).square().sum((1, 2)))


def opacus() -> list[Implementation]:
    """Ghost norm: both Gram matrices whole, in the dtype of the gradients; the norms are not squared."""
    try:
        from opacus.grad_sample.linear import compute_linear_norm_sample
    except Exception as error:  # one that is there, but not for this torch, fails in its own way
        return left_out("opacus", error)

    @functools.cache  # it is there before the training step, too
    def layer_of(d_in: int, d_out: int) -> torch.nn.Linear:
        return torch.nn.Linear(d_in, d_out, bias=False, device="meta")

    def call(a: Tensor, g: Tensor) -> Tensor:
        layer = layer_of(a.shape[-1], g.shape[-1])
        return compute_linear_norm_sample(layer, [a], g)[layer.weight].square()

    return [Implementation(f"opacus {version('opacus')}", call)]


def backpack() -> list[Implementation]:
    """One einsum of four: without opt_einsum, which orders it, it would hold all of ``[S, T, d_out, d_in]``."""
    try:
        from backpack.extensions.firstorder.batch_l2_grad.linear import BatchL2Linear
    except Exception as error:
        return left_out("backpack-for-pytorch", error)
    if not torch.backends.opt_einsum.is_available():
        return left_out("backpack-for-pytorch", ImportError("opt_einsum is not installed"))
    rule = BatchL2Linear()

    def call(a: Tensor, g: Tensor) -> Tensor:
        return rule.weight(None, SimpleNamespace(input0=a), None, (g,), None)

    return [Implementation(f"backpack {version('backpack-for-pytorch')}", call)]


def make_data(
    batch: tuple[int, int], layer: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    activations = normal(*batch, layer[0]) + normal(layer[0])
    return activations.to(dtype), normal(*batch, layer[1]).to(dtype)


def worst_error(which: Implementation, a: Tensor, g: Tensor) -> float:
    """Largest relative error against float64, over the sequences.

    Raises:
        FloatingPointError: it is not finite.
    """
    norms = which.call(a, g).double()
    true = torch.stack([(x.double().T @ y.double()).square().sum() for x, y in zip(a, g, strict=True)])
    worst = ((norms - true).abs() / true).max().item()
    if not math.isfinite(worst):
        raise FloatingPointError("results that are not finite")
    return worst


def measure(which: Implementation, a: Tensor, g: Tensor, limits: Limits, seconds: float) -> list[Row]:
    """A row, or one that says why it cannot be measured."""
    (num, length, d_in), d_out = a.shape, g.shape[-1]
    about: Row = {
        "dtype": str(a.dtype).removeprefix("torch."), "batch": f"{num}x{length}", "layer": f"{d_in}x{d_out}",
        "implementation": which.name,
    }  # fmt: skip
    return attempt(about, rows_of(which, a, g, limits, seconds), a.device)


def rows_of(which: Implementation, a: Tensor, g: Tensor, limits: Limits, seconds: float) -> Iterator[Row]:
    inputs = [(a, g)] + [(a.clone(), g.clone()) for _ in range(copies(a.nbytes + g.nbytes) - 1)]
    error, peak = worst_error(which, a, g), peak_memory(lambda: which.call(a, g), a.device)
    timing = time_calls(lambda turn: which.call(*inputs[turn % len(inputs)]), a.device, seconds=seconds)
    (num, length, d_in), d_out = a.shape, g.shape[-1]
    cost = linear_grad_norms_cost([length] * num, d_in, d_out, a.dtype)
    limit = 1e3 * max(limits.seconds(cost), cost.flops / limits.matmul)
    yield {
        "ms": timing.median, "ms_20": timing.low, "ms_80": timing.high, "calls": timing.calls, "host_ms": timing.host,
        "of_limit": limit / timing.median, "bytes": cost.bytes, "flops": cost.flops, "peak_mib": mebibytes(peak),
        "worst_error": error,
    }  # fmt: skip


def sizes(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", help="sequences x tokens, such as 8x1024")
    parser.add_argument("--layers", nargs="+", help="d_in x d_out, such as 2560x9728")
    parser.add_argument("--dtypes", nargs="+", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--methods", nargs="+", default=["auto"], choices=["auto", "gram", "direct"], help="of ours")
    parser.add_argument("--seconds", type=float, help="of timing per implementation: 1")
    args = parse_arguments(parser, NAME)
    kind = args.sizes
    seconds = SECONDS[kind] if args.seconds is None else args.seconds
    batches, layers = map(sizes, args.batches or BATCHES[kind]), map(sizes, args.layers or LAYERS[kind])
    tasks = list(itertools.product(args.dtypes or DTYPES[kind], batches, layers))
    peers = [*opacus(), *backpack(), einsum()]
    where, limits = environment(args.device), measure_limits(args.device, kind)
    measured: list[Row] = []
    with progress(len(tasks) * (len(args.methods) + len(peers))) as done:
        for dtype, batch, layer in tasks:
            a, g = make_data(batch, layer, getattr(torch, dtype), args.device)
            for which in [*(ours(method, batch, args.device) for method in args.methods), *peers]:
                measured += measure(which, a, g, limits, seconds)
                write_json(args.json, NAME, where, limits=limits, rows=measured)
                done(f"{dtype} {batch} {layer}: {which.name}")
    print(f"{where['device']}: copy {limits.bandwidth / 1e9:,.0f} GB/s, matmul {limits.matmul / 1e12:,.2f} TFLOP/s")
    conclude(measured, COLUMNS, lambda row: row["implementation"].startswith("snr-optim"))


if __name__ == "__main__":
    main()
