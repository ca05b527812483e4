"""What every kernel benchmark shares: a trustworthy clock, peak memory, the limits of the machine, and the report.

On a GPU: CUDA events around each call, all calls queued before the first is waited for, inputs larger than the L2
cache and taken in turn. On a CPU: wall clock and resident memory. Everywhere: medians with 20 and 80 % quantiles,
random data, and the bandwidth of a copy and the rate of a matmul measured in the same run.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from snr_optim.kernels._launch import Cost

ROOT = Path(__file__).resolve().parent.parent
LAST_LEVEL_CACHE = 256 << 20  # no GPU of today has more, and few CPUs


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float
    high: float
    calls: int


def time_calls(call: Callable[[int], Any], device: torch.device, *, seconds: float = 2.0, warm_up: int = 2) -> Timing:
    """Time ``call(0), call(1), ...``; the number says which of several inputs to take."""
    for turn in range(warm_up):
        call(turn)
    first = _clock(call, device, 1)[0]
    calls = max(5, min(200, int(1e3 * seconds / max(first, 1e-3))))
    times = torch.tensor(_clock(call, device, calls), dtype=torch.float64)
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(median, low, high, calls)


def _clock(call: Callable[[int], Any], device: torch.device, calls: int) -> list[float]:
    if device.type != "cuda":
        times = []
        for turn in range(calls):
            start = time.perf_counter()
            call(turn)
            times.append(1e3 * (time.perf_counter() - start))
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    torch.cuda.synchronize()
    for turn, (start, end) in enumerate(events):
        start.record()
        call(turn)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def peak_memory(call: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes in use during ``call()`` beyond those before; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def mebibytes(nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20


def _status(field: str) -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return 1024 * int(line.split()[1])


def copies(nbytes: int) -> int:
    """How many inputs of this size to take in turn, so that none is still in a cache when its turn comes."""
    return 1 if nbytes > 2 * LAST_LEVEL_CACHE else max(2, -(-LAST_LEVEL_CACHE // max(1, nbytes)))


# --------------------------------------------------------------------------------------------- the machine's limits
class Limits(NamedTuple):
    """Measured: bytes per second of a copy (read and written), FLOP per second of a matmul."""

    bandwidth: float
    matmul: float

    def seconds(self, cost: Cost) -> float:
        """The least time for what must be moved."""
        return cost.bytes / self.bandwidth


def measure_limits(device: torch.device) -> Limits:
    gpu = device.type == "cuda"
    elements, side, dtype = (1 << 30, 8192, torch.bfloat16) if gpu else (1 << 27, 2048, torch.float32)
    source = torch.randn(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda _: target.copy_(source), device, seconds=1.0)
    bandwidth = 2e3 * source.nbytes / copy.median
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    matmul = time_calls(lambda _: a @ b, device, seconds=1.0)
    return Limits(bandwidth, 2e3 * side**3 / matmul.median)


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; asked for before the first is measured."""
    found = {
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "cpu": cpu_name()}
    return found


def commit() -> str:
    """The commit that is measured, marked where files were changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# ------------------------------------------------------------------------------------------------------ the report
Row = dict[str, Any]


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar where `rich` is installed and a terminal shows it, a line per step elsewhere."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        shown = False
    else:
        shown = sys.stdout.isatty()
    if not shown:
        yield lambda text: print(text, file=sys.stderr)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    cells = [list(columns), *([_format(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _format(value: Any) -> str:
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def write_json(
    path: Path, benchmark: str, environment: dict[str, Any], *, limits: Limits | None = None, **tables: Any
) -> None:
    """What was measured, by which command and on what; tables of rows get a line per row."""
    head: dict[str, Any] = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark} {' '.join(sys.argv[1:])}".strip(),
        "environment": environment,
    }
    if limits is not None:
        head["limits"] = {"copy_bytes_per_second": limits.bandwidth, "matmul_flop_per_second": limits.matmul}
    head |= {name: table for name, table in tables.items() if not isinstance(table, list)}
    text = json.dumps(head, indent=1, allow_nan=False)[:-2]
    for name, table in tables.items():
        if isinstance(table, list):
            text += f',\n "{name}": [\n  ' + ",\n  ".join(json.dumps(row, allow_nan=False) for row in table) + "\n ]"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n}\n")


def draw_roofline(path: Path, title: str, limits: Limits, points: dict[str, tuple[Cost, float]]) -> None:
    """FLOP/s reached against FLOP per byte that must be moved, under the two limits.

    Args:
        path: of the picture.
        title: above it.
        limits: the roof.
        points: by label, what had to be done and the seconds it took.
    """
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    ridge = limits.matmul / limits.bandwidth
    intensities = np.geomspace(0.1, 10 * ridge, 200)
    roof = np.minimum(intensities * limits.bandwidth, limits.matmul) / 1e9
    axes.loglog(intensities, roof, color="black", linewidth=1)
    axes.annotate("copy bandwidth", (0.15, 0.15 * limits.bandwidth / 1e9), rotation=35, fontsize=8, va="bottom")
    axes.annotate("matmul", (ridge * 3, limits.matmul / 1e9), fontsize=8, va="bottom")
    for number, (label, (cost, seconds)) in enumerate(points.items()):
        marker = "osD^vPX*"[number % 8]
        reached = cost.flops / seconds / 1e9
        axes.loglog(cost.flops / cost.bytes, reached, marker, label=f"{label}: {limits.seconds(cost) / seconds:.0%}")
    axes.set(title=title, xlabel="FLOP per byte that must be moved", ylabel="GFLOP/s")
    axes.legend(title="of the copy bandwidth", fontsize=8, title_fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
