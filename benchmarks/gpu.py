"""Everything that is asked of an accelerator, command by command: tests, benchmarks, examples, and what came of them.

    python3 -m benchmarks.gpu --list                                   # the commands, and how long each should take
    python3 -m benchmarks.gpu --out runs/gpu                           # all of them, as `make gpu` does
    python3 -m benchmarks.gpu --only test_device logprob_stats --out runs/gpu
    python3 -m benchmarks.gpu --resume --out runs/gpu                  # what has not passed at this commit
    python3 -m benchmarks.gpu --device cpu --small --out runs/rehearsal   # does every command run at all?

A command that fails, or takes longer than ``LIMIT``, stops no other. What is worth keeping goes to ``--out``, which
holds eight files with plain names: ``summary.json``, rewritten after every command, and a folder named for the device,
whose JSON files are what ``benchmarks/results`` has. Each is written by its benchmark, row by row. Logs, what examples
leave, and ``state.jsonl``, a line per command that has ended, are in ``--work``. What was done at this commit before,
by ``--only``, stays in the summary, and its results are put back into an ``--out`` that has been emptied. A machine
that knows nothing of that takes it from ``--resume summary.json``.

It needs torch alone. Commands that need a package that is not there are left out, and the summary says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import (
    ROOT,
    Row,
    code_digest,
    environment,
    parse_arguments,
    print_table,
    results_folder,
    write_atomically,
)

LIMIT = 570  # seconds of one command: it and its end stay within ten minutes
GRACE = 10.0  # seconds to write what there is, after the first signal
TAIL = 20_000  # characters of output that the summary keeps; a tenth of it where the command passed
FEW_STEPS = ("--steps", "2", "--warm-start-steps", "1", "--prompts", "4", "--group-size", "2")  # of an example
COLUMNS = ["command", "status", "seconds", "rows", "why"]
PACKAGES = {  # how it is imported, and what is not done without it
    "triton": "kernels",
    "transformers": "language models",
    "tokenizers": "examples",
    "rich": "the example's table",
    "matplotlib": "the example's picture",
    "numpy": "the example's table",
    "pytest": "all tests",
    "hypothesis": "test files that state properties",
    "xdist": "tests in several processes",
    "pytest_randomly": "tests in random order",
    "verl": "comparison",
    "trl": "comparison",
    "liger_kernel": "comparison",
    "flash_attn": "comparison",
    "cut_cross_entropy": "comparison",
    "opacus": "comparison",
    "backpack": "comparison",
}


class Command(NamedTuple):
    """A process of its own.

    Attributes:
        name: for ``--only``, and for the JSON that it writes, if it does.
        words: after the interpreter.
        needs: modules without which it is left out.
        budget: seconds that it should take on a large GPU: an estimate, until it has been measured.
        writes: whether it is a benchmark, with a JSON of rows.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]
    budget: int
    writes: bool = False


def commands(device: torch.device, small: bool, out: Path, work: Path) -> list[Command]:
    """In the order of what is to be known first."""
    kernels = ("triton",) if device.type == "cuda" else ()  # elsewhere torch does it
    sizes = ("--device", device.type, *(("--small",) if small else ()))
    results = out / results_folder(device)

    def tests(path: str, budget: int, *needs: str, few: str) -> Command:
        words = ["-m", "pytest", "-q", "-rfE", "--tb=short", f"tests/{path}.py", *processes(device)]
        if small:
            words += ["-k", few]
        return Command(Path(path).name, tuple(words), ("pytest", *needs, *kernels), budget)

    def bench(name: str, budget: int, *words: str, module: str = "", needs: tuple[str, ...] = ()) -> Command:
        options = (*sizes, "--out", str(results), "--name", name, *(() if small else words))
        return Command(name, ("-m", f"benchmarks.{module or name}", *options), (*needs, *kernels), budget, writes=True)

    def trained(parallel: str) -> Command:
        words = [
            "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "1",
            "-m", "examples.ddp_fsdp", "--parallel", parallel, "--device", device.type, "--out", str(work / parallel),
            *(FEW_STEPS if small else ("--steps", "20")),
        ]  # fmt: skip
        return Command(parallel, tuple(words), ("transformers", "tokenizers", *kernels), 90)

    def example() -> Command:
        steps = (*FEW_STEPS, "--micro-batches", "2") if small else ("--steps", "50")
        out = ("--device", device.type, "--out", str(work / "qwen3_arithmetic"))
        needs = ("transformers", "tokenizers", "rich", "matplotlib", "numpy", *kernels)
        return Command("qwen3_arithmetic", ("-m", "examples.qwen3_arithmetic", *out, *steps), needs, 90)

    return [
        tests("test_device", 180, "transformers", few="baseline"),
        tests("kernels/test_logprob_stats", 300, "hypothesis", few="no_rows"),
        tests("kernels/test_linear_logprob_stats", 240, "hypothesis", few="no_tokens"),
        tests("kernels/test_linear_grad_norms", 240, "hypothesis", few="no_tokens"),
        tests("kernels/test_norm_embedding_grad_norms", 120, "hypothesis", few="no_tokens"),
        tests("kernels/test_head_grad_norms", 60, few="outputs"),
        bench("logprob_stats", 120),
        bench("linear_logprob_stats", 240),
        bench("linear_grad_norms", 180),
        bench("baseline_speed", 60),
        bench("attach_overhead", 120, needs=("transformers",)),
        bench(
            "per_sample_norms", 240, "--turns", "3", "--models", "Qwen3-0.6B", "Qwen3-4B", needs=("transformers",)
        ),
        bench(
            "per_sample_norms_8b", 300, "--turns", "3", "--models", "Qwen3-8B",
            module="per_sample_norms", needs=("transformers",),
        ),
        trained("ddp"),
        trained("fsdp"),
        example(),
    ]  # fmt: skip


def processes(device: torch.device) -> list[str]:
    """Tests compile hundreds of kernels, one after another in one process; memory for four is asked for."""
    if device.type != "cuda" or not installed("xdist"):
        return []
    room = torch.cuda.get_device_properties(device).total_memory >= 64 << 30 and (os.cpu_count() or 1) >= 8
    return ["-n", "4", "--dist", "worksteal"] if room else []


def installed(module: str) -> bool:
    """Whether it could be imported, as far as can be seen without."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it says of itself that it has none
        return False


# ------------------------------------------------------------------------------------------------------------- one run
class Stopped(Exception):
    """By Ctrl-C, or by whoever ends this process."""


def run(command: Command, results: Path, work: Path, device: torch.device, limit: float = LIMIT) -> Row:
    """Run it to its end or for ``limit`` seconds: how it ended, with its last lines and the rows that it wrote.

    Raises:
        Stopped: from outside; the process and its children have been ended.
    """
    missing = [module for module in command.needs if not installed(module)]
    if missing:
        return {"command": command.name, "status": "left out", "why": f"not installed: {', '.join(missing)}"}
    result, log = results / f"{command.name}.json", work / f"{command.name}.log"
    result.unlink(missing_ok=True)  # so that what is there afterwards is of this run
    shutil.rmtree(work / command.name, ignore_errors=True)  # a checkpoint would be gone on with
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command.words], cwd=ROOT, env=surroundings(device), stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    row: Row = {"command": command.name}
    row["status"] = "passed" if code == 0 else "failed" if code is not None else "timed out"
    row |= {"seconds": round(time.monotonic() - start, 2), "limit": limit, "exit_code": code}
    output = log.read_text(errors="replace").strip()
    if code != 0:
        row["why"] = f"no end after {limit:g} s" if code is None else why(output, code)
    row["output"] = output[-(TAIL // 10 if code == 0 else TAIL) :]
    return row | read_result(command, result)


def surroundings(device: torch.device) -> dict[str, str]:
    """The environment of a command: our modules, output line by line, kernels compiled and not interpreted."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    if device.type == "cuda":
        found.pop("TRITON_INTERPRET", None)
        found.setdefault("NCCL_SOCKET_IFNAME", "lo")  # one process, on machines that may have no network
    else:
        found["CUDA_VISIBLE_DEVICES"] = ""  # the CPU was asked for
    return found


def end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it has started: first as Ctrl-C does, so that tests say what failed so far."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # all have ended; PermissionError is a Mac's word for it
        pass
    process.wait()


def why(output: str, code: int) -> str:
    """The last line that says something; a signal has its name."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (lines[-1] if lines else f"exit code {code}")[:200]


def read_result(command: Command, path: Path) -> Row:
    """The JSON of a benchmark, as far as it came; the rows that it could not measure, by what they say."""
    if not command.writes or not path.is_file():
        return {}
    result = json.loads(path.read_text())
    refused = [row for row in result["rows"] if row.get("refused")]
    found: Row = {"rows": len(result["rows"]) - len(refused), "result": result}
    if refused:
        found["refused"] = [
            f"{row.get('implementation') or row.get('way')}: {row['refused']}" for row in refused
        ]  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------------------------- state
class State:
    """What is known of each command at this commit, on this device: in ``state.jsonl``, and by ``rows``."""

    def __init__(self, work: Path, identity: dict[str, Any], summary: Path | None = None) -> None:
        self.path, self.identity, self.rows = work / "state.jsonl", identity, {}  # type: ignore[var-annotated]
        work.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._take(lines(self.path.read_text()))
        if summary is not None:
            for row in self._take(json.loads(summary.read_text())["commands"]):
                self._append(row)

    def _take(self, rows: Iterable[Row]) -> list[Row]:
        taken = [row for row in rows if all(row.get(name) == value for name, value in self.identity.items())]
        self.rows |= {row["command"]: row for row in taken}  # the last word counts
        return taken

    def add(self, row: Row) -> None:
        """Remember it, and write it down if the command has been started."""
        self.rows[row["command"]] = row = self.identity | row
        if row["status"] != "not started":
            self._append(row)

    def _append(self, row: Row) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def passed(self, name: str) -> bool:
        return bool(self.rows.get(name, {}).get("status") == "passed")


def lines(text: str) -> Iterable[Row]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut off by a crash
            yield json.loads(line)


def put_back(rows: Iterable[Row], results: Path) -> None:
    """The results of what was done before, where they are missing."""
    for row in rows:
        path = results / f"{row['command']}.json"
        if "result" in row and not path.is_file():
            write_atomically(path, json.dumps(row["result"], indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------------------- main
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these commands")
    parser.add_argument("--list", action="store_true", help="show the commands, with the seconds they should take")
    parser.add_argument(
        "--resume", nargs="?", type=Path, const=Path(), metavar="SUMMARY",
        help="leave out what has passed at this commit, as --work knows, and this summary.json",
    )  # fmt: skip
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of one command (default: {LIMIT})")
    parser.add_argument("--within", type=float, help="seconds of all: what would not be done by then is not started")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu_work"), help="folder of the state and the logs")
    args = parse_arguments(parser, None, out=Path("runs/gpu"))
    out, work, device = args.out.resolve(), args.work.resolve(), args.device
    every = {command.name: command for command in commands(device, args.small, out, work)}
    if unknown := set(args.only or ()) - set(every):
        parser.error(f"--only: no command {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    chosen = [command for name, command in every.items() if not args.only or name in args.only]
    if args.list:
        for command in chosen:
            print(f"{command.name:<32}{command.budget:>4} s  {shlex.join(['python3', *command.words])}")
        return
    summary = args.resume if args.resume != Path() else None
    if summary is not None and not summary.is_file():
        parser.error(f"--resume: there is no {summary}")

    where = environment(device) | {"code": code_digest(), "small": args.small}
    missing = {module: purpose for module, purpose in PACKAGES.items() if not installed(module)}
    introduce(where, missing)
    state = State(work, {name: where[name] for name in ("commit", "code", "device", "small")}, summary)
    before = {command.name for command in chosen if args.resume is not None and state.passed(command.name)}

    def write() -> list[Row]:
        rows = [state.rows[name] for name in every if name in state.rows]
        found = {"environment": where, "missing": missing, "commands": rows}
        write_atomically(out / "summary.json", json.dumps(found, indent=1) + "\n")
        return rows

    todo = [command for command in chosen if command.name not in before]
    kept = [row for name, row in state.rows.items() if name not in {command.name for command in todo}]
    results = out / results_folder(device)
    put_back(kept, results)
    previous = signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a shell's script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # or every command would ignore it, too
    try:
        for row in run_all(todo, results, work, device, args.limit, args.within):
            state.add(row)
            write()
    finally:
        signal.signal(signal.SIGTERM, previous)
    report(write(), before, out / "summary.json")
    if not args.small:
        print(f"to keep the results: cp {results}/*.json benchmarks/results/{results.name}/")
    if any(state.rows[command.name]["status"] not in ("passed", "left out") for command in chosen):
        raise SystemExit(1)


def stop(signum: int, frame: Any) -> None:
    raise Stopped


def run_all(
    todo: Sequence[Command], results: Path, work: Path, device: torch.device, limit: float, within: float | None
) -> Iterator[Row]:
    """Each in turn, whatever became of those before it."""
    deadline = time.monotonic() + (within or float("inf"))
    stopped = False
    for command in todo:
        row: Row = {"command": command.name, "status": "not started"}
        left = deadline - time.monotonic() - 2 * GRACE
        if stopped:
            row["why"] = "stopped from outside"
        elif left < min(command.budget, limit):
            row["why"] = f"should take {command.budget} s, and {max(0, left):.0f} s are left"
        else:
            print(f"{command.name} ...", flush=True)
            try:
                row = run(command, results, work, device, min(limit, left))
            except (Stopped, KeyboardInterrupt):
                stopped = True
                row |= {"status": "stopped", "why": "from outside"}
                row |= read_result(command, results / f"{command.name}.json")
        yield row


def introduce(where: dict[str, Any], missing: dict[str, str]) -> None:
    """What is measured and on what, and what cannot be, before the first command."""
    versions = ("python", "torch", "triton", "transformers", "cuda", "driver")
    print(
        f"{where['device']}, commit {where['commit']}:", ", ".join(f"{k} {where[k]}" for k in versions if where.get(k))
    )
    for module, purpose in missing.items():
        print(f"not installed: {module} ({purpose})")
    sys.stdout.flush()


def report(rows: Sequence[Row], before: set[str], summary: Path) -> None:
    """The last lines of what failed, the table, and what could not be measured."""
    for row in rows:
        if row["status"] not in ("passed", "left out", "not started"):
            print(f"\n---- {row['command']}: {row['status']}, {row.get('why')}")
            print("\n".join(row.get("output", "").splitlines()[-15:]))
    print()
    print_table([row | {"status": "passed before"} if row["command"] in before else row for row in rows], COLUMNS)
    for row in rows:
        for refused in row.get("refused", ()):
            print(f"{row['command']}: not measured: {refused}")
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
