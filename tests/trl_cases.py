"""What each rank of the test of two processes runs: GRPO with groups that are split over them."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from test_integrations_trl import GRPO, lengths, small_words, trained, weights_of

from snr_optim.integrations.transformers import SNRCallback

if __name__ == "__main__":
    callback = SNRCallback()
    trainer = trained(
        GRPO, sys.argv[1], callbacks=[callback], max_steps=2, per_device_train_batch_size=3,
        gradient_accumulation_steps=2, rewards=[small_words, lengths], ddp_backend="gloo",
    )  # fmt: skip
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    local = [(weights_of(batch, model), batch["advantages"]) for _, batch, _, model in trainer.watched]
    rewards = [
        torch.where(x.isnan().all(1), torch.nan, x.nan_to_num() @ torch.tensor([1.0, 0.1]))
        for _, _, x, _ in trainer.watched
    ]
    log = list(trainer._logs["advantages"])
    found = {"local": local, "rewards": rewards, "log": log, "metrics": callback.metrics()}
    torch.save(found, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    dist.destroy_process_group()
