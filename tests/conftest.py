"""Every test draws the same numbers on every run: what fails, fails again, and chance cannot turn main red."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

try:
    from hypothesis import settings
except ImportError:  # on a machine whose packages are given: files without properties can be tested there, too
    settings = None

collect_ignore = ["helpers"]  # nothing in it is a test, and some of it cannot be imported without verl or TRL

# To look for new examples: pytest --hypothesis-profile=explore
if settings is not None:
    settings.register_profile("explore", deadline=None)
    settings.register_profile("repeat", deadline=None, derandomize=True)
    settings.load_profile("repeat")


# Inductor keeps graphs that it has vectorized for one kind of CPU, and does not look whether it is another one now.
capability = os.environ.get("ATEN_CPU_CAPABILITY")
if capability is not None:
    own = Path(tempfile.gettempdir()) / f"snr_optim_inductor_{os.getuid()}_{capability}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(own))

if "PYTEST_XDIST_WORKER" in os.environ:  # cores are shared with the other workers, and what they start
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(share))))  # unless somebody has chosen


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(zlib.crc32(item.nodeid.rsplit("/", 1)[-1].encode()))  # by its name: independent of order


@pytest.fixture
def one_thread():
    """For models of a few dozen numbers, which several threads would only wait for."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def float64():
    """Models of transformers compute in float64 throughout, where they are float64 models."""
    from language_models import float64_throughout

    with float64_throughout():
        yield


@pytest.fixture(scope="session")
def two_trainer_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``trainer_cases.py``, run by two processes, has left what it found."""
    from paths import HELPERS, environment

    cases, out = HELPERS / "trainer_cases.py", tmp_path_factory.mktemp("two_trainer_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(cases)]
    done = subprocess.run(
        [*command, str(out)], env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=180,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return out
