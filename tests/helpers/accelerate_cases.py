"""What each process of the tests of accelerate runs: ``[torchrun ...] accelerate_cases.py FOLDER``, all cases in turn.

Each case is a loop as accelerate's documentation has it. What it found, one file for each case and rank, is held to
one process that knows nothing of accelerate.
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from ranks import leave_together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from snr_optim import SNRAdaptiveLR

STEPS, SUB_BATCHES, ROWS = 4, 4, 3  # sub-batches of a step, over all processes; rows of each
LR = 0.1


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    def forward(self, x):
        return self.body(x)


def dataset(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps * SUB_BATCHES * ROWS, 5, dtype=torch.float64, generator=generator) + 1
    return TensorDataset(x, x[:, :3].sin())


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=LR)


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step / 2))


def whole(model):
    weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in weights.items()}


def make_accelerator(processes, **options):
    return Accelerator(cpu=True, gradient_accumulation_steps=SUB_BATCHES // processes, **options)


def make_loader():
    return DataLoader(dataset(), batch_size=ROWS)  # in order: each process takes every other batch


def loop(accelerator, model, optimizer, loader, snr, step_scheduler=lambda: None, clip=0.05):
    """The loop of accelerate's documentation; what every step was done with."""
    lrs, factors = [], []
    for x, y in loader:
        with accelerator.accumulate(model):
            accelerator.backward((model(x) - y).square().mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if accelerator.sync_gradients:
                lrs.append(snr.get_last_lr()[0])
                factors.append(snr.factor)
            step_scheduler()
            optimizer.zero_grad()
    return {"lrs": lrs, "factors": factors, "metrics": snr.metrics(), "weights": whole(model)}


# -- the cases: what they return is compared --------------------------------------------------------------------------


def built_after_prepare(processes, folder):
    accelerator, model = make_accelerator(processes), Model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), make_loader())
    snr = SNRAdaptiveLR(optimizer)
    snr.attach(model)
    return loop(accelerator, model, optimizer, loader, snr, snr.step)


def attached_alone(processes, folder):
    """Nobody calls the scheduler's step(): every batch sets the lr of its own step all the same."""
    accelerator, model = make_accelerator(processes), Model()
    model, optimizer, loader = accelerator.prepare(model, make_optimizer(model), make_loader())
    snr = SNRAdaptiveLR(optimizer)
    snr.attach(model)
    return loop(accelerator, model, optimizer, loader, snr)


def built_before_prepare(processes, folder):
    accelerator, model = make_accelerator(processes), Model()
    optimizer = make_optimizer(model)
    snr = SNRAdaptiveLR(optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    snr.attach(model)
    return loop(accelerator, model, optimizer, loader, snr, snr.step)


def prepared_too(processes, folder):
    """accelerate steps a prepared scheduler once for each process, and so the schedule in it, as it does with any."""
    accelerator, model = make_accelerator(processes), Model()
    optimizer = make_optimizer(model)
    snr = SNRAdaptiveLR(optimizer, schedule=halving(optimizer))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), snr)
    snr.attach(model)
    found = loop(accelerator, model, optimizer, loader, snr, scheduler.step)
    with pytest.raises(AttributeError, match="attach"):
        scheduler.attach(model)  # the wrapper has no such thing: keep the scheduler itself
    with pytest.raises(TypeError, match="AcceleratedScheduler"):
        SNRAdaptiveLR(optimizer, schedule=accelerator.prepare(halving(optimizer)))
    return found


def resumed(processes, folder):
    """``save_state`` after two steps, and a second accelerator that goes on from there."""
    for first in (True, False):
        accelerator, model = make_accelerator(processes), Model()
        optimizer = make_optimizer(model)
        snr = SNRAdaptiveLR(optimizer, schedule=halving(optimizer))
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, make_loader(), snr)
        snr.attach(model)
        done = 2 * SUB_BATCHES // processes
        if first:
            before = loop(accelerator, model, optimizer, list(islice(loader, done)), snr, scheduler.step)
            accelerator.save_state(str(folder / "checkpoint"))
        else:
            accelerator.load_state(str(folder / "checkpoint"))
            found = loop(
                accelerator, model, optimizer, accelerator.skip_first_batches(loader, done), snr, scheduler.step
            )
    return found | {name: before[name] + found[name] for name in ("lrs", "factors")}


def attached_too_early(processes, folder):
    """One process: nothing changes for the parameters. Several: refused, where hooks would see one rank's gradients."""
    accelerator, model = make_accelerator(processes), Model()
    optimizer = make_optimizer(model)
    snr = SNRAdaptiveLR(optimizer)
    if processes > 1:
        with pytest.raises(RuntimeError, match="Attach the wrapped model"):
            snr.attach(model)
        return None
    snr.attach(model)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    return loop(accelerator, model, optimizer, loader, snr, snr.step)


def fsdp2(processes, folder):
    """``fsdp_version=2``, which accelerate does on accelerators only: its own preparation, on CPUs."""
    if processes == 1 or torch.__version__.startswith("2.6"):
        return None
    accelerator, model = make_accelerator(processes), Model()
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, auto_wrap_policy="NO_WRAP"
    )
    optimizer = make_optimizer(model)
    snr = SNRAdaptiveLR(optimizer)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    assert "FSDPModule" in {kind.__name__ for kind in type(model).__mro__}
    snr.attach(model)
    return loop(accelerator, model, optimizer, loader, snr, snr.step)


CASES = [
    built_after_prepare, attached_alone, built_before_prepare, prepared_too, resumed, attached_too_early, fsdp2
]  # fmt: skip


def run_all(folder):
    """Leaves accelerate's global state as it was at first."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for case in CASES:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        found = case(processes, folder)
        torch.save(found, folder / f"{case.__name__}-{processes}-{rank}.pt")
    AcceleratorState._reset_state(reset_partial_state=processes == 1)
    GradientState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))
    leave_together()
