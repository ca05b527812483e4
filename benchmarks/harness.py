"""What every kernel benchmark shares: options, a trustworthy clock, peak memory, the machine's limits, and the report.

On a GPU: CUDA events around each call, all calls queued before the first is waited for, inputs larger than the L2
cache and taken in turn. On a CPU: wall clock and resident memory. Everywhere: medians with 20 and 80 % quantiles,
random data, and the bandwidth of a copy and the rate of a matmul measured in the same run.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.roofline import Cost

ROOT = Path(__file__).resolve().parent.parent
LAST_LEVEL_CACHE = 256 << 20  # no GPU of today has more, and few CPUs
MOST_CALLS = 200


# ----------------------------------------------------------------------------------------------------- the command line
def parse_arguments(
    parser: argparse.ArgumentParser, benchmark: str | None, out: Path = Path("runs/bench")
) -> argparse.Namespace:
    """The options of the benchmark and those that all have; ``sizes`` says which of its sizes to take."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--small", action="store_true", help="sizes that only show that every line runs")
    parser.add_argument("--out", type=Path, default=out, help=f"folder of the JSON (default: {out})")
    if benchmark:
        parser.add_argument("--name", default=benchmark, help=f"of the JSON, without .json (default: {benchmark})")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU here")
    args.device = torch.device(args.device)
    args.sizes = "small" if args.small else args.device.type
    args.json = args.out / f"{args.name}.json" if benchmark else None
    LEFT_OUT.clear()
    return args


# ---------------------------------------------------------------------------------------------------- time and memory
class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        median: of all calls, each between two events on a GPU.
        low: the 20 % quantile.
        high: the 80 % quantile.
        calls: how many.
        host: on a GPU, what Python takes until everything is queued. Where this is not well below the median, the GPU
            has been waiting, and the median says little about kernels.
    """

    median: float
    low: float
    high: float
    calls: int
    host: float | None = None


def time_calls(call: Callable[[int], Any], device: torch.device, *, seconds: float = 2.0, warm_up: int = 2) -> Timing:
    """Time ``call(0), call(1), ...``; the number says which of several inputs to take."""
    for turn in range(warm_up):
        call(turn)
    first = _clock(call, device, 1)[0]
    calls = max(5, min(MOST_CALLS, int(1e3 * seconds / max(first, 1e-3))))
    host = median([_queueing(call, turn) for turn in range(5)]) if device.type == "cuda" else None
    times = torch.tensor(_clock(call, device, calls), dtype=torch.float64)
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(middle, low, high, calls, host)


def _queueing(call: Callable[[int], Any], turn: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(turn)
    return 1e3 * (time.perf_counter() - start)


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
    if nbytes > 2 * LAST_LEVEL_CACHE:
        return 1
    return max(2, min(1024, -(-LAST_LEVEL_CACHE // max(1, nbytes))))


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- the machine's limits
class Limits(NamedTuple):
    """Measured: bytes per second of a copy (read and written), FLOP per second of a matmul, and its dtype."""

    bandwidth: float
    matmul: float
    dtype: str = ""

    def seconds(self, cost: Cost) -> float:
        """The least time for what must be moved."""
        return cost.bytes / self.bandwidth


def measure_limits(device: torch.device, sizes: str | None = None) -> Limits:
    """With ``sizes="small"``, numbers that mean nothing."""
    gpu = device.type == "cuda"
    elements, side, dtype = (1 << 30, 8192, torch.bfloat16) if gpu else (1 << 27, 2048, torch.float32)
    seconds = 1.0
    if sizes == "small":
        elements, side, seconds = 1 << 16, 64, 0.0
    source = torch.randn(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda _: target.copy_(source), device, seconds=seconds)
    bandwidth = 2e3 * source.nbytes / copy.median
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    matmul = time_calls(lambda _: a @ b, device, seconds=seconds)
    return Limits(bandwidth, 2e3 * side**3 / matmul.median, str(dtype).removeprefix("torch."))


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on; asked for before the first is measured."""
    found = {
        "commit": commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        found |= {
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or None,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30,
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "cpu": cpu_name(),
        }
    return found


def commit() -> str:
    """The commit that is measured, marked where files were changed since; of a copy without git, a digest of its code.

    ``SNR_OPTIM_COMMIT`` names the commit of such a copy.
    """
    if named := os.environ.get("SNR_OPTIM_COMMIT"):
        return named
    if not (head := _run("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")):
        return f"code {code_digest()}"
    changed = _run("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def code_digest() -> str:
    """What tells one state of the code from another where the commit does not: changed since, or unknown."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "examples", "kernels", "snr_optim", "tests"):
        for path in sorted(path for path in (ROOT / folder).rglob("*.py") if path == path.resolve()):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def results_folder(device: torch.device) -> str:
    """The folder of ``benchmarks/results`` for this machine: ``cpu``, or such as ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-") if device.type == "cuda" else "cpu"


def cpu_name() -> str:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0].split(':')[1].strip() if names else platform.processor()}, {os.cpu_count()} cores"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


# ------------------------------------------------------------------------------------------------------ the report
Row = dict[str, Any]
LEFT_OUT: dict[str, str] = {}  # peers that could not be imported, and why


def left_out(peer: str, error: Exception) -> list[Any]:
    """No implementations of this peer, and a note for the report."""
    LEFT_OUT[peer] = refusal(error)
    return []


def refusal(error: Exception) -> str:
    """One short line."""
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:160]


def attempt(about: Row, rows: Iterable[Row], device: torch.device) -> list[Row]:
    """The rows, and where something cannot be done, one that says why: peers refuse in many ways, memory may not do."""
    measured, refused = [], ""
    try:
        for row in rows:
            measured.append(about | row)
    except Exception as error:
        refused = refusal(error)
    if refused:  # here, where the error no longer refers to what filled the memory
        measured.append(about | {"refused": refused})
        release(device)
    return measured


def conclude(rows: Sequence[Row], columns: Sequence[str], ours: Callable[[Row], bool]) -> None:
    """The table, the peers that were left out, and an exit code of 1 if something of ours does not work.

    Too little memory is a result, not a failure.
    """
    print_table(rows, columns)
    for peer, reason in LEFT_OUT.items():
        print(f"left out: {peer} ({reason})")
    broken = [row["refused"] for row in rows if row.get("refused") and ours(row)]
    broken = [reason for reason in broken if not reason.startswith("OutOfMemoryError")]
    if broken:
        raise SystemExit(f"{len(broken)} rows of ours could not be measured; the first: {broken[0]}")


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
    """What was measured, by which command and on what; tables of rows get a line per row.

    The file is replaced as a whole: whoever is killed leaves the rows of the call before.
    """
    head: dict[str, Any] = {
        "benchmark": benchmark,
        "command": f"python -m benchmarks.{benchmark} {' '.join(_words())}".strip(),
        "environment": environment,
    }
    if limits is not None:
        head["limits"] = {"copy_bytes_per_second": limits.bandwidth, "matmul_flop_per_second": limits.matmul}
        head["limits"] |= {"matmul_dtype": limits.dtype} if limits.dtype else {}
    if LEFT_OUT:
        head["left_out"] = dict(LEFT_OUT)
    head |= {name: table for name, table in tables.items() if not isinstance(table, list)}
    text = json.dumps(head, indent=1, allow_nan=False)[:-2]
    for name, table in tables.items():
        if isinstance(table, list):
            text += (
                f',\n "{name}": [\n  '
                + ",\n  ".join(json.dumps(_finite(row), allow_nan=False) for row in table)
                + "\n ]"
            )
    write_atomically(path, text + "\n}\n")


def _words() -> list[str]:
    """Of the command line, without the folder: it is of one machine, and changes nothing."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return words


def write_atomically(path: Path, text: str) -> None:
    """A reader, or a crash, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _finite(row: Row) -> Row:
    """JSON has neither NaN nor infinity: they become words, rather than cost the whole file."""
    return {k: str(x) if isinstance(x, float) and not math.isfinite(x) else x for k, x in row.items()}


def pyplot() -> Any:
    """Matplotlib's, for pictures in files; imported where one is drawn, as all else does without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def tidy(axes: Any, **which: Any) -> None:
    """A faint grid, and no frame at the top and on the right."""
    axes.grid(alpha=0.25, **which)
    axes.spines[["top", "right"]].set_visible(False)


def draw_roofline(path: Path, title: str, limits: Limits, points: dict[str, tuple[Cost, float]]) -> None:
    """FLOP/s reached against FLOP per byte that must be moved, under the two limits.

    Args:
        path: of the picture.
        title: above it.
        limits: the roof.
        points: by label, what had to be done and the seconds it took.
    """
    import numpy as np

    plt = pyplot()
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
