"""Small language models of the architectures that people train, and batches for them, padded and packed."""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from snr_kernels.logprob_stats import logprob_stats

VOCABULARY = 23
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=True),
    "qwen3-untied": lambda: Qwen3Config(**SHAPE, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),  # biases of query, key and value
    "llama": lambda: LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    "gemma": lambda: GemmaConfig(**SHAPE, tie_word_embeddings=True),
    "gemma3": lambda: Gemma3TextConfig(**SHAPE, tie_word_embeddings=True, sliding_window=64),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    ),
}  # fmt: skip


SCALED = {  # their logits are not just those of the head
    "gemma2": lambda: Gemma2Config(**SHAPE, final_logit_softcapping=3.0, sliding_window=64),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=3.0),
}


def language_model(name):
    torch.manual_seed(0)
    config = (CONFIGS | SCALED)[name.removeprefix("lora-")]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if name.startswith("lora-"):
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"]))
    with torch.no_grad():  # as if trained: norms and biases start at one and zero, lora_B at zero
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Float64Torch:
    """The module ``torch`` for the code of a model: float64 where that code names float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextmanager
def float64_throughout():
    """The models compute in float64 all that they are asked for in float64.

    Otherwise their norms, rotary embeddings and softmax attention go through float32. How those sums and cosines are
    rounded depends on the length of the rows, on where in a tensor a number stands and on the vector unit, so that a
    packed and a padded batch would agree to ten digits on some machines and to six on others.
    """
    kinds = [MODEL_FOR_CAUSAL_LM_MAPPING[type(make())] for make in (CONFIGS | SCALED).values()]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        for code in {sys.modules[kind.__module__] for kind in kinds}:
            patches.enter_context(mock.patch.object(code, "torch", Float64Torch()))
        yield


def padded_batch(lengths, seed=0):
    """Right-padded; the first two tokens are the prompt."""
    torch.manual_seed(seed)
    ids = torch.randint(VOCABULARY, (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(max(lengths)).expand_as(ids)}


def log_prob_sum(model, batch):
    logits = model(**batch, use_cache=False).logits[:, :-1]
    mask = batch["attention_mask"][:, 1:].clone()
    mask[:, :1] = 0
    return (logprob_stats(logits, batch["input_ids"][:, 1:]).log_prob * mask).sum()


def packed(batch):
    """The same sequences one after another, with a mask that keeps them apart; labels -100 where none is predicted."""
    lengths = batch["attention_mask"].sum(1).tolist()
    ids = torch.cat([row[:n] for row, n in zip(batch["input_ids"], lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & (torch.arange(len(owner))[:, None] >= torch.arange(len(owner)))
    labels = ids.roll(-1, 1)
    last = torch.tensor(lengths).cumsum(0) - 1
    labels[0, last] = -100
    labels[positions < 1] = -100
    cu_seqlens = torch.tensor([0, *(last + 1).tolist()])
    return {"input_ids": ids, "position_ids": positions}, allowed[None, None], labels, cu_seqlens


def packed_log_prob_sum(model, inputs, allowed, labels):
    dtype = next(p.dtype for p in model.parameters())
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    logits = model(**inputs, attention_mask=mask, use_cache=False).logits
    return logprob_stats(logits, labels).log_prob.sum()
