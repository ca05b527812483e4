"""Runs of TRL's GRPO and RLOO trainers with our mixin on a tiny Qwen3, which keep all that they generated."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import tiny_qwen3
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from snr_optim import logit_grad_norms
from snr_optim.integrations.trl import OBLRTrainerMixin

NUM_GENERATIONS, ROWS, ACCUMULATED = 4, 8, 2


SETTINGS = {
    "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": ACCUMULATED, "num_generations": NUM_GENERATIONS,
    "max_completion_length": 6, "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
    "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "report_to": "none",
    "disable_tqdm": True, "gradient_checkpointing": False, "num_generations_eval": 2, "per_device_eval_batch_size": 8,
}  # fmt: skip


UNBIASED = {"beta": 0.0, "disable_dropout": True, "max_grad_norm": 0.0}


GRPO_UNBIASED = UNBIASED | {"loss_type": "luspo", "scale_rewards": "none"}


class GRPO(OBLRTrainerMixin, GRPOTrainer):
    pass


class RLOO(OBLRTrainerMixin, RLOOTrainer):
    pass


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 64)}
    words = Tokenizer(models.WordLevel(words, unk_token="w2"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="w2")


def small_words(completion_ids, **kwargs):
    """None, not scored, where the first word is one of seven; otherwise the share of words below 20."""
    return [None if ids[0] % 9 == 3 else sum(i < 20 for i in ids) / len(ids) for ids in completion_ids]


def lengths(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


class Watch:
    """Keeps every generated batch, and the rewards of which its advantages are made."""

    def __init__(self, *args, **kwargs):
        self.watched = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        training = self.model.training
        batch = super()._generate_and_score_completions(inputs)
        model = tiny_qwen3()
        model.load_state_dict(self.model.state_dict())
        rewards = getattr(self, "_rewards_per_func", torch.zeros(0))
        self.watched.append((training, batch, rewards.clone(), model.eval()))
        return batch


def trained(kind, tmp_path, resume=None, baseline=None, callbacks=None, rewards=(small_words, lengths), **settings):
    watching = type("Watching", (Watch, kind), {})
    config = RLOOConfig if issubclass(kind, RLOOTrainer) else GRPOConfig
    unbiased = UNBIASED | {"normalize_advantages": False} if config is RLOOConfig else GRPO_UNBIASED
    args = config(output_dir=str(tmp_path), **SETTINGS | unbiased | {"reward_weights": [1.0, 0.1]} | settings)
    prompts = [{"prompt": f"w{2 + i} w{3 + i} w{4 + i}"[: 2 if i % 2 else None] or "w2"} for i in range(24)]
    trainer = watching(
        tiny_qwen3(), list(rewards), args, train_dataset=dataset(prompts), eval_dataset=dataset(prompts[:4]),
        processing_class=tokenizer(), callbacks=callbacks, **({} if baseline is None else {"baseline": baseline}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def dataset(rows):
    return Dataset.from_list(rows)


def weights_of(batch, model, temperature=1.0, chosen=None):
    """From the logits of the whole, one row after the other; of the tokens that the policy has chosen."""
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
    chosen = batch["completion_mask"] if chosen is None else chosen
    said = torch.cat([torch.zeros_like(batch["prompt_mask"]), chosen], dim=1)
    return logit_grad_norms(logits[:, :-1], ids[:, 1:], said[:, 1:], temperature).sum(1)
