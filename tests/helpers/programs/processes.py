"""Programs that two processes run under a data-parallel wrapper: all must agree with brute force, and to the last bit.

``start`` runs them; each process is this module under ``torch.distributed.run``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from paths import environment
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .check import Disagreement, run
from .language import program_of
from .subject import Subject

PROCESSES = 2
WRAPPERS = ("ddp", "ddp as views", "fully_shard")


def start(wrapper: str, first: int, number: int, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run the programs of these seeds in processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    return subprocess.run(
        [*command, "-m", "programs.processes", wrapper, str(first), str(number)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


def wrap_by(wrapper: str) -> Any:
    def wrap(model: nn.Module) -> nn.Module:
        if wrapper == "fully_shard":
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                fully_shard(block)
            return fully_shard(model)
        as_views = wrapper == "ddp as views"
        return DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=as_views)

    return wrap


def same_everywhere(subject: Subject) -> None:
    lrs = torch.tensor([subject.scheduler.factor, *subject.lrs, *subject.used_lrs], dtype=torch.float64)
    of_all = [torch.empty_like(lrs) for _ in range(dist.get_world_size())]
    dist.all_gather(of_all, lrs)
    if not all(torch.equal(one, lrs) for one in of_all):
        raise Disagreement(f"the processes disagree: factor and lrs are {[one.tolist() for one in of_all]}")


def main(wrapper: str, first: int, number: int) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    rank, world = dist.get_rank(), dist.get_world_size()
    happened: Counter[str] = Counter()
    for seed in range(first, first + number):
        program = program_of(seed, wrapper)
        try:
            subject = Subject(program.setting, rank, wrap_by(wrapper))
            happened += run(program, subject, world, same_everywhere)
        except BaseException as error:  # the other process may wait for this one: end both
            print(f"seed {seed}, process {rank}: {type(error).__name__}: {error}\n{program}", flush=True)
            os._exit(1)
    if rank == 0:
        print(dict(happened.most_common()), flush=True)
    dist.barrier()
    os._exit(0)  # threads of gloo and DDP that still run abort the interpreter's own way out, now and then


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
