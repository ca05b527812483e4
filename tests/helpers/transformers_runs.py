"""Runs of the transformers Trainer on a tiny Qwen3, short and always the same."""

from __future__ import annotations

import torch
from trainers import collate, sequences, tiny_qwen3
from transformers import Trainer, TrainingArguments

STEPS, ACCUMULATED = 4, 4


SETTINGS = {
    "per_device_train_batch_size": 4, "gradient_accumulation_steps": ACCUMULATED, "max_steps": STEPS,
    "learning_rate": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 1, "optim": "sgd", "max_grad_norm": 0.05,
    "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
    "dataloader_drop_last": True,
}  # fmt: skip


def trained(tmp_path, *callbacks, resume=None, model=None, optimizers=(None, None), kind=Trainer, **settings):
    batches = []

    def kept(rows):
        batches.append(collate(rows))
        return batches[-1]

    args = TrainingArguments(output_dir=str(tmp_path), **SETTINGS | settings)
    data = sequences(ACCUMULATED * 4 * STEPS)
    model = model or tiny_qwen3()
    trainer = kind(
        model, args, train_dataset=data, eval_dataset=data[:4], data_collator=kept, callbacks=list(callbacks),
        optimizers=optimizers,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.batches = batches
    return trainer


def logged(trainer, name="learning_rate"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])
