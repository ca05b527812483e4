"""What studies that train on the demo's task share: its sizes, a loop of their own, and many runs in processes.

The loop is that of ``examples.qwen3_arithmetic`` without what a study does not vary: no hooks for the picture, no files
of a run, and advantages and the step given by the study.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import progress
from examples.common.arithmetic import is_correct, problems
from examples.common.policy import Rollout, sample, sequence_log_probs, tiny_qwen3, warm_start

PROMPTS, GROUP, MICRO_BATCHES, WARM_UP, LAST = 32, 8, 8, 20, 20  # LAST steps make the final reward
WARM_START = 500  # supervised steps


def train_on_demo_task(
    model: Any, tokenizer: Any, seed: int, steps: int,
    advantages_of: Callable[[Tensor, Rollout], Tensor], step: Callable[[], None],
) -> list[float]:  # fmt: skip
    """The demo's loop: sample, verify, go backward in micro-batches, ``step()``. The mean reward of every step."""
    torch.manual_seed(seed)
    rewards = []
    for number in range(steps):
        batch = problems(PROMPTS, seed, number)
        rollout, texts = sample(model, tokenizer, batch, GROUP, max_new_tokens=7)
        reward = torch.tensor([is_correct(text, batch[i // GROUP]) for i, text in enumerate(texts)]).float()
        advantages = advantages_of(reward, rollout)
        size = PROMPTS // MICRO_BATCHES * GROUP
        for start in range(0, len(reward), size):
            micro = {name: tensor[start : start + size] for name, tensor in rollout.items()}
            log_probs = sequence_log_probs(model, micro)
            (-(advantages[start : start + size] * log_probs).sum() / len(reward)).backward()
        step()
        rewards.append(reward.mean().item())
    return rewards


def prepare(folder: Path, seeds: Iterable[int]) -> dict[int, Path]:
    """The supervised start of every seed."""
    files = {seed: folder / f"start-{seed}.pt" for seed in seeds}
    for seed, file in files.items():
        if not file.exists():
            model, tokenizer = tiny_qwen3(seed)
            warm_start(model, tokenizer, WARM_START, seed, lambda row: None)
            torch.save(model.state_dict(), file)
    return files


def logged_runs(log: Path, resume: bool) -> list[dict[str, Any]]:
    """The rows of the runs that ``log`` has, none without ``resume``; it holds these afterwards."""
    rows = [json.loads(line) for line in log.read_text().splitlines()] if resume and log.exists() else []
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run_missing(
    function: Callable[[Any], dict[str, Any]], jobs: list[Any], rows: list[dict[str, Any]], log: Path, processes: int,
    label: Callable[[dict[str, Any]], str],
) -> None:  # fmt: skip
    """Run every job in a process of its own; what comes out is added to the rows, and to the log at once."""
    context = multiprocessing.get_context("spawn")
    with progress(len(jobs)) as report, context.Pool(processes, torch.set_num_threads, (1,)) as pool:
        for row in pool.imap_unordered(function, jobs):
            rows.append(row)
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            report(f"{label(row)} seed {row['seed']}: {row['final']:.3f}")
