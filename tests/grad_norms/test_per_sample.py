"""PerSampleGradNorms in the kinds of training step that there are, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref

import pytest
import torch
from language_models import language_model, log_prob_sum, packed, packed_log_prob_sum, padded_batch
from torch import nn
from torch.utils.checkpoint import checkpoint

from snr_optim import GradientMoments, PerSampleGradNorms, per_sample_grad_norms_func
from snr_optim.grad_norms import by_autograd

LENGTHS = (7, 3, 6, 4, 9, 5)
B = len(LENGTHS)


class Small(nn.Module):
    """Inputs ``[B, T, 5]`` to one number per token, by as many calls of one block as wished."""

    def __init__(self, calls=1, use_reentrant=None, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.norm = norm or nn.LayerNorm(6)
        self.calls, self.use_reentrant = calls, use_reentrant
        self.double()

    def middle(self, x):
        for _ in range(self.calls):
            x = x + self.block(self.norm(x)).tanh()
        return x

    def forward(self, x):
        x = self.first(x)
        reentrant = self.use_reentrant
        return self.head(self.middle(x) if reentrant is None else checkpoint(self.middle, x, use_reentrant=reentrant))


def inputs(seed=0):
    return torch.randn(B, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(model, x):
    return model(x).sin().sum()


def truth(model, x=None):
    """By a loop, so that it also works where torch.func does not."""
    norms = []
    for sample in (inputs() if x is None else x).split(1):
        found = torch.autograd.grad(
            loss_of(model, sample), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        norms.append(sum(g.square().sum() for g in found if g is not None))
    return torch.stack(norms)


def test_a_step_reads_as_it_does_in_the_contract():
    model = Small()
    norms = PerSampleGradNorms(model)
    log_prob_sum = loss_of(model, inputs())
    with norms.sequences(batch_size=B):
        log_prob_sum.backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)
    with norms.sequences(batch_size=B):  # forward within the block
        loss_of(model, inputs(1)).backward()
    assert torch.allclose(norms.squared(), truth(model, inputs(1)), rtol=1e-12)


# -------------------------------------------------------------------------------------------- kinds of training step
@pytest.mark.parametrize("calls", [1, 3])
def test_modules_called_several_times(calls):
    model = Small(calls)
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


@pytest.mark.parametrize(("use_reentrant", "calls"), [(False, 1), (False, 3), (True, 1)])
def test_checkpointing(use_reentrant, calls):
    model = Small(calls, use_reentrant)
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(Small(calls)), rtol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_language_model(use_reentrant, float64):
    model, batch = language_model("qwen3").double(), padded_batch(LENGTHS)
    true = per_sample_grad_norms_func(model, log_prob_sum, batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        log_prob_sum(model, batch).backward()
    assert torch.allclose(norms.squared(), true, rtol=1e-10)


def test_reentrant_checkpoint_of_a_module_called_twice_is_refused():
    model = Small(2, use_reentrant=True)
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match=r"'norm'.*reentrant|'block'.*reentrant"), norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()


def test_checkpoints_keep_no_activation_alive():
    """Of a checkpointed block nothing is held between its forward and its backward pass."""
    held = []

    class Spy(nn.Linear):
        def forward(self, x):
            held.append(weakref.ref(x))
            return super().forward(x)

    block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    spy = Spy(5, 5)
    norms = PerSampleGradNorms(nn.ModuleList([block, spy]), rules={Spy: by_autograd})
    y = checkpoint(lambda x: block(spy(x * 2)), torch.randn(B, 5, requires_grad=True), use_reentrant=False)
    gc.collect()
    assert held[0]() is None
    with norms.sequences(batch_size=B):
        y.sum().backward()
    assert norms.squared().shape == (B,)


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "lora-qwen3"])
def test_a_backward_pass_for_norms_alone_computes_no_weight_gradient(name, float64):
    model, batch = language_model(name).double(), padded_batch(LENGTHS)
    true = per_sample_grad_norms_func(model, log_prob_sum, batch)
    norms = PerSampleGradNorms(model)
    loss = log_prob_sum(model, batch)
    with norms.sequences(batch_size=B):
        norms.backward(loss, retain_graph=True)
    assert torch.allclose(norms.squared(), true, rtol=1e-10)
    assert all(p.grad is None for p in model.parameters())
    loss.backward()  # the graph is still whole; no block, no norms
    del loss
    with norms.sequences(batch_size=B):
        log_prob_sum(model, batch).backward()
    assert torch.allclose(norms.squared(), true, rtol=1e-10)


def test_norms_alone_reach_what_stands_on_inputs_that_want_a_gradient():
    model = Small()
    model.first.requires_grad_(False)  # as under LoRA, with enable_input_require_grads()
    x = inputs().requires_grad_()
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        norms.backward(loss_of(model, x))
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)
    assert x.grad is None


@pytest.mark.parametrize("part", ["norm", "layers.1", "q_proj", "embed", "lm_head"])
def test_norms_alone_of_a_part(part, float64):
    model, batch = language_model("qwen3-untied").double(), padded_batch(LENGTHS)
    norms = PerSampleGradNorms(model, parameters=lambda name: part in name)
    with norms.sequences(batch_size=B):
        norms.backward(log_prob_sum(model, batch))
    for name, p in model.named_parameters():
        p.requires_grad_(part in name)
    assert torch.allclose(norms.squared(), per_sample_grad_norms_func(model, log_prob_sum, batch), rtol=1e-10)


def test_micro_batches_and_accumulated_gradients(float64):
    model, batch = language_model("qwen3").double(), padded_batch(LENGTHS)
    norms, found = PerSampleGradNorms(model), []
    for part in torch.arange(B).split(2):
        with norms.sequences(batch_size=2):
            log_prob_sum(model, {name: value[part] for name, value in batch.items()}).backward()
        found.append(norms.squared())
    assert torch.allclose(torch.cat(found), per_sample_grad_norms_func(model, log_prob_sum, batch), rtol=1e-10)


def weight_decay(model, x):
    return loss_of(model, x) + model.block.weight.square().sum()


def functional_head(model, x):
    return nn.functional.linear(model.middle(model.first(x)), model.head.weight, model.head.bias).sin().sum()


def second_functional_use(model, x):
    return loss_of(model, x) + nn.functional.linear(x, model.first.weight).sum()


def forward_without_hooks(model, x):
    return model.head(model.norm(model.block.forward(model.first(x)))).sum()


@pytest.mark.parametrize("loss", [weight_decay, functional_head, second_functional_use, forward_without_hooks])
@pytest.mark.parametrize("alone", [False, True])
def test_every_use_in_the_graph_is_accounted_for(loss, alone):
    """In every block and without any gradient of a weight; but what stands beside the layers by the gradients alone."""
    model = Small()
    norms = PerSampleGradNorms(model, check="first" if loss in (weight_decay, second_functional_use) else "never")
    with pytest.raises(RuntimeError, match="elsewhere"), norms.sequences(batch_size=B):
        norms.backward(loss(model, inputs())) if alone else loss(model, inputs()).backward()
    assert not alone or all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("run", [
    lambda model, loss: loss.backward(inputs=[model.head.weight]),
    lambda model, loss: torch.autograd.grad(loss, [model.block.weight]),
    lambda model, loss: torch.autograd.grad(loss, list(model.parameters())),
])  # fmt: skip
def test_backward_passes_for_some_tensors_are_refused(run):
    model = Small()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="for some tensors only"), norms.sequences(batch_size=B):
        run(model, loss_of(model, inputs()))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("calls", [1, 2])
def test_outputs_that_are_changed_in_place(alone, calls):
    class InPlace(Small):
        def middle(self, x):
            for _ in range(self.calls):
                x = self.block(self.norm(x)).relu_() + x
                x[..., :2] *= 2
            return x

        def forward(self, x):
            return super().forward(x).div_(0.7)

    model = InPlace(calls)
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs())) if alone else loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


def test_offloaded_activations_and_dropout_and_a_scaled_loss():
    model, batch = language_model("qwen3"), padded_batch(LENGTHS)
    true = per_sample_grad_norms_func(model, log_prob_sum, batch)
    norms = PerSampleGradNorms(model)
    with torch.autograd.graph.save_on_cpu(), norms.sequences(batch_size=B):
        (65536.0 * log_prob_sum(model, batch)).backward()
    assert torch.allclose(norms.squared(scale=65536.0), true, rtol=1e-4)

    dropped = Small(norm=nn.Sequential(nn.LayerNorm(6), nn.Dropout(0.5)))
    norms = PerSampleGradNorms(dropped)
    torch.manual_seed(1)
    with norms.sequences(batch_size=B):
        loss_of(dropped, inputs()).backward()
    torch.manual_seed(1)  # the same mask, and the gradients by autograd, one sequence's loss at a time
    losses = dropped(inputs()).sin().sum((1, 2))
    found = [torch.autograd.grad(one, list(dropped.parameters()), retain_graph=True) for one in losses]
    true = torch.stack([sum(g.square().sum() for g in of_one) for of_one in found])
    assert torch.allclose(norms.squared(), true, rtol=1e-12)


def test_gradients_that_are_zero_but_for_rounding_raise_no_alarm():
    """The bias of the keys of softmax attention has none."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k, self.v = (nn.Linear(5, 8) for _ in range(3))

        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))

    for dtype in (torch.float32, torch.float64):
        model = Attention().to(dtype)
        norms = PerSampleGradNorms(model)
        with norms.sequences(batch_size=B):
            loss_of(model, inputs().to(dtype)).backward()
        assert torch.allclose(norms.squared(), truth(model, inputs().to(dtype)), rtol=1e-4)


@pytest.mark.parametrize("factor", [0.0, torch.nan])
def test_a_batch_without_gradient_does_not_stand_for_the_check(factor):
    model = Small()
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        (factor * loss_of(model, inputs())).backward()
    with pytest.raises(RuntimeError, match=r"'block\.weight'.*used elsewhere"), norms.sequences(batch_size=B):
        weight_decay(model, inputs()).backward()


def test_norms_alone_do_not_get_through_reentrant_checkpoints():
    model = Small(use_reentrant=True)
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False, or measure"), norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs()))


def test_layers_that_return_several_tensors_are_not_left_out():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Small()
    model.block = Pair(6, 6).double()
    model.middle = lambda x: model.block(x)[0]
    norms = PerSampleGradNorms(model, rules={Pair: by_autograd})
    with pytest.raises(RuntimeError, match=r"'block\.\w+' is used 1 times.*0 times"), norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs()))


def test_residuals_that_are_added_in_place_under_autocast():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 6))

    def loss(model):
        h = model[0](inputs().float()).float()
        h += model[1](h)  # autograd has kept a copy in bfloat16
        return h.square().sum()

    norms = PerSampleGradNorms(model)
    with torch.autocast("cpu", torch.bfloat16), norms.sequences(batch_size=B):
        loss(model).backward()
    assert norms.squared().isfinite().all()


@pytest.mark.parametrize("groups", [2, torch.tensor([5, 1, 5, 1, 1, 2])])
@pytest.mark.parametrize("is_packed", [False, True])
def test_several_sequences_as_one_unit(groups, is_packed, float64):
    model, batch = language_model("qwen3").double(), padded_batch(LENGTHS)
    ids = torch.arange(B) // 2 if isinstance(groups, int) else groups
    true = []
    for unit in ids.unique():
        model.zero_grad()
        log_prob_sum(model, {name: value[ids == unit] for name, value in batch.items()}).backward()
        true.append(sum(p.grad.square().sum() for p in model.parameters()))
    norms = PerSampleGradNorms(model)
    if is_packed:
        tokens, allowed, labels, cu_seqlens = packed(batch)
        with norms.sequences(cu_seqlens=cu_seqlens, groups=groups):
            packed_log_prob_sum(model, tokens, allowed, labels).backward()
    else:
        with norms.sequences(batch_size=B, groups=groups):
            log_prob_sum(model, batch).backward()
    assert torch.allclose(norms.squared(), torch.stack(true), rtol=1e-10)


def test_prompt_groups_of_one_backward_pass_are_the_moments_of_the_batch():
    model, prompts = Small(), B // 2
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B, groups=2):
        (loss_of(model, inputs()) / B).backward()
    squared = sum(p.grad.square().sum() for p in model.parameters())
    moments = GradientMoments(squared, norms.squared(scale=1 / prompts).mean(), prompts)
    parts = []
    for part in inputs().split(2):
        model.zero_grad()
        (loss_of(model, part) / 2).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    true = GradientMoments.from_gradients(parts)
    assert moments.noise == pytest.approx(float(true.noise), rel=1e-10)
    assert moments.signal == pytest.approx(float(true.signal), rel=1e-10)


def test_what_the_loss_multiplied_log_probs_by_is_divided_out():
    model = Small()
    scale = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, 1e-3], dtype=torch.float64) / B
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        (model(inputs()).sin().sum((1, 2)) * scale).sum().backward()
    known = scale != 0
    assert torch.allclose(norms.squared(scale)[known], truth(model)[known], rtol=1e-10)
    assert norms.squared(scale)[~known].isnan().all()
    with pytest.raises(ValueError, match="scale"):
        norms.squared(torch.ones(B + 1))


def test_parts_of_a_model(float64):
    model, batch = language_model("qwen3").double(), padded_batch(LENGTHS)
    norms = PerSampleGradNorms(model, parameters=lambda name: "norm" in name)
    with norms.sequences(batch_size=B):
        log_prob_sum(model, batch).backward()
    for name, p in model.named_parameters():
        p.requires_grad_("norm" in name)
    assert torch.allclose(norms.squared(), per_sample_grad_norms_func(model, log_prob_sum, batch), rtol=1e-10)


def test_compiled_blocks():
    model = language_model("qwen3")
    model.model.layers[0].compile()
    with pytest.raises(ValueError, match=r"layers\.0.*compile"):
        PerSampleGradNorms(model)
    with pytest.raises(ValueError, match="compile"):
        PerSampleGradNorms(torch.compile(Small()))


def test_compiling_later_breaks_the_graph_and_not_the_norms():
    model = Small()
    norms = PerSampleGradNorms(model)
    compiled = torch.compile(model, backend="aot_eager")
    with norms.sequences(batch_size=B):
        loss_of(compiled, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(Small()), rtol=1e-12)


def test_the_check_costs_nothing_where_no_parameter_gets_a_gradient(monkeypatch):
    def expect(self, uses):
        raise AssertionError("computes weight gradients")

    monkeypatch.setattr("snr_optim.grad_norms.coverage.GradientCheck.expect", expect)
    model = Small()
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs()))
    with pytest.raises(AssertionError, match="weight gradients"), norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()


def test_construction_draws_no_random_numbers():
    model = language_model("gemma")
    state = torch.get_rng_state()
    PerSampleGradNorms(model)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- layers
class ScaledNorm(nn.Module):
    """A normalization layer that no rule knows: its scale is the square of its parameter."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(6)), 1e-5

    def forward(self, x):
        return x * self.weight.square()


def test_an_unknown_layer_is_refused_by_name_or_handled_by_autograd():
    model = Small(norm=ScaledNorm())
    with pytest.raises(ValueError, match=r"'norm\.weight' \(ScaledNorm\)"):
        PerSampleGradNorms(model)
    norms = PerSampleGradNorms(model, rules={ScaledNorm: by_autograd})
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)
    flat = inputs().flatten(0, 1)[None]
    with norms.sequences(cu_seqlens=torch.arange(0, 4 * B + 1, 4)):
        loss_of(model, flat).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


@pytest.mark.parametrize("norm", [nn.RMSNorm(6), nn.RMSNorm(6, eps=0.1), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)])
@pytest.mark.parametrize("frozen", [(), ("norm.weight",), ("norm.bias", "block.weight"), ("first.bias", "head.weight")])
def test_norms_of_torch_and_frozen_parameters(norm, frozen):
    model = Small(norm=norm)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


class TiedOnce(nn.Module):
    """An embedding with padding, tied to a head that is called as often as wished."""

    def __init__(self, heads=1, embeddings=1):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 6, padding_idx=2), nn.Linear(6, 7)
        self.head.weight = self.embed.weight
        self.heads, self.embeddings = heads, embeddings
        self.double()

    def forward(self, ids):
        x = sum(self.embed((ids + i) % 7) for i in range(self.embeddings))
        return torch.cat([self.head(part) for part in x.tanh().chunk(self.heads, 1)], 1)


@pytest.mark.parametrize(("heads", "embeddings"), [(1, 1), (3, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("alone", [False, True])
def test_tied_weights_that_are_used_several_times(heads, embeddings, alone):
    model, ids = TiedOnce(heads, embeddings), torch.randint(7, (B, 6))
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        norms.backward(loss_of(model, ids)) if alone else loss_of(model, ids).backward()
    assert torch.allclose(norms.squared(), truth(model, ids), rtol=1e-12)


def test_layers_with_and_without_bias_that_share_their_input():
    class Fan(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(5, n, bias=n % 2 == 0) for n in (2, 3, 4, 5))
            self.double()

        def forward(self, x):
            return torch.cat([layer(x) for layer in self.layers], -1)

    model = Fan()
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


class Gated(nn.Module):
    """A normalization layer that takes a gate where there is one."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(6)), 1e-6

    def forward(self, x, gate=None):
        x = x if gate is None else x * gate
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("call", [
    lambda norm, x: norm(x), lambda norm, x: norm(x=x), lambda norm, x: norm(gate=None, x=x)
])  # fmt: skip
def test_inputs_by_name(call):
    model = Small(norm=Gated())
    model.middle = lambda x: call(model.norm, x)
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


def test_further_arguments_are_refused():
    model = Small(norm=Gated())
    model.middle = lambda x: model.norm(x, gate=x)
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="'norm' was called with more"), norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", [
    nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
    lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
])  # fmt: skip
def test_weights_that_are_computed_from_others_are_refused(change):
    import torch.nn.utils.prune  # noqa: F401

    model = Small()
    change(model.block)
    with pytest.raises(ValueError, match=r"no rule for 'block\."):
        PerSampleGradNorms(model)


def test_embeddings_that_cannot_be_told_apart_are_refused():
    model = nn.Sequential(nn.Embedding(9, 5))
    norms = PerSampleGradNorms(model)
    with pytest.raises(ValueError, match=r"positions of the whole batch"), norms.sequences(batch_size=B):
        model(torch.arange(B)).sum().backward()
    with pytest.raises(ValueError, match="no rule"):
        PerSampleGradNorms(nn.Sequential(nn.Embedding(9, 5, scale_grad_by_freq=True)))


def test_probing_leaves_the_model_as_it_is():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="BatchNorm1d"):
        PerSampleGradNorms(model)
    assert int(model[1].num_batches_tracked) == 0


def test_by_autograd_under_autocast():
    class Odd(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.abs(), self.bias)

    model = nn.Sequential(nn.Linear(5, 6), Odd(6, 3))
    norms = PerSampleGradNorms(model, rules={Odd: by_autograd})
    with torch.autocast("cpu", torch.bfloat16), norms.sequences(batch_size=B):
        model(inputs().float()).float().sum().backward()
    assert norms.squared().isfinite().all()


def test_embeddings_with_padding_tied_to_two_heads():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(7, 6, padding_idx=2)
            self.heads = nn.ModuleList(nn.Linear(6, 7) for _ in range(2))
            for head in self.heads:
                head.weight = self.embed.weight
            self.double()

        def forward(self, ids):
            x = self.embed(ids)
            return self.heads[0](x.tanh()) * self.heads[1](x.cos())

    model, ids = Tied(), torch.randint(7, (B, 5))
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, ids).backward()
    assert torch.allclose(norms.squared(), truth(model, ids), rtol=1e-12)


def test_a_weight_used_behind_the_back_of_its_layer_is_found():
    model = Small()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match=r"'block\.weight'.*used elsewhere"), norms.sequences(batch_size=B):
        (loss_of(model, inputs()) + model.block.weight.square().sum()).backward()
    model.zero_grad()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match=r"'block\.weight' is used 2 times.* 1 times"), norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs()) + model.block.weight.square().sum())
    with pytest.raises(RuntimeError, match=r"'\w+\.\w+' got a gradient.*not called"), norms.sequences(batch_size=B):
        model.first(inputs()).mul(model.head.weight).sum().backward()


def test_position_embeddings_of_the_whole_batch_are_refused():
    model, batch = language_model("gpt2"), padded_batch(LENGTHS)
    del batch["position_ids"]
    norms = PerSampleGradNorms(model)
    with pytest.raises(ValueError, match=r"\[1, 9, 16\].*row per sequence.*wpe"), norms.sequences(batch_size=B):
        log_prob_sum(model, batch).backward()


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "batch_size, cu_seqlens"),
        ({"batch_size": 2, "cu_seqlens": torch.tensor([0, 2])}, "batch_size, cu_seqlens"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"cu_seqlens": torch.tensor([1, 2])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([0, 3, 2])}, "cu_seqlens"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, "cu_seqlens"),
        ({"batch_size": B, "groups": 4}, "groups"),
    ],
)
def test_bad_sequences_are_named(options, names):
    norms = PerSampleGradNorms(Small())
    with pytest.raises((ValueError, TypeError), match=names), norms.sequences(**options):
        raise AssertionError("must not come here")


@pytest.mark.parametrize("options", [{"batch_size": B - 1}, {"cu_seqlens": torch.tensor([0, 5, 4 * B - 1])}])
def test_sequences_that_do_not_add_up(options):
    model = Small()
    norms = PerSampleGradNorms(model)
    message = r"(batch_size|cu_seqlens): .*shape \[6, 4, 1\].*'head'"
    with pytest.raises(ValueError, match=message), norms.sequences(**options):
        loss_of(model, inputs()).backward()


def test_empty_sequences_have_norm_zero():
    model = Small()
    norms = PerSampleGradNorms(model)
    with norms.sequences(cu_seqlens=torch.tensor([0, 0, 4, 4, 4 * B, 4 * B])):
        loss_of(model, inputs().view(1, -1, 5)).backward()
    assert (norms.squared() > 0).tolist() == [False, True, False, True, False]


def test_two_backward_passes_in_a_block_are_refused():
    model = Small()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="second backward pass within one block"), norms.sequences(batch_size=B):
        (loss_of(model, inputs()).backward(), loss_of(model, inputs()).backward())
    with pytest.raises(RuntimeError, match="no block"):
        norms.squared()


def test_backward_through_a_graph_that_is_gone():
    model = Small()
    norms = PerSampleGradNorms(model)
    loss = loss_of(model, inputs())
    loss.backward()
    with pytest.raises(RuntimeError, match="second"), norms.sequences(batch_size=B):
        loss.backward()


def test_forward_without_backward():
    model = Small()
    norms = PerSampleGradNorms(model)
    with pytest.raises(RuntimeError, match="no backward pass"), norms.sequences(batch_size=B):
        loss_of(model, inputs())
    with pytest.raises(RuntimeError, match="no block"):
        norms.squared()
    with pytest.raises(RuntimeError, match="within"):
        norms.backward(loss_of(model, inputs()))
    with pytest.raises(ValueError, match="graph behind it"), norms.sequences(batch_size=B):
        norms.backward(loss_of(model, inputs()).detach())


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_and_no_grad(training):
    model = Small().train(training)
    norms = PerSampleGradNorms(model)
    with torch.no_grad():
        model(inputs())
    with torch.inference_mode():
        model(inputs())
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


def test_models_that_cannot_be_measured():
    model = Small()
    model.head = nn.Linear(6, 1, device="meta")
    with pytest.raises(ValueError, match="one device, got cpu, meta"):
        PerSampleGradNorms(model)
    with pytest.raises(ValueError, match="at least one"):
        PerSampleGradNorms(Small().requires_grad_(False))
    with pytest.raises(ValueError, match="method"):
        PerSampleGradNorms(Small(), "ghost")
    with pytest.raises(TypeError, match="parameters"):
        PerSampleGradNorms(Small(), parameters=["norm"])
    with pytest.raises(TypeError, match="rules"):
        PerSampleGradNorms(Small(), rules={"Linear": by_autograd})
    with pytest.raises(ValueError, match=r"parameters: none is wanted of 'block|parameters: none is wanted of block"):
        PerSampleGradNorms(Small(), parameters=lambda name: "nomr" in name)
    with pytest.raises(ValueError, match="check"):
        PerSampleGradNorms(Small(), check=True)
    with pytest.raises(ValueError, match="relative_error"):
        PerSampleGradNorms(Small(), "sketch", relative_error=0.0)


def test_parameters_that_became_trainable_later():
    model = Small()
    model.block.requires_grad_(False)
    norms = PerSampleGradNorms(model)
    model.block.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"block\.weight.*anew"), norms.sequences(batch_size=B):
        pass


def test_nan_stays_in_its_sequence():
    model, x = Small(), inputs()
    x[2] = torch.nan
    norms = PerSampleGradNorms(model)
    with norms.sequences(batch_size=B):
        loss_of(model, x).backward()
    finite = torch.arange(B) != 2
    assert norms.squared()[2].isnan()
    assert torch.allclose(norms.squared()[finite], truth(model)[finite], rtol=1e-12)


# -------------------------------------------------------------------------------------------------------------- leaks
def test_an_exception_within_the_block_leaves_nothing_behind():
    model = Small()
    norms = PerSampleGradNorms(model)
    with pytest.raises(ZeroDivisionError), norms.sequences(batch_size=B):
        (loss_of(model, inputs()).backward(), 1 / 0)
    with pytest.raises(RuntimeError, match="no block"):
        norms.squared()
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)
    with pytest.raises(ValueError, match="batch_size"), norms.sequences(batch_size=B + 1):
        loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match="no block"):  # nor those of the block before
        norms.squared()


def test_copies_of_the_model_are_not_observed():
    model = Small()
    norms = PerSampleGradNorms(model)
    loss_of(model, inputs())
    average, saved = copy.deepcopy(model), io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    with norms.sequences(batch_size=B):
        loss_of(model, inputs()).backward()
        loss_of(average, inputs(1)).backward()
        loss_of(torch.load(saved, weights_only=False), inputs(2)).backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


def hooks(model):
    of_modules = sum(len(module._forward_hooks) for module in model.modules())
    return of_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("how", ["remove", "forget"])
def test_hooks_go(how):
    model = Small()
    norms = PerSampleGradNorms(model)
    assert hooks(model) > 0
    if how == "remove":
        norms.remove()
        with pytest.raises(RuntimeError, match="removed"), norms.sequences(batch_size=B):
            pass
    else:
        del norms
    assert hooks(model) == 0


def test_biases_alone_keep_no_activations():
    model = Small()
    for name, p in model.named_parameters():
        p.requires_grad_("bias" in name)
    norms = PerSampleGradNorms(model)
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    loss = loss_of(model, inputs())
    assert seen[0]() is None
    with norms.sequences(batch_size=B):
        loss.backward()
    assert torch.allclose(norms.squared(), truth(model), rtol=1e-12)


@pytest.mark.parametrize("ending", ["backward", "measured", "never", "error"])
def test_activations_go_with_the_graph(ending):
    """By reference counts alone: no cycle waits for the garbage collector."""
    model = Small()
    norms = PerSampleGradNorms(model)
    seen = []
    handle = model.block.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    gc.collect()
    gc.disable()
    try:
        loss = loss_of(model, inputs())
        handle.remove()
        if ending == "backward":
            loss.backward()
            assert seen[0]() is None  # though `loss` is still there
        elif ending == "measured":
            with norms.sequences(batch_size=B):
                loss.backward()
            assert seen[0]() is None
        elif ending == "error":
            with pytest.raises(ValueError, match="batch_size"), norms.sequences(batch_size=1):
                loss.backward()
            sys.last_value = None
        del loss
        assert seen[0]() is None
    finally:
        gc.enable()
