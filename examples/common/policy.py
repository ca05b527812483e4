"""The policy: a Qwen3 (or any causal LM), sampling from it, and the logits and log-probs of its samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from examples.common.arithmetic import Problem, character_tokenizer, worked_examples
from examples.common.runs import OnRow, stop_requested
from snr_optim import logit_grad_norms, logprob_stats

Policy = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Rollout = dict[str, Tensor]  # input_ids, attention_mask [B, prompt + T]; completion_mask [B, T]


def tiny_qwen3(seed: int) -> Policy:
    """The Qwen3 architecture (grouped queries, q/k-norm, tied embeddings) at 75 thousand parameters."""
    tokenizer = character_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=64, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager"), tokenizer


def local_model(path: str, device: str) -> Policy:
    """Any causal LM that Hugging Face's ``save_pretrained`` wrote to ``path``."""
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, attn_implementation="eager")
    return model.to(device), tokenizer


def warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int, on_row: OnRow
) -> bool:
    """Supervised training on solved problems, up to a middling pass rate; ``False`` if it was interrupted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=steps)
    for step in range(steps):
        texts = [
            text + tokenizer.eos_token for text in worked_examples(128, seed, step=-1 - step)
        ]  # RL starts at step 0
        encoded = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        loss = model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        on_row({"step": step, "loss": loss.item()})
        if stop_requested():
            return False
    return True


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[Problem],
    group_size: int,
    max_new_tokens: int,
) -> tuple[Rollout, list[str]]:
    """``group_size`` sampled outputs per problem, neighbours in the batch: the rollout, and the outputs as text."""
    prompts = tokenizer(
        [problem.prompt for problem in batch for _ in range(group_size)], padding=True, return_tensors="pt"
    )
    prompts = prompts.to(model.device)
    plain = GenerationConfig(  # not the model's own: its penalties and cut-offs would sample from another policy
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ids = model.generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], generation_config=plain
    )
    completions = ids[:, prompts["input_ids"].shape[1] :]
    ended = (completions == tokenizer.eos_token_id).cumsum(1)
    completion_mask = (ended == 0) | ((ended == 1) & (completions == tokenizer.eos_token_id))
    attention_mask = torch.cat([prompts["attention_mask"], completion_mask.long()], dim=1)
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return {"input_ids": ids, "attention_mask": attention_mask, "completion_mask": completion_mask}, texts


def completion_logits(model: Any, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Logits ``[B, T, V]`` that predict the sampled tokens, and those tokens ``[B, T]``."""
    num = rollout["completion_mask"].shape[1]
    position_ids = (rollout["attention_mask"].cumsum(1) - 1).clamp_min(0)
    out = model(
        input_ids=rollout["input_ids"], attention_mask=rollout["attention_mask"], position_ids=position_ids,
        logits_to_keep=num + 1, use_cache=False,
    )  # fmt: skip
    return out.logits[:, -num - 1 : -1], rollout["input_ids"][:, -num:]


def sequence_log_probs(model: Any, rollout: Rollout) -> Tensor:
    """``log pi(o_i | q)``, summed over the sampled tokens: ``[B]``."""
    log_probs = logprob_stats(*completion_logits(model, rollout)).log_prob
    return (log_probs * rollout["completion_mask"]).sum(1)


@torch.no_grad()
def logit_weights(model: Any, rollout: Rollout) -> Tensor:
    """Stand-ins for ``||grad log pi(o_i)||^2``, ``[B]``, from a forward pass of their own: norms at the logits."""
    logits, tokens = completion_logits(model, rollout)
    return logit_grad_norms(logits, tokens, rollout["completion_mask"]).sum(1)
