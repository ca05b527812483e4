"""What each rank of the test of two processes runs: the same batches as one process, half as many micro-batches."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import test_integrations_transformers
import torch
import torch.distributed as dist
from test_integrations_transformers import ACCUMULATED, trained, weights
from trainers import tiny_qwen3
from transformers import Trainer

from snr_optim.integrations.transformers import SNRCallback


class Recording(SNRCallback):
    """Only the first rank logs."""

    def __init__(self):
        super().__init__()
        self.lrs = []

    def on_optimizer_step(self, *args, lr_scheduler, **kwargs):
        super().on_optimizer_step(*args, lr_scheduler=lr_scheduler, **kwargs)
        self.lrs.append(lr_scheduler.get_last_lr()[0])


class Sharding(Trainer):
    """A model that came sharded: what accelerate's FSDP2 ends in, which it does not do on CPUs."""

    is_distributed_loading_by_transformers = property(lambda self: True, lambda self, value: None)

    def _wrap_model(self, model, **kwargs):
        return model

    def _sync_replicated_trainable_parameters(self, model):
        pass

    @contextmanager
    def _defer_fsdp_gradient_reduction(self):
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)


def run(name, model):
    callback = Recording()
    trainer = trained(
        f"{sys.argv[1]}/{name}", callback, train_sampling_strategy="sequential", model=model, ddp_backend="gloo",
        gradient_accumulation_steps=ACCUMULATED // 2,
    )  # fmt: skip
    kinds = {kind.__name__ for kind in type(trainer.model_wrapped).__mro__}
    assert {"ddp": "DistributedDataParallel", "fsdp": "FSDPModule"}[name] in kinds
    found = callback.lrs, callback.metrics()["observations"], weights(trainer)
    torch.save(found, f"{sys.argv[1]}/{name}{dist.get_rank()}.pt")


if __name__ == "__main__":
    run("ddp", tiny_qwen3())
    if not torch.__version__.startswith("2.6"):  # whose fully_shard does not run on a CPU
        from torch.distributed.fsdp import fully_shard

        model = tiny_qwen3()
        for layer in model.model.layers:
            fully_shard(layer)
        test_integrations_transformers.Trainer = Sharding
        run("fsdp", fully_shard(model))
    dist.destroy_process_group()
