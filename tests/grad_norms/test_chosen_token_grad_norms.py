"""The weights that are left where a trainer hands over the chosen tokens' log-probs, against those from logits."""

from __future__ import annotations

import pytest
import torch

from snr_optim import logit_grad_norms
from snr_optim.grad_norms.proxies import chosen_token_grad_norms


def drawn(logits):
    """A token of each row, and its log-prob with all digits: ``-log1p`` of the odds of the others."""
    chosen = torch.distributions.Categorical(logits=logits).sample()[..., None]
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, False)
    odds = torch.where(others, logits - logits.gather(-1, chosen), -torch.inf).exp().sum(-1)
    return chosen.squeeze(-1), -odds.log1p()


@pytest.mark.parametrize("words", [2, 3, 1000])
@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0, 100.0])  # from uniform to certain
def test_the_weight_from_logits_lies_between_the_bound_and_twice_the_bound(words, scale):
    logits = scale * torch.randn(500, words, dtype=torch.float64)
    chosen, log_probs = drawn(logits)
    exact, bound = logit_grad_norms(logits, chosen), chosen_token_grad_norms(log_probs)
    assert (bound <= exact * (1 + 1e-12) + 1e-300).all()
    assert (exact <= 2 * bound * (1 + 1e-12) + 1e-300).all()


def test_the_bounds_are_reached():
    """From above with one other word, from below with many."""
    for words, ratio in ((2, 2.0), (100_001, 1 + 1e-5)):
        logits, chosen = torch.zeros(1, words, dtype=torch.float64), torch.tensor([0])
        bound = chosen_token_grad_norms(logits.log_softmax(-1)[:, 0])
        torch.testing.assert_close(logit_grad_norms(logits, chosen), ratio * bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_confident_tokens_keep_the_digits_of_their_log_prob(dtype):
    log_probs = -torch.tensor([1e-3, 1e-6, 1e-7], dtype=dtype)  # float16 has no smaller ones
    found = chosen_token_grad_norms(log_probs)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), (1 - log_probs.double().exp()).square(), rtol=1e-5, atol=0)


def test_tokens_outside_of_the_mask_and_positive_log_probs_weigh_nothing():
    log_probs = torch.tensor([1e-3, -torch.inf, torch.nan, -torch.inf], requires_grad=True)
    found = chosen_token_grad_norms(log_probs, mask=torch.tensor([1, 1, 0, 0]))
    assert found.tolist() == [0, 1, 0, 0]
    assert not found.requires_grad


def test_what_is_no_log_prob_is_refused_by_name():
    with pytest.raises(TypeError, match=r"log_probs: expected a floating-point tensor, got torch\.int64"):
        chosen_token_grad_norms(torch.tensor([1]))
    with pytest.raises(TypeError, match=r"log_probs: .* got list"):
        chosen_token_grad_norms([0.5])
    with pytest.raises(ValueError, match=r"mask: expected the shape of log_probs, \[2\], got \[1\]"):
        chosen_token_grad_norms(torch.zeros(2), torch.zeros(1))
