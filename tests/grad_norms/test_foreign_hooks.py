"""PerSampleGradNorms beside hooks of others, which change what a layer is given, returns, or gets as gradient."""

from __future__ import annotations

from functools import partial

import pytest
import sequences
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_backward_hook,
    register_module_forward_hook,
    register_module_full_backward_pre_hook,
)
from torch.utils.checkpoint import checkpoint

from snr_optim import PerSampleGradNorms

WORDS, B = 11, 3
IDS = torch.randint(WORDS, (B, 5), generator=torch.Generator().manual_seed(0))
RTOL = 1e-10  # float64, another order of summation


class Model(nn.Module):
    """An embedding, two layers, an RMSNorm and a head; ``change(name, tensor)`` may hook what comes between."""

    def __init__(self, change=lambda name, tensor: None, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(WORDS, 6), nn.RMSNorm(6), nn.Linear(6, WORDS)
        self.block = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6))
        self.change, self.use_reentrant = change, use_reentrant
        self.double()

    def middle(self, h):
        inner = self.block(h)
        self.change("block", inner)
        return self.norm(h + inner.tanh())

    def forward(self, ids):
        h = self.embed(ids)
        self.change("embed", h)
        reentrant = self.use_reentrant
        h = self.middle(h) if reentrant is None else checkpoint(self.middle, h, use_reentrant=reentrant)
        logits = self.head(h)
        self.change("head", logits)
        return logits


log_probs = partial(sequences.log_probs, ids=IDS)
truth = partial(sequences.true_squared_norms, ids=IDS)


def measured(model, norms, alone):
    return sequences.measured_squared_norms(model, norms, IDS, alone)


def divide(module, args, output):
    return output / 2


def divide_in_place(module, args, output):
    output.div_(2)


def divide_seen_keywords(module, args, kwargs, output):
    return output.clone() / 3


def double_the_input(module, args):
    return tuple(2 * x if x.is_floating_point() else x.flip(1) for x in args)


def halve_gradient_of(module, args, output):
    output.register_hook(lambda gradient: gradient / 2)


FORWARD = {
    "divided": lambda module: module.register_forward_hook(divide),
    "divided in place": lambda module: module.register_forward_hook(divide_in_place),
    "with keywords": lambda module: module.register_forward_hook(divide_seen_keywords, with_kwargs=True),
    "twice": lambda module: [module.register_forward_hook(divide), module.register_forward_hook(divide)],
    "its input doubled": lambda module: module.register_forward_pre_hook(double_the_input),
    "its gradient halved": lambda module: module.register_forward_hook(halve_gradient_of),
    "grad_output halved": lambda module: module.register_full_backward_pre_hook(lambda m, gs: (gs[0] / 2,)),
}
LAYERS = {
    "embed": lambda model: model.embed, "linear": lambda model: model.block[0], "biased": lambda model: model.block[1],
    "norm": lambda model: model.norm, "head": lambda model: model.head, "container": lambda model: model.block,
    "model": lambda model: model,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Full backward hook")  # of a layer that is given ids
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("hook", FORWARD)
@pytest.mark.parametrize("layer", LAYERS)
def test_hooks_of_modules_are_part_of_the_model(layer, hook, when, alone):
    model = Model()
    if when == "before":
        FORWARD[hook](LAYERS[layer](model))
    norms = PerSampleGradNorms(model)
    if when == "after":
        FORWARD[hook](LAYERS[layer](model))
    found = measured(model, norms, alone)
    norms.remove()
    torch.testing.assert_close(found, truth(model), rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
def test_full_backward_hooks_that_change_what_goes_on(alone):
    model = Model()
    norms = PerSampleGradNorms(model)
    model.head.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    found = measured(model, norms, alone)
    norms.remove()
    torch.testing.assert_close(found, truth(model), rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("where", ["embed", "block", "head"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_hooks_of_tensors_are_part_of_the_gradient(where, use_reentrant, alone):
    """At the lowest layer (the embedding), at the first that a gradient comes to (the head), and between."""

    def change(name, tensor):
        if name == where and tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient / 2)
            tensor.register_hook(lambda gradient: gradient * gradient.new_tensor([1.0, 2.0, 3.0])[:, None, None])

    if alone and use_reentrant:
        pytest.skip("norms alone do not get through reentrant checkpoints")
    model, true = Model(change, use_reentrant), truth(Model(change))
    norms = PerSampleGradNorms(model)
    for _ in range(2):
        torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)


def test_hooks_of_tensors_on_a_graph_that_is_used_twice():
    model = Model(lambda name, tensor: tensor.register_hook(lambda gradient: gradient / 2))
    true, norms = truth(model), PerSampleGradNorms(model)
    total = log_probs(model).sum()
    with norms.sequences(batch_size=B):
        total.backward(retain_graph=True)
    torch.testing.assert_close(norms.squared(), true, rtol=RTOL, atol=0.0)
    with norms.sequences(batch_size=B):
        norms.backward(total, retain_graph=True)
    torch.testing.assert_close(norms.squared(), true, rtol=RTOL, atol=0.0)
    with norms.sequences(batch_size=B):
        total.backward()
    torch.testing.assert_close(norms.squared(), true, rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
def test_two_objects_and_the_hooks_of_others(alone):
    """Each wants to come first in the forward pass and last in the backward pass; neither changes a thing."""
    model = Model(lambda name, tensor: tensor.register_hook(lambda gradient: gradient / 2))
    model.head.register_forward_hook(divide)
    true = truth(model)
    first, second = PerSampleGradNorms(model), PerSampleGradNorms(model, parameters=lambda name: "head" not in name)
    head = PerSampleGradNorms(model, parameters=lambda name: "head" in name)
    total = log_probs(model).sum()
    if alone:
        for norms in (first, second, head):
            with norms.sequences(batch_size=B):
                norms.backward(total, retain_graph=True)
    else:
        with first.sequences(batch_size=B), second.sequences(batch_size=B), head.sequences(batch_size=B):
            total.backward()
    torch.testing.assert_close(first.squared(), true, rtol=RTOL, atol=0.0)
    torch.testing.assert_close(second.squared() + head.squared(), true, rtol=RTOL, atol=0.0)


# ---------------------------------------------------------------------------------- hooks that get in before ours
@pytest.mark.parametrize("change", [divide, divide_in_place])
def test_a_hook_that_is_put_before_ours_is_refused_once(change):
    model = Model()
    for alone in (True, False):
        norms = PerSampleGradNorms(model)
        model.head.register_forward_hook(change, prepend=True)
        with pytest.raises(RuntimeError, match=rf"'head': forward hooks that ran before.*{change.__name__}.*made or"):
            measured(model, norms, alone)
        found = measured(model, norms, alone)  # ours has moved before it
        torch.testing.assert_close(found, truth(model), rtol=RTOL, atol=0.0)


@pytest.mark.parametrize("alone", [True, False])
def test_hooks_before_ours_that_only_look_are_no_harm(alone):
    model, seen = Model(), []
    true, norms = truth(model), PerSampleGradNorms(model)
    model.head.register_forward_hook(lambda module, args, output: seen.append(module), prepend=True)
    handle = register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        torch.testing.assert_close(measured(model, norms, alone), true, rtol=RTOL, atol=0.0)
    finally:
        handle.remove()
    assert model.head in seen


@pytest.mark.parametrize("alone", [True, False])
def test_hooks_of_all_modules_that_change_outputs_are_refused(alone):
    model = Model()
    norms = PerSampleGradNorms(model)
    handle = register_module_forward_hook(lambda module, args, output: output * 2 if module is model.norm else None)
    try:
        with pytest.raises(RuntimeError, match=r"'norm': forward hooks that ran before ours.*<lambda>"):
            measured(model, norms, alone)
    finally:
        handle.remove()


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_full_backward_hooks_of_all_modules():
    model = Model()
    norms = PerSampleGradNorms(model)
    handle = register_module_full_backward_pre_hook(lambda module, gs: (gs[0] / 2,) if module is model.head else None)
    try:
        found = measured(model, norms, alone=True)
        norms.remove()
        torch.testing.assert_close(found, truth(model), rtol=RTOL, atol=0.0)
    finally:
        handle.remove()


@pytest.mark.parametrize("everywhere", [False, True])
def test_backward_hooks_of_the_old_kind_are_refused(everywhere):
    """They are handed the gradients of the parameters, too, and may change them."""
    model = Model()
    norms = PerSampleGradNorms(model)
    hook = lambda module, inputs, outputs: None  # noqa: E731
    handle = register_module_backward_hook(hook) if everywhere else model.block[1].register_backward_hook(hook)
    try:
        with pytest.raises(RuntimeError, match=r"use register_(module_)?full_backward_hook"):
            measured(model, norms, alone=True)
    finally:
        handle.remove()
        torch.nn.modules.module._global_is_full_backward_hook = None
    assert measured(model, norms, alone=True).shape == (B,)


def test_a_hook_of_a_parameter_is_found_by_the_gradients():
    """Norms are of what comes to a parameter; a mask of rows, say, is not seen in a pass that computes no gradient."""
    model = Model()
    model.head.weight.register_hook(lambda gradient: gradient * (torch.arange(WORDS) > 5)[:, None])
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match=r"'head\.weight'.*does a hook of the parameter change it"):
        measured(model, norms, alone=False)


def test_a_hook_of_a_node_is_found_by_the_gradients():
    """Nodes do not tell their hooks, so `norms.backward`, which does not run those of the lowest layers, cannot ask."""
    halve = lambda gradients: tuple(g / 2 for g in gradients)  # noqa: E731
    model = Model(lambda name, tensor: tensor.grad_fn.register_prehook(halve) if name == "embed" else None)
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match=r"'embed\.weight': its gradient.*differs"):
        measured(model, norms, alone=False)


# ------------------------------------------------------------------------------- what wrappers and adapters hook
@pytest.mark.parametrize("alone", [True, False])
def test_adapters_on_hooked_layers(alone):
    from language_models import language_model, log_prob_sum, padded_batch
    from peft import LoraConfig, get_peft_model

    model = language_model("qwen3-untied").double()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 3)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    model.enable_input_require_grads()
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(divide)
    batch = padded_batch((7, 3, 6))
    trained = [p for p in model.parameters() if p.requires_grad]
    true = []
    for b in range(3):
        of_one = log_prob_sum(model, {name: value[b : b + 1] for name, value in batch.items()})
        true.append(sum(g.square().sum() for g in torch.autograd.grad(of_one, trained)))
    norms = PerSampleGradNorms(model)
    total = log_prob_sum(model, batch)
    with norms.sequences(batch_size=3):
        norms.backward(total) if alone else total.backward()
    torch.testing.assert_close(norms.squared(), torch.stack(true), rtol=1e-6, atol=0.0)  # norms compute in float32


def test_observers_of_all_modules_do_not_make_layers_run_twice(monkeypatch):
    """As profilers observe them: they would count double."""
    model, calls = Model(), []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: (calls.append(1), linear(*args))[1])
    norms = PerSampleGradNorms(model)
    with_hook = register_module_forward_hook(lambda module, args, output: None)
    try:
        log_probs(model)  # the first call is compared
        calls.clear()
        log_probs(model)
        assert len(calls) == 3
        with norms.sequences(batch_size=B):
            norms.backward(log_probs(model).sum())
    finally:
        with_hook.remove()
    assert torch.allclose(norms.squared(), truth(model), rtol=RTOL)
