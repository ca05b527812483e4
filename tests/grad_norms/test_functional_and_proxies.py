"""Per-sample gradient norms against a loop of backward passes; the logit norm against float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from snr_kernels.logprob_stats import logprob_stats, logprob_stats_reference
from snr_optim import logit_grad_norms, per_sample_grad_norms_func


def qwen3(tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM._from_config(config, attn_implementation="eager").double()


def log_prob_sum(model, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return (logprob_stats(logits, ids[:, 1:]).log_prob * mask[:, 1:]).sum()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_norms_of_a_qwen3_equal_a_loop_over_samples(tied, chunk_size, float64):
    model = qwen3(tied)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    mask = torch.ones(5, 7, dtype=torch.long)
    mask[1, 4:] = 0
    batch = {"input_ids": torch.randint(11, (5, 7)), "attention_mask": mask}
    expected = []
    for i in range(5):
        model.zero_grad()
        log_prob_sum(model, {name: tensor[i : i + 1] for name, tensor in batch.items()}).backward()
        expected.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    norms = per_sample_grad_norms_func(model, log_prob_sum, batch, chunk_size=chunk_size)
    assert torch.allclose(norms, torch.stack(expected), rtol=1e-10, atol=0)  # float64, another summation order
    assert not norms.requires_grad


def test_dtype_and_empty_batch():
    model = nn.Linear(2, 1).bfloat16()
    x = torch.ones(3, 2, dtype=torch.bfloat16)
    norms = per_sample_grad_norms_func(model, lambda model, x: model(x).sum(), x)
    assert norms.dtype == torch.float32
    assert norms.tolist() == [3.0] * 3
    assert per_sample_grad_norms_func(model, lambda model, x: model(x).sum(), x[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("model", "batch", "options", "error", "names"),
    [
        (nn.Linear(2, 1), {"x": torch.ones(3, 2), "n": 4}, {}, TypeError, "batch"),
        (nn.Linear(2, 1), {"x": torch.ones(3, 2), "y": torch.ones(2)}, {}, ValueError, "batch"),
        (nn.Linear(2, 1), torch.tensor(1.0), {}, ValueError, "batch"),
        (nn.Linear(2, 1), [], {}, ValueError, "batch"),
        (nn.Linear(2, 1), torch.ones(3, 2), {"chunk_size": 0}, ValueError, "chunk_size"),
        (nn.Linear(2, 1).requires_grad_(False), torch.ones(3, 2), {}, ValueError, "model"),
        (nn.Linear(2, 1), torch.ones(3, 2), {}, ValueError, "loss_fn"),
    ],
)
def test_bad_input_is_named(model, batch, options, error, names):
    with pytest.raises(error, match=names):
        per_sample_grad_norms_func(model, lambda model, x: model(x), batch, **options)


def test_logit_norms_are_those_of_the_gradient_in_the_logits():
    logits, labels = 4 * torch.randn(3, 5, 1003), torch.randint(1003, (3, 5))
    temperature = torch.rand(3, 5) + 0.5
    norms = logit_grad_norms(logits.requires_grad_(), labels, temperature=temperature)
    true = logprob_stats_reference(logits, labels, temperature).grad_norm_squared
    assert torch.allclose(norms.double(), true, rtol=1e-5, atol=0)
    assert not norms.requires_grad


def test_masked_tokens_are_not_read():
    logits, labels = torch.randn(2, 3, 9), torch.randint(9, (2, 3))
    expected = logit_grad_norms(logits, labels)
    logits[1, 1:] = math.nan
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    for masked in (-100, 99):
        labels[1, 1:] = masked
        assert torch.equal(logit_grad_norms(logits, labels, mask), expected * mask)
        assert torch.equal(logit_grad_norms(logits, labels.clamp_min(0).to(torch.uint8), mask), expected * mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_labels_are_checked_under_a_mask_too(dtype):
    with pytest.raises(TypeError, match="labels"):
        logit_grad_norms(torch.ones(2, 3), torch.ones(2, dtype=dtype), mask=torch.ones(2))


def test_bad_mask_is_named():
    with pytest.raises(ValueError, match="mask"):
        logit_grad_norms(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), mask=torch.ones(3))
