"""PerSampleGradNorms against torch.func: every architecture, layout and kind of training step that it says it takes."""

from __future__ import annotations

import pytest
import torch
from language_models import CONFIGS, language_model, log_prob_sum, packed, packed_log_prob_sum, padded_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from snr_optim import PerSampleGradNorms, per_sample_grad_norms_func

LENGTHS = (7, 3, 6, 4, 9)
MODELS = [*CONFIGS, "lora-qwen3"]


def relative_error(norms, true):
    return float(((norms.double() - true) / true).abs().max())


def truth(model, batch):
    return per_sample_grad_norms_func(model, log_prob_sum, batch)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measured(model, loss, method="exact", **sequences):
    """Norms of the training backward of ``loss(model)``."""
    norms = PerSampleGradNorms(model, method)
    with norms.sequences(**sequences):
        loss(model).backward()
    norms.remove()
    return norms.squared()


class Float32Seen(TorchDispatchMode):
    """The operations that have returned a tensor in float32."""

    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float32 for x in tree_leaves(found)):
            self.operations.add(str(operation))
        return found


@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_tests_in_float64_are_float64_throughout(name, float64):
    """Without this, bounds of 1e-10 hold on some machines only."""
    model, batch = language_model(name).double(), padded_batch(LENGTHS)
    inputs, allowed, labels, _ = packed(batch)
    with Float32Seen() as seen:
        log_prob_sum(model, batch).backward()
        packed_log_prob_sum(model, inputs, allowed, labels).backward()
    assert not seen.operations


@pytest.mark.parametrize("name", MODELS)
def test_padded_norms_are_those_of_torch_func(name, float64):
    model, batch = language_model(name).double(), padded_batch(LENGTHS)
    log_prob_sum(model, batch).backward()
    plain = gradients(model)
    model.zero_grad()
    norms = PerSampleGradNorms(model)
    loss = log_prob_sum(model, batch)
    with norms.sequences(batch_size=len(LENGTHS)):
        loss.backward()
    assert relative_error(norms.squared(), truth(model, batch)) <= 1e-10
    assert all(torch.equal(gradient, plain[key]) for key, gradient in gradients(model).items())


@pytest.mark.parametrize("name", MODELS)
def test_packed_norms_are_those_of_torch_func(name, float64):
    model, batch = language_model(name).double(), padded_batch(LENGTHS)
    inputs, allowed, labels, cu_seqlens = packed(batch)
    norms = PerSampleGradNorms(model)
    with norms.sequences(cu_seqlens=cu_seqlens):
        packed_log_prob_sum(model, inputs, allowed, labels).backward()
    assert relative_error(norms.squared(), truth(model, batch)) <= 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_float32(name):
    model, batch = language_model(name), padded_batch(LENGTHS)
    norms = measured(model, lambda model: log_prob_sum(model, batch), batch_size=len(LENGTHS))
    assert norms.dtype == torch.float32
    assert relative_error(norms, truth(model.double(), batch)) <= 1e-4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_no_worse_than_twice_a_loop(name, autocast):
    """The root mean square over the sequences of both errors against float64 norms of the same weights."""
    model, batch = language_model(name), padded_batch(LENGTHS)
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loop = []
        for i in range(len(LENGTHS)):
            model.zero_grad()
            log_prob_sum(model, {key: value[i : i + 1] for key, value in batch.items()}).backward()
            loop.append(sum(gradient.double().square().sum() for gradient in gradients(model).values()))
        norms = measured(model, lambda model: log_prob_sum(model, batch), batch_size=len(LENGTHS))
    true = truth(model.double(), batch)
    ours, theirs = ((x.double() / true - 1).square().mean().sqrt() for x in (norms, torch.stack(loop)))
    assert ours <= 2 * theirs + 1e-3
