"""Sketches of gradient norms: unbiased, as good as they say, the same for the same seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from snr_kernels.segments import Segments
from snr_optim import PerSampleGradNorms
from snr_optim.grad_norms.accumulate import FEWEST_COLUMNS, SketchedNorms, next_num_columns
from snr_optim.grad_norms.contributions import BiasContribution, MatrixContribution

T, B = 48, 3


class Tied(nn.Module):
    """Long sequences; an embedding tied to the head, a layer that is called twice, biases and a LayerNorm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.norm = nn.Embedding(31, 24), nn.Linear(24, 24), nn.LayerNorm(24)
        self.head = nn.Linear(24, 31, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)  # the smaller it is, the larger its gradient below the LayerNorm
        self.double()

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(2):
            x = x + self.block(x).tanh()
        return self.head(self.norm(x)).gather(-1, ids[..., None]).sum()


def sketched(model, ids, norms, size):
    norms.sketch_size = size
    with norms.sequences(batch_size=B):
        norms.backward(model(ids))
    return norms.squared(), norms.standard_error()


@pytest.fixture(scope="module")
def study():
    """Many sketches of one batch, and its exact norms."""
    model, ids = Tied(), torch.randint(5, (B, T), generator=torch.Generator().manual_seed(1))
    norms = PerSampleGradNorms(model, "sketch")
    found = [sketched(model, ids, norms, size=8) for _ in range(400)]
    exact = PerSampleGradNorms(model)
    with exact.sequences(batch_size=B):
        exact.backward(model(ids))
    return torch.stack([x for x, _ in found]), torch.stack([x for _, x in found]), exact.squared()


def test_unbiased(study):
    estimates, _, exact = study
    deviation = (estimates.mean(0) - exact) / (estimates.std(0) / len(estimates) ** 0.5)
    assert deviation.abs().max() < 4
    assert (estimates.std(0) / exact).min() > 0.01  # they are no exact norms in disguise
    untied = Tied()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    apart = PerSampleGradNorms(untied)
    with apart.sequences(batch_size=B):
        apart.backward(untied(torch.randint(5, (B, T), generator=torch.Generator().manual_seed(1))))
    missed = (apart.squared() - exact) / (estimates.std(0) / len(estimates) ** 0.5)
    assert missed.abs().max() > 8  # without the cross term of the tied weight the first line would see it


def test_its_error_is_the_one_it_reports(study):
    estimates, errors, _ = study
    ratio = errors.square().mean(0) / estimates.var(0)  # both unbiased; 400 draws of a variance scatter by 7 %
    assert ((ratio > 0.7) & (ratio < 1.4)).all()


def test_the_size_follows_the_wanted_error():
    model, ids = Tied(), torch.randint(5, (B, T), generator=torch.Generator().manual_seed(1))
    sizes = {}
    for wanted in (0.5, 0.25):
        norms = PerSampleGradNorms(model, "sketch", relative_error=wanted)
        for _ in range(8):
            with norms.sequences(batch_size=B):
                norms.backward(model(ids))
        sizes[wanted] = norms.sketch_size
    assert sizes[0.5] <= sizes[0.25]
    norms = PerSampleGradNorms(model, "sketch", relative_error=0.01)  # finer than worth it: exact
    for _ in range(3):
        with norms.sequences(batch_size=B):
            norms.backward(model(ids))
    assert norms.standard_error().max() == 0


def test_seeds():
    model, ids = Tied(), torch.randint(5, (B, T))
    one, same, other = (PerSampleGradNorms(model, "sketch", seed=seed) for seed in (0, 0, 1))
    first = [sketched(model, ids, norms, 8)[0] for norms in (one, same, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(sketched(model, ids, one, 8)[0], first[0])  # every block draws anew


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 9), st.integers(12, 30), st.booleans())
def test_mean_over_all_signs_is_the_norm(lengths, d_in, d_out, transposed):
    """Exactly, where the columns are orthogonal: ``sum_j ||M^T r_j||^2 = k ||M||^2`` for a Hadamard basis."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    segments = Segments.of(bounds)
    left, right = torch.randn(segments.rows, d_out).double(), torch.randn(segments.rows, d_in).double()
    weight = MatrixContribution(left, right, segments, (d_out, d_in), transposed)
    signs = torch.ones(1, 1)
    while len(signs) < d_out:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    squares = weight.sketch(signs[:d_out]).square().sum((1, 2)) / signs.shape[1]
    assert torch.allclose(squares, weight.squared(), rtol=1e-10)


def test_short_sequences_are_exact():
    """Gram matrices of ``T <= 2k`` tokens cost no more than ``k`` columns."""
    segments = Segments.uniform(2, 16, torch.device("cpu"))
    weight = MatrixContribution(torch.randn(32, 50), torch.randn(32, 40), segments, (50, 40))
    norms = SketchedNorms(2, torch.device("cpu"), 8, (0, 0))
    norms.add({"weight": "weight", "bias": "bias"}, {"weight": weight, "bias": BiasContribution(weight.left, segments)})
    squared, variances = norms.finish()
    assert variances is not None
    assert variances.max() == 0
    assert torch.allclose(squared, weight.squared() + BiasContribution(weight.left, segments).squared(), rtol=1e-5)


def test_next_num_columns_forgets_what_it_cannot_tell():
    nothing = torch.zeros(3)
    assert next_num_columns(16, nothing, nothing, 0.1) == 16  # no norm
    assert next_num_columns(16, torch.full((3,), torch.nan), torch.ones(3), 0.1) == 16
    assert next_num_columns(16, torch.ones(3), nothing, 0.1) == 16  # it was exact
    assert next_num_columns(FEWEST_COLUMNS, torch.ones(3), torch.full((3,), 1e-9), 0.1) == FEWEST_COLUMNS
    assert next_num_columns(16, torch.ones(3), torch.full((3,), 0.04), 0.1) in (32, 33)  # half the way to 64
