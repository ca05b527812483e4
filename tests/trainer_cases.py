"""What each rank of the test of two processes runs: the same batches as one process, half as many micro-batches."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from test_integrations_transformers import ACCUMULATED, trained, weights

from snr_optim.integrations.transformers import SNRCallback

if __name__ == "__main__":
    callback, lrs = SNRCallback(), []
    step = callback.on_step_end

    def on_step_end(*args, **kwargs):
        lrs.append(callback.scheduler.get_last_lr()[0])
        step(*args, **kwargs)

    callback.on_step_end = on_step_end
    trainer = trained(
        sys.argv[1], callback, train_sampling_strategy="sequential", gradient_accumulation_steps=ACCUMULATED // 2,
        ddp_backend="gloo",
    )  # fmt: skip
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save((lrs, callback.metrics()["observations"], weights(trainer)), f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
