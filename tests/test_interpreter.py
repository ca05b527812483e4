"""The Triton kernels on CPU tensors: the same tests again, in a process where Triton interprets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from snr_optim.kernels._launch import has_triton, interprets

HERE = Path(__file__).parent


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif(interprets() or torch.cuda.is_available(), reason="this process runs the kernels itself")
@pytest.mark.parametrize(
    "tests",
    [
        "test_logprob_stats.py", "test_linear_logprob_stats.py", "test_linear_grad_norms.py",
        "test_norm_embedding_grad_norms.py",
    ],
)  # fmt: skip
def test_kernels_interpreted(tests):
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / tests), "-k", "triton or slices"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # one small program at a time
    run = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 20
    assert "skipped" not in run.stdout
