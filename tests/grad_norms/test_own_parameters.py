"""Parameters that no built-in rule covers: of blocks around other layers, of patched or tied heads, of experts."""

from __future__ import annotations

from functools import partial

import pytest
import sequences
import torch
from torch import nn
from torch.nn import functional as F

from snr_optim import PerSampleGradNorms
from snr_optim.grad_norms import by_autograd

WORDS, B, T = 11, 3, 4
IDS = torch.randint(WORDS, (B, T + 1), generator=torch.Generator().manual_seed(0))
RTOL = 1e-10  # float64, another order of summation


class Scaled(nn.Module):
    """LayerScale, or a scale of what the inner layer is given."""

    def __init__(self, first):
        super().__init__()
        self.gamma, self.inner, self.first = nn.Parameter(torch.randn(6)), nn.Linear(6, 6), first

    def forward(self, x):
        return x + (self.inner(self.gamma * x) if self.first else self.gamma * self.inner(x))


class Model(nn.Module):
    def __init__(self, block=None, positions=False, head=None, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.head = nn.Embedding(WORDS, 6), block or nn.Identity(), head or nn.Linear(6, WORDS)
        self.positions = nn.Parameter(torch.randn(T, 6)) if positions else None
        if tied:
            self.head.weight = self.embed.weight
        self.double()

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(self.block(h if self.positions is None else h + self.positions))


log_probs = partial(sequences.log_probs, ids=IDS)
truth = partial(sequences.true_squared_norms, ids=IDS)


def measured(model, norms, alone):
    return sequences.measured_squared_norms(model, norms, IDS, alone)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("make", "rules"),
    [
        (lambda: Model(Scaled(False)), {Scaled: by_autograd}),
        (lambda: Model(Scaled(True)), {Scaled: by_autograd}),
        (lambda: Model(nn.Sequential(Scaled(True), nn.Tanh(), Scaled(False))), {Scaled: by_autograd}),
        (lambda: Model(positions=True), {Model: by_autograd}),
        (lambda: Model(Scaled(True), positions=True, tied=True), {Scaled: by_autograd, Model: by_autograd}),
    ],
)
def test_parameters_of_what_is_around_other_layers(make, rules, alone):
    model = make()
    true, norms = truth(model), PerSampleGradNorms(model, rules=rules)
    for _ in range(2):
        torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)


class InFloat64(nn.Linear):
    """As heads that are cast to a higher precision."""

    def forward(self, x):
        return F.linear(x.double(), self.weight.double(), self.bias)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_a_subclass_of_linear_that_is_tied_to_the_embedding(tied, method, alone):
    model = Model(head=InFloat64(6, WORDS), tied=tied)
    true, norms = truth(model), PerSampleGradNorms(model, method, rules={InFloat64: by_autograd})
    torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_a_tied_weight_of_which_either_use_has_its_own_gradients(which, alone):
    class OtherEmbedding(nn.Embedding):
        def forward(self, ids):
            return F.embedding(ids, self.weight) * torch.linspace(1, 2, 6, dtype=torch.float64)

    model = Model(head=InFloat64(6, WORDS) if which != "embedding" else None)
    if which != "head":
        model.embed = OtherEmbedding(WORDS, 6).double()
    model.head.weight = model.embed.weight
    rules = {InFloat64: by_autograd, OtherEmbedding: by_autograd}
    true, norms = truth(model), PerSampleGradNorms(model, rules=rules)
    torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)


def test_sketches_of_a_tied_weight_beside_exact_gradients():
    """Wide enough to be sketched, were it not for the use that cannot be: the cross term must not get lost."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), InFloat64(64, 64, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(3, 40, 64, dtype=torch.float64)
    outputs = model(x).square().sum((1, 2))
    weight = model[0].weight
    true = torch.stack([torch.autograd.grad(y, weight, retain_graph=True)[0].square().sum() for y in outputs])
    norms = PerSampleGradNorms(model, "sketch", rules={InFloat64: by_autograd})
    norms.sketch_size = 4
    with norms.sequences(batch_size=3):
        norms.backward(model(x).square().sum())
    torch.testing.assert_close(norms.squared(), true, rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
def test_a_replaced_forward_is_refused_by_name_and_measured_by_autograd(alone):
    model = Model(tied=True)
    head = model.head
    head.forward = lambda x: F.linear(2 * x, head.weight, head.bias)
    with pytest.raises(ValueError, match=r"Linear at 'head', whose forward was replaced"):
        PerSampleGradNorms(model)
    true, norms = truth(model), PerSampleGradNorms(model, rules={nn.Linear: by_autograd})
    torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)


def test_a_forward_that_holds_its_parameters_itself_is_refused():
    model = Model()
    weight = model.head.weight
    model.head.forward = lambda x: F.linear(x, weight)
    norms = PerSampleGradNorms(model, rules={nn.Linear: by_autograd}, parameters=lambda name: name == "head.weight")
    with pytest.raises(RuntimeError, match="Linear does not read its parameters off the module"):
        measured(model, norms, alone=True)


# --------------------------------------------------------------------------------------------- experts and routers
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 6, 6))

    def forward(self, x, which):
        return torch.einsum("bti,bteij,bte->btj", x, self.up.expand(*x.shape[:2], 2, 6, 6), which)


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 6))

    def forward(self, x):
        scores = F.linear(x, self.weight)
        return scores, scores.softmax(-1)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.router = Experts(), Router()

    def forward(self, x):
        return x + self.experts(x, self.router(x)[1])


@pytest.mark.parametrize("alone", [True, False])
def test_experts_and_routers_are_refused_with_what_is_true(alone):
    model = Model(Mixture())
    with pytest.raises(ValueError, match=r"'block\.experts\.up' \(Experts, which takes x and which\).*routers do not"):
        PerSampleGradNorms(model)
    rules = {Experts: by_autograd, Router: by_autograd}
    with pytest.raises(RuntimeError, match=r"'block.experts' was called with more than its input.*parameters="):
        measured(model, PerSampleGradNorms(model, rules=rules, parameters=lambda name: "router" not in name), alone)
    for parameters in (lambda name: "router" in name, lambda name: "experts" not in name):
        norms = PerSampleGradNorms(model, rules=rules, parameters=parameters)
        with pytest.raises(RuntimeError, match=r"'block.router.weight'.*'block.router' returns a tuple"):
            measured(model, norms, alone)
        del norms
    rest = PerSampleGradNorms(model, parameters=lambda name: "block" not in name)  # what the message advises
    found = measured(model, rest, alone)
    model.block.requires_grad_(False)
    torch.testing.assert_close(found, truth(model), rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
def test_adapters_of_parameters_are_refused_with_what_is_true(alone):
    """As peft's target_parameters: the adapter's layers are never called, their weights are multiplied."""
    model = Model()
    model.adapter = nn.Linear(6, WORDS, bias=False).double()
    model.forward = lambda ids: F.linear(model.embed(ids), model.head.weight + model.adapter.weight, model.head.bias)
    norms = PerSampleGradNorms(model, parameters=lambda name: "adapter" in name)
    with pytest.raises(RuntimeError, match=r"'adapter\.weight'.*an adapter of parameters"):
        measured(model, norms, alone)


def test_a_loss_without_any_of_the_parameters():
    model = Model()
    norms = PerSampleGradNorms(model, parameters=lambda name: "head" in name)
    with pytest.raises(RuntimeError, match="depends on none"), norms.sequences(batch_size=B):
        norms.backward(model.embed(IDS).sum())
