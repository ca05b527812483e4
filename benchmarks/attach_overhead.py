"""What ``scheduler.attach(model)`` adds to a training step: time, and memory beside that of the gradients.

    python -m benchmarks.attach_overhead                     # minutes on two cores
    python -m benchmarks.attach_overhead --models tiny --metrics euclidean optimizer

Steps with and without hooks take turns in one process, so that a slow minute of the machine slows both. The time that
is spent inside the hooks is measured too (on a CPU): it is part of the difference, and has none of its noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.harness import environment, peak_memory, print_table, progress
from snr_optim import SNRAdaptiveLR
from snr_optim.sources import AccumulationSource

SHAPES = {  # hidden, intermediate, layers, heads, vocabulary; sequences x tokens of a micro-batch
    "tiny": ((64, 128, 2, 4, 32), (32, 16)),
    "100M": ((768, 2304, 12, 12, 32_000), (8, 128)),
}
MICRO_BATCHES = 4


def qwen3(name: str, device: torch.device) -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, intermediate, layers, heads, vocabulary = SHAPES[name][0]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=hidden // heads, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(device)


class Clock:
    """Seconds spent inside the hooks of a source."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Clock:
        self._originals = {
            name: getattr(AccumulationSource, name) for name in ("_on_gradient", "_on_end", "group_moments")
        }
        for name, original in self._originals.items():
            setattr(AccumulationSource, name, self._timed(original))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self._originals.items():
            setattr(AccumulationSource, name, original)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def measure(name: str, metric: str, steps: int, device: torch.device, report: Callable[[str], None]) -> dict[str, Any]:
    model = qwen3(name, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    scheduler = SNRAdaptiveLR(optimizer, metric=metric)
    sequences, tokens = SHAPES[name][1]
    inputs = torch.randint(SHAPES[name][0][-1], (MICRO_BATCHES, sequences, tokens), device=device)

    def step() -> None:
        for part in inputs:
            (model(input_ids=part, labels=part, use_cache=False).loss / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step()
    plain, hooked, inside = [], [], []
    for turn in range(steps):
        plain.append(timed())
        with Clock() as clock, scheduler.attach(model):
            hooked.append(timed())
        inside.append(clock.seconds)
        report(f"{name} {metric}: step {turn + 1}")
    peak_plain = typical_peak(step, device)
    with scheduler.attach(model):
        step()
        peak_hooked = typical_peak(step, device)
    gradients = sum(p.nbytes for p in model.parameters())
    assert scheduler.metrics()["observations"] >= steps
    return {
        "model": name,
        "metric": metric,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": inputs.numel(),
        "step_s": median(plain),
        "attached_step_s": median(hooked),
        "paired_overhead": median(b / a - 1 for a, b in zip(plain, hooked, strict=True)),
        "inside_hooks": median(a / b for a, b in zip(inside, plain, strict=True)),
        "extra_peak_mib": None if peak_plain is None or peak_hooked is None else (peak_hooked - peak_plain) / 2**20,
        "gradients_mib": gradients / 2**20,
    }


def typical_peak(step: Callable[[], None], device: torch.device) -> float | None:
    """The median over three steps: an allocator's leftovers move a single peak by a tenth."""
    peaks = [peak_memory(step, device) for _ in range(3)]
    return None if None in peaks else median(peak for peak in peaks if peak is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--metrics", nargs="+", default=["euclidean", "optimizer"], choices=["euclidean", "optimizer"])
    parser.add_argument("--steps", type=int, help="pairs of steps (default: 200 of the tiny model, 6 of the other)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    device = torch.device(args.device)
    origin = environment(device)
    cases = [
        (name, metric, args.steps or (200 if name == "tiny" else 6)) for name in args.models for metric in args.metrics
    ]
    with progress(sum(steps for *_, steps in cases)) as report:
        rows = [measure(name, metric, steps, device, report) for name, metric, steps in cases]
    command = ("python -m benchmarks.attach_overhead " + " ".join(sys.argv[1:])).strip()
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": "attach_overhead", "command": command, "environment": origin, "rows": rows}
    (args.out / "attach_overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(rows, list(rows[0]))


if __name__ == "__main__":
    main()
