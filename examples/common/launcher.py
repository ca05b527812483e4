"""Many runs at once, in processes of their own: progress bars, and Ctrl-C that stops all and keeps what was done."""

from __future__ import annotations

import multiprocessing
import os
import queue
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.common.runs import OnRow, Row, interruptible, stop_requested


class Job(Protocol):
    """Something to run that takes a while: picklable, so that it can run in another process."""

    @property
    def name(self) -> str:
        """What the progress bar says."""

    @property
    def total(self) -> int:
        """Steps to do."""

    def __call__(self, on_row: OnRow) -> None: ...


def run_all(jobs: Sequence[Job], processes: int, console: Console) -> None:
    """Run every job, ``processes`` at a time, showing how each gets on."""
    columns = (
        TextColumn("{task.description:<22}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[live]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, interruptible():
        tasks = [progress.add_task(job.name, total=job.total, live="", visible=False) for job in jobs]

        def show(index: int, row: Row) -> None:
            progress.update(tasks[index], completed=row["step"] + 1, live=_live(row), visible=True)

        if processes == 1:
            for index, job in enumerate(jobs):
                if not stop_requested():
                    job(lambda row, index=index: show(index, row))  # type: ignore[misc]
            return
        context = multiprocessing.get_context("spawn")
        rows: Any = context.Queue()
        threads = max(1, (os.cpu_count() or 1) // processes)
        with ProcessPoolExecutor(processes, context, _start_worker, (rows, threads)) as pool:
            futures = [pool.submit(_work, index, job) for index, job in enumerate(jobs)]
            while not all(future.done() for future in futures):
                if stop_requested():
                    _cancel(futures)
                try:
                    show(*rows.get(timeout=0.1))
                except queue.Empty:
                    continue
            while not rows.empty():
                show(*rows.get())
            for future in futures:
                if not future.cancelled():
                    future.result()


def _live(row: Row) -> str:
    if "reward" not in row:
        return f"loss {row['loss']:.3f}"
    return f"reward {row['reward']:.2f}  lr {row['lr']:.1e}  factor {row['factor']:.2f}  SNR {row['snr']:+.2f}"


def _cancel(futures: list[Future[None]]) -> None:
    for future in futures:
        future.cancel()


_rows: Any = None


def _start_worker(rows: Any, threads: int) -> None:
    global _rows
    _rows = rows
    torch.set_num_threads(threads)


def _work(index: int, job: Job) -> None:
    with interruptible():
        if not stop_requested():
            job(lambda row: _rows.put((index, row)))
