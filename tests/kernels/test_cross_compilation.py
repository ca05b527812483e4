"""Every kernel in every configuration that can be launched, compiled for four GPUs on a machine that has none."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from snr_kernels.dispatch import has_triton, interprets

if not has_triton() or interprets():
    pytest.skip("needs triton, not interpreted", allow_module_level=True)

import crosscompile as cc


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(2, get_context("spawn"), cc.in_own_cache, (folder,)) as pool:
        yield pool


@pytest.mark.parametrize("target", cc.TARGETS)
@pytest.mark.parametrize("module", cc.MODULES, ids=lambda module: module.__name__.split(".")[1])
def test_no_spills_and_shared_memory_within_limits(workers, module, target):
    configurations = list(module.configurations())
    assert len(configurations) == cc.MODULES[module]
    jobs = [(target, module.__name__, number) for number in range(len(configurations))]
    for configuration, (shared, spilled) in zip(configurations, workers.map(cc.compile_number, jobs), strict=True):
        assert spilled == 0, configuration
        assert shared <= cc.TARGETS[target][3], configuration


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_spill_would_be_seen(workers, target):
    assert workers.submit(cc.compile_too_much, target).result()[1] > 0
