"""One run on disk: its metrics, its checkpoint, and going on from it; and the Ctrl-C that ends it between two steps."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, float]
OnRow = Callable[[Row], None]


class Run:
    """A folder with ``metrics.jsonl``, one line per step, and ``checkpoint.pt``.

    Args:
        folder: made anew, or with ``resume=True`` gone on with where it holds a checkpoint.
        settings: what the run depends on; a resumed run must have the same.
        on_row: called with every row that is logged.
        every: steps between checkpoints; one is also written at the end and at Ctrl-C.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resume: bool, on_row: OnRow, every: int = 50) -> None:
        self.folder, self.settings, self.on_row, self.every = folder, settings, on_row, every
        self.metrics, self.saved = folder / "metrics.jsonl", folder / "checkpoint.pt"
        self.last_step, self.stopped = 0, False
        folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            self.metrics.unlink(missing_ok=True)
            self.saved.unlink(missing_ok=True)

    def restore(self, **parts: Any) -> int:
        """Put the checkpoint, if there is one, back into model, optimizer, ... and the RNG: the first step to do."""
        if not self.saved.exists():
            self.metrics.unlink(missing_ok=True)
            return 0
        checkpoint = torch.load(self.saved, weights_only=True)
        expect_same_settings(self.folder, self.settings, checkpoint["settings"])
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["rng"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(checkpoint["cuda_rng"])
        rows = [row for row in read_metrics(self.folder) if row["step"] <= checkpoint["step"]]
        self.metrics.write_text("".join(map(to_json, rows)))
        return int(checkpoint["step"]) + 1

    def steps(self, first: int, num: int) -> Iterator[int]:
        """Steps ``first`` to ``num - 1``, fewer after Ctrl-C."""
        self.last_step = num - 1
        for step in range(first, num):
            yield step
            if self.stopped:
                return

    def log(self, **row: Any) -> None:
        """Append one row of numbers to ``metrics.jsonl``."""
        numbers = {name: float(value) for name, value in row.items()}
        with self.metrics.open("a") as file:
            file.write(to_json(numbers))
        self.on_row(numbers)

    def checkpoint(self, step: int, **parts: Any) -> None:
        """End of a step: save everything that the next one depends on, when it is time to."""
        self.stopped = stop_requested()
        if not (self.stopped or step == self.last_step or (step + 1) % self.every == 0):
            return
        state = {name: part.state_dict() for name, part in parts.items()}
        state |= {"step": step, "settings": self.settings, "rng": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["cuda_rng"] = torch.cuda.get_rng_state_all()
        save_atomically(state, self.saved)


def read_metrics(folder: Path) -> list[Row]:
    """The rows logged so far; a last line that was cut off is left out."""
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def to_json(row: dict[str, Any]) -> str:
    """One line; JSON has no NaN, so what is unknown (the SNR of a batch of flat rewards) is null."""
    known = {name: None if isinstance(x, float) and not math.isfinite(x) else x for name, x in row.items()}
    return json.dumps(known) + "\n"


def expect_same_settings(folder: Path, now: dict[str, Any], before: dict[str, Any]) -> None:
    """Stop with one line where a run is to be resumed with other settings than it was made with."""
    changed = [f"{name} {before.get(name)}" for name, value in now.items() if before.get(name) != value]
    if changed:
        raise SystemExit(f"error: --resume: {folder} was made with {', '.join(changed)}")


def save_atomically(state: Any, path: Path) -> None:
    """A crash leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    torch.save(state, partial)
    os.replace(partial, path)


_stop = False


def stop_requested() -> bool:
    """Has Ctrl-C been pressed?"""
    return _stop


@contextmanager
def interruptible() -> Iterator[None]:
    """The first Ctrl-C asks for a stop after the current step; the second one means now."""

    def request_stop(signum: int, frame: Any) -> None:
        global _stop
        _stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
