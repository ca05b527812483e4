"""What each rank of the tests of two processes runs, all cases in one go: to start them is most of the time."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from ranks import leave_together
from trainers import tiny_qwen3
from transformers import Trainer
from transformers_runs import ACCUMULATED, trained, weights

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


def train(name, model, **options):
    """The same batches as one process, half as many micro-batches."""
    callback = Recording()
    trainer = trained(
        sys.argv[1], callback, train_sampling_strategy="sequential", model=model, ddp_backend="gloo",
        gradient_accumulation_steps=ACCUMULATED // 2,
        **options,
    )  # fmt: skip
    kinds = {kind.__name__ for kind in type(trainer.model_wrapped).__mro__}
    assert {"ddp": "DistributedDataParallel", "fsdp": "FSDPModule"}[name] in kinds
    found = callback.lrs, callback.metrics()["observations"], weights(trainer)
    torch.save(found, f"{sys.argv[1]}/{name}{dist.get_rank()}.pt")


def train_by_grpo():
    """Groups of four, and three rows in each micro-batch of each rank."""
    from trl_runs import GRPO, lengths, small_words, weights_of
    from trl_runs import trained as trained_by_trl

    callback = SNRCallback()
    trainer = trained_by_trl(
        GRPO, sys.argv[1], callbacks=[callback], max_steps=2, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, rewards=[small_words, lengths], ddp_backend="gloo",
    )  # fmt: skip
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    found = {
        "local": [(weights_of(batch, model), batch["advantages"]) for _, batch, _, model in trainer.watched],
        "rewards": [of_functions for _, _, of_functions, _ in trainer.watched],
        "log": list(trainer._logs["advantages"]),
        "metrics": callback.metrics(),
    }
    torch.save(found, f"{sys.argv[1]}/grpo{dist.get_rank()}.pt")


if __name__ == "__main__":
    train("ddp", tiny_qwen3())
    if importlib.util.find_spec("trl") is not None:
        train_by_grpo()
    if not torch.__version__.startswith("2.6"):  # whose fully_shard does not run on a CPU
        from torch.distributed.fsdp import fully_shard

        model = tiny_qwen3()
        for layer in model.model.layers:
            fully_shard(layer)
        train("fsdp", fully_shard(model), kind=Sharding)
    leave_together()
