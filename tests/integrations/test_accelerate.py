"""Loops of accelerate in one and two processes against one process that knows nothing of accelerate."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from paths import HELPERS, environment
from torch import nn

from snr_optim import SNRAdaptiveLR

pytest.importorskip("accelerate", reason="these are its loops")
from accelerate_cases import CASES, ROWS, STEPS, SUB_BATCHES, Model, dataset, halving, make_optimizer, run_all

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
SCRIPT = HELPERS / "accelerate_cases.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """``(case, processes, rank)`` to what it found: all cases are run once by this process, once by two others."""
    alone, two = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("two")
    run_all(alone)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT, two]
    done = subprocess.run(
        command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = {}
    for path in (*alone.glob("*.pt"), *two.glob("*.pt")):
        case, processes, rank = path.stem.split("-")
        results[case, int(processes), int(rank)] = torch.load(path)
    return results


def by_hand(schedule_steps):
    """The same batches, all sub-batches of a step in one process; ``schedule_steps`` of the schedule after each."""
    model = Model()
    optimizer = make_optimizer(model)
    snr = SNRAdaptiveLR(optimizer, schedule=halving(optimizer) if schedule_steps else None)
    snr.attach(model)
    x, y = dataset().tensors
    lrs, factors = [], []
    for step in torch.arange(len(x)).view(STEPS, SUB_BATCHES, ROWS):
        for rows in step:
            ((model(x[rows]) - y[rows]).square().mean() / SUB_BATCHES).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        lrs.append(snr.get_last_lr()[0])
        factors.append(snr.factor)
        for _ in range(max(schedule_steps, 1)):
            snr.step()
        optimizer.zero_grad()
    return lrs, factors, model.state_dict()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_every_process_takes_the_steps_of_one_written_by_hand(found, case, processes):
    lrs, factors, weights = by_hand(schedule_steps=processes if case in ("prepared_too", "resumed") else 0)
    assert min(factors) < max(factors) < 1
    ranks = [found[case, processes, rank] for rank in range(processes)]
    if ranks[0] is None:
        return  # refused, which the case itself has seen; or not to be had here
    for of_rank in ranks:
        assert of_rank["lrs"] == pytest.approx(lrs, rel=1e-9)
        assert of_rank["factors"] == pytest.approx(factors, rel=1e-9)
        assert of_rank["metrics"]["observations"] == STEPS
        for name, value in weights.items():
            torch.testing.assert_close(of_rank["weights"][name], value, rtol=1e-9, atol=1e-12)


def test_resuming_from_save_state_is_bit_exact(found):
    for processes, rank in ((1, 0), (2, 0), (2, 1)):
        straight, resumed = (found[case, processes, rank] for case in ("prepared_too", "resumed"))
        assert straight["lrs"] == resumed["lrs"]
        assert all(torch.equal(straight["weights"][name], resumed["weights"][name]) for name in straight["weights"])


def test_an_attached_scheduler_says_so_where_others_write_the_lr():
    """Also where nobody calls its own step(), which looks for that too."""

    def steps(num, after=lambda optimizer: None):
        model = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        snr = SNRAdaptiveLR(optimizer)
        others = after(optimizer)
        snr.attach(model)
        for _ in range(num):
            for x in (1.0, 3.0):
                model(torch.tensor([[x]])).sum().backward()
            optimizer.step()
            if others is not None:
                others.step()
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"schedule=\.\.\."):
        steps(3, halving)
    with pytest.warns(UserWarning, match="checkpoint of the optimizer"):
        steps(3, lambda optimizer: optimizer.load_state_dict(halved(optimizer.state_dict())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(3)
        model = nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        snr = SNRAdaptiveLR(optimizer)
        snr.attach(model)
        warnings.filterwarnings("ignore", message="attach: at most one backward")
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

        get_optimizer_state_dict(model, optimizer)  # makes the state that is not there by a step with lr 0
        assert optimizer.param_groups[0]["lr"] == 0.1
        for _ in range(2):
            for x in (1.0, 3.0):
                model(torch.tensor([[x]])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["lr"] == 0.1 * snr.factor < 0.1


def halved(state):
    return state | {"param_groups": [group | {"lr": group["lr"] / 2} for group in state["param_groups"]]}
