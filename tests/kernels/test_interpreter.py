"""The Triton kernels on CPU tensors: the same tests again, in processes where Triton interprets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from paths import ROOT

from snr_kernels.dispatch import has_triton, interprets

HERE = Path(__file__).parent
FILES = {  # and how many tests must run in each
    "test_logprob_stats.py": 40,
    "test_linear_logprob_stats.py": 20,
    "test_linear_grad_norms.py": 40,
    "test_norm_embedding_grad_norms.py": 40,
}


def interpret(tests):
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / tests), "-k", "triton or slices"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}  # one small program at a time
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def runs():
    with ThreadPoolExecutor(2) as pool:
        yield {tests: pool.submit(interpret, tests) for tests in FILES}


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.skipif(interprets() or torch.cuda.is_available(), reason="this process runs the kernels itself")
@pytest.mark.parametrize("tests", FILES)
def test_kernels_interpreted(runs, tests):
    run = runs[tests].result()
    assert run.returncode == 0, run.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > FILES[tests]
    assert "skipped" not in run.stdout
