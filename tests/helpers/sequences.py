"""Packed sequences and norms of theirs, as the tests of several ops and models compare them."""

from __future__ import annotations

import torch


def packed(lengths, device="cpu"):
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def assert_close(got, true, tolerance):
    """The relative error of each number; 0 where the truth is 0."""
    error = (got.double() - true).abs()
    assert (error <= tolerance * true).all(), (error / true).max()


def log_probs(model, ids):
    """``log pi`` of each row of ids, by a model that maps ids to logits."""
    return model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).sum((1, 2))


def true_squared_norms(model, ids):
    """Of what backward() computes of each log-probability, hooks included, by a graph of its own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    of_each = [torch.autograd.grad(x, parameters, retain_graph=True) for x in log_probs(model, ids)]
    return torch.stack([sum(g.square().sum() for g in gradients) for gradients in of_each])


def measured_squared_norms(model, norms, ids, alone):
    """By ``PerSampleGradNorms``: from a backward pass for the norms alone, or from that of training."""
    total = log_probs(model, ids).sum()
    with norms.sequences(batch_size=len(ids)):
        norms.backward(total) if alone else total.backward()
    return norms.squared()
