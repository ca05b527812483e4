"""What ``scheduler.attach(model)`` adds to a training step: time, and memory beside that of the gradients.

    python -m benchmarks.attach_overhead                     # minutes on two cores
    python -m benchmarks.attach_overhead --models tiny --norms euclidean adam
    python -m benchmarks.attach_overhead --device cuda       # these, and Qwen3-0.6B in bfloat16

Steps with and without hooks take turns in one process, so that a slow minute of the machine slows both. The time that
is spent inside the hooks is measured too, on a CPU: it is part of the difference, and has none of its noise. On a GPU
it would be the time to queue what they do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.harness import (
    Row,
    environment,
    parse_arguments,
    peak_memory,
    print_table,
    progress,
    release,
    write_json,
)
from snr_optim import SNRAdaptiveLR
from snr_optim.noise import AccumulationSource
from snr_optim.noise.tracking import BatchTracker


class Case(NamedTuple):
    """A Qwen3, its micro-batch, and how many pairs of steps."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    head_dim: int
    vocabulary: int
    sequences: int
    tokens: int
    steps: int
    dtype: torch.dtype = torch.float32


CASES = {
    "tiny": Case(64, 128, 2, 4, 16, 32, 32, 16, steps=200),
    "100M": Case(768, 2304, 12, 12, 64, 32_000, 8, 128, steps=6),
    "Qwen3-0.6B": Case(1024, 3072, 28, 16, 128, 151_936, 4, 1024, steps=20, dtype=torch.bfloat16),
}
MODELS = {"cpu": ["tiny", "100M"], "cuda": ["tiny", "100M", "Qwen3-0.6B"], "small": ["tiny"]}
MICRO_BATCHES = 4


def qwen3(case: Case, device: torch.device) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.intermediate,
        num_hidden_layers=case.layers, num_attention_heads=case.heads, num_key_value_heads=case.heads // 2,
        head_dim=case.head_dim, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    with device:  # a GPU draws the weights of 0.6B in no time
        return Qwen3ForCausalLM._from_config(config, dtype=case.dtype)


class Clock:
    """Seconds spent inside the hooks of a source."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Clock:
        timed: list[tuple[type, str]] = [(BatchTracker, "on_gradient"), (BatchTracker, "_on_end")]
        timed.append((AccumulationSource, "parameter_group_moments"))
        self._originals = [(owner, name, getattr(owner, name)) for owner, name in timed]
        for owner, name, original in self._originals:
            setattr(owner, name, self._timed(original))
        return self

    def __exit__(self, *exception: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure(name: str, norm: str, steps: int, device: torch.device, report: Callable[[str], None]) -> Row:
    case = CASES[name]
    release(device)  # the model of the case before
    model = qwen3(case, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scheduler = SNRAdaptiveLR(optimizer, norm=norm)
    inputs = torch.randint(case.vocabulary, (MICRO_BATCHES, case.sequences, case.tokens), device=device)

    def step() -> None:
        for part in inputs:
            (model(input_ids=part, labels=part, use_cache=False).loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed() -> float:
        wait()
        start = time.perf_counter()
        step()
        wait()
        return time.perf_counter() - start

    step()
    plain, hooked, inside = [], [], []
    for turn in range(steps):
        plain.append(timed())
        with Clock() as clock, scheduler.attach(model):
            hooked.append(timed())
        inside.append(clock.seconds)
        report(f"{name} {norm}: step {turn + 1}")
    peak_plain = typical_peak(step, device)
    with scheduler.attach(model):
        step()
        peak_hooked = typical_peak(step, device)
    gradients = sum(p.nbytes for p in model.parameters())
    assert scheduler.metrics()["observations"] >= steps
    return {
        "model": name,
        "norm": norm,
        "dtype": str(case.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": inputs.numel(),
        "step_s": median(plain),
        "attached_step_s": median(hooked),
        "paired_overhead": median(b / a - 1 for a, b in zip(plain, hooked, strict=True)),
        "inside_hooks": None if device.type == "cuda" else median(a / b for a, b in zip(inside, plain, strict=True)),
        "extra_peak_mib": None if peak_plain is None or peak_hooked is None else (peak_hooked - peak_plain) / 2**20,
        "gradients_mib": gradients / 2**20,
    }


def typical_peak(step: Callable[[], None], device: torch.device) -> float | None:
    """The median over three steps: an allocator's leftovers move a single peak by a tenth."""
    peaks = [peak_memory(step, device) for _ in range(3)]
    return None if None in peaks else median(peak for peak in peaks if peak is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, help="tiny and 100M; on a GPU Qwen3-0.6B, too")
    parser.add_argument("--norms", nargs="+", default=["euclidean", "adam"], choices=["euclidean", "adam"])
    parser.add_argument("--steps", type=int, help="pairs of steps (default: 200 of tiny, 6 of 100M, 20 of Qwen3-0.6B)")
    args = parse_arguments(parser, "attach_overhead")
    origin = environment(args.device)
    cases = [
        (name, norm, args.steps or (2 if args.small else CASES[name].steps))
        for name in args.models or MODELS[args.sizes]
        for norm in args.norms
    ]
    rows: list[Row] = []
    with progress(sum(steps for *_, steps in cases)) as report:
        for name, norm, steps in cases:
            rows.append(measure(name, norm, steps, args.device, report))
            write_json(args.json, "attach_overhead", origin, rows=rows)
    print_table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
