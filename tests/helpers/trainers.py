"""A tiny Qwen3 and its data for the trainers of other people, from configs alone: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 64


def tiny_qwen3(vocabulary=VOCABULARY):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True, use_cache=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def sequences(count, length=8, seed=0):
    """Language modelling: as many rows, the same each time."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(2, 12, (count, length), generator=generator)  # few words: much signal
    return [{"input_ids": row, "labels": row.clone()} for row in rows]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
