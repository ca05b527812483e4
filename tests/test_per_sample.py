"""Per-sample gradient norms against a loop of backward passes; the logit norm against float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from snr_optim import logit_grad_norms, per_sample_grad_norms_func
from snr_optim.kernels.logprob_stats import logprob_stats


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
def test_norms_of_a_qwen3_equal_a_loop_over_samples(tied, chunk_size):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_stats_equal_float64(dtype, temperature):
    logits, labels = (4 * torch.randn(3, 5, 1003)).to(dtype), torch.randint(1003, (3, 5))
    got, truth = logprob_stats(logits, labels, temperature), logprob_stats(logits.double(), labels, temperature)
    for value, true in zip(got, truth, strict=True):
        assert value.dtype == torch.float32
        assert torch.allclose(value.double(), true, rtol=1e-5, atol=1e-6)
    gradient = torch.func.grad(lambda x: torch.log_softmax(x, -1)[0, 0, labels[0, 0]])(logits.double() / temperature)
    assert truth.grad_norm_squared[0, 0].item() == pytest.approx(gradient.square().sum().item(), rel=1e-10)


@pytest.mark.parametrize("missing", [1.0, 1e-1, 1e-3, 1e-5, 1e-7])
def test_the_norm_never_cancels_on_peaked_rows(missing):
    """``1 - p_y`` spread over 1002 tokens; ``1 - 2 p + sum p^2`` in float32 is all rounding from 1e-4 down."""
    logits = torch.zeros(1, 1003)
    logits[0, 7] = math.log(1002 * (1 - missing) / missing) if missing < 1 else -30.0
    labels = torch.tensor([7])
    truth = logit_grad_norms(logits.double(), labels).item()
    assert logit_grad_norms(logits, labels).item() == pytest.approx(truth, rel=1e-5)


def test_impossible_tokens_and_masked_rows_are_harmless():
    logits = torch.randn(2, 3, 9)
    logits[..., 4:] = -math.inf
    labels = torch.tensor([[0, 1, 2], [3, 0, 0]])
    assert all(value.isfinite().all() for value in logprob_stats(logits, labels))
    expected = logit_grad_norms(logits, labels)
    logits[1, 1:] = math.nan
    labels[1, 1:] = -100
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    got = logit_grad_norms(logits, labels, mask)
    assert torch.equal(got, expected * mask)


def test_stats_are_differentiable():
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 4])
    assert torch.autograd.gradcheck(lambda x: tuple(logprob_stats(x, labels, 0.8)), logits)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature", "error", "names"),
    [
        (torch.ones(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long), 1.0, TypeError, "logits"),
        (torch.ones(2, 3), torch.zeros(2), 1.0, TypeError, "labels"),
        (torch.ones(2, 3), torch.zeros(3, dtype=torch.long), 1.0, ValueError, "labels"),
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.long), 0.0, ValueError, "temperature"),
        (torch.ones(2, 3), torch.zeros(2, dtype=torch.long), math.nan, ValueError, "temperature"),
        (torch.ones(2, 3), torch.full((2,), 3), 1.0, RuntimeError, "out of bounds"),
        (torch.ones(2, 3), torch.full((2,), -100), 1.0, RuntimeError, "out of bounds"),
    ],
)
def test_bad_logits_are_named(logits, labels, temperature, error, names):
    with pytest.raises(error, match=names):
        logprob_stats(logits, labels, temperature)


def test_bad_mask_is_named():
    with pytest.raises(ValueError, match="mask"):
        logit_grad_norms(torch.ones(2, 3), torch.zeros(2, dtype=torch.long), mask=torch.ones(3))
