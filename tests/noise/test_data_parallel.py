"""Data-parallel moments and baselines on two and four gloo processes against one process in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from paths import HELPERS, environment

CASES = HELPERS / "distributed_cases.py"
FULLY_SHARDED = {"fsdp", "hsdp", "fsdp_divide_factor", "per_sample_fsdp", "causal_lm"}
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")


@pytest.mark.parametrize(
    ("case", "processes"),
    [
        ("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("unequal", 4), ("ddp_checkpointed", 2),
        ("ddp_comm_hook", 2), ("foreign_hooks", 2), ("ddp_parameters_of_others", 2),
        ("fsdp_divide_factor", 2), ("refused", 2), ("inconsistent", 2),
        ("baseline", 2), ("baseline", 4), ("baseline_refused", 2),
        ("per_sample_ddp", 2), ("per_sample_fsdp", 2), ("vocabulary_parallel", 2), ("causal_lm", 2),
    ],
)  # fmt: skip
def test_every_rank_gets_what_one_process_gets(case, processes):
    if case in FULLY_SHARDED and torch.__version__.startswith("2.6"):
        pytest.skip("fully_shard of torch 2.6 does not run on a CPU")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*command, str(CASES), case],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
