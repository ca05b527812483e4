"""`model_logprob_stats` against `logprob_stats` of the logits that the same model returns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from language_models import CONFIGS, SCALED, SHAPE, VOCABULARY, language_model, packed, padded_batch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.harness import peak_memory
from snr_kernels.lm_head import head_grad_norms
from snr_kernels.logprob_stats import LogprobStats, logprob_stats
from snr_optim import PerSampleGradNorms, model_logprob_stats

LENGTHS = [7, 2, 5]  # the second is all prompt


def batch_and_labels():
    batch = padded_batch(LENGTHS)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :2] = -100
    return batch, labels


def through_logits(model, batch, labels, temperature=1.0):
    """The same with the logits; the first column is 0."""
    logits = model(**batch, use_cache=False).logits[:, :-1]
    temperature = temperature[:, 1:] if isinstance(temperature, torch.Tensor) else temperature
    stats = logprob_stats(logits, labels[:, 1:], temperature)
    return LogprobStats(*(torch.cat([torch.zeros_like(x[:, :1]), x], 1) for x in stats))


def differentiate(model, stats):
    factors = torch.randn(4, *stats[0].shape, generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    sum((f * x).sum() for f, x in zip(factors, stats, strict=True)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [*CONFIGS, *SCALED, "lora-qwen3", "lora-gemma2"])
def test_equals_the_statistics_of_the_logits(name, float64):
    model = language_model(name).double()
    batch, labels = batch_and_labels()
    temperature = torch.rand(labels.shape) + 0.5
    got = model_logprob_stats(model, labels=labels, temperature=temperature, **batch)
    true = through_logits(model, batch, labels, temperature)
    for a, b in zip(got, true, strict=True):
        assert a.shape == labels.shape
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
        assert (a[labels == -100] == 0).all()
    gradients, expected = differentiate(model, got), differentiate(model, true)
    assert gradients.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(gradients[key], expected[key], rtol=1e-10, atol=1e-13)


def test_packed_sequences(float64):
    model = language_model("qwen3").double()
    inputs, allowed, _, cu_seqlens = packed(padded_batch(LENGTHS))
    mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    labels = inputs["input_ids"].clone()
    labels[0, cu_seqlens[:-1]] = -100  # nothing predicts a first token
    got = model_logprob_stats(model, labels=labels, attention_mask=mask, **inputs).log_prob
    logits = model(**inputs, attention_mask=mask, use_cache=False).logits
    target = inputs["input_ids"].roll(-1, 1)
    true = logprob_stats(logits, target).log_prob.roll(1, 1)
    true[0, cu_seqlens[:-1]] = 0
    torch.testing.assert_close(got, true)
    assert ((got == 0) == (labels == -100)).all()


def test_autocast_and_checkpointing_and_training():
    batch, labels = batch_and_labels()

    def train(fused):
        model = language_model("qwen3").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                if fused:
                    stats = model_logprob_stats(model, labels=labels, logits_dtype=torch.bfloat16, **batch)
                else:
                    stats = through_logits(model, batch, labels)
            optimizer.zero_grad()
            (-stats.log_prob - 0.1 * stats.entropy).mean().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    start = torch.cat([p.detach().flatten() for p in language_model("qwen3").parameters()])
    ours, theirs = train(True) - start, train(False) - start
    assert (ours - theirs).norm() < 0.02 * theirs.norm()  # bfloat16 has 8 bits


def test_outputs_and_no_gradient():
    model = language_model("qwen3-untied")
    batch, labels = batch_and_labels()
    whole = model_logprob_stats(model, labels=labels, **batch)
    with torch.no_grad():
        some = model_logprob_stats(model, labels=labels, outputs=["entropy", "log_prob"], **batch)
    assert some.sum_p_squared is None
    assert some.grad_norm_squared is None
    assert torch.equal(some.log_prob, whole.log_prob)
    assert torch.equal(some.entropy, whole.entropy)
    assert not some.log_prob.requires_grad
    nothing = model_logprob_stats(model, labels=torch.full_like(labels, -100), **batch)
    assert all((x == 0).all() for x in nothing)
    sum(x.sum() for x in nothing).backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_the_model_is_left_as_it_was():
    model = language_model("qwen3")
    batch, labels = batch_and_labels()
    before = model(**batch).logits
    model_logprob_stats(model, labels=labels, **batch)
    with pytest.raises(ValueError, match="labels"):
        model_logprob_stats(model, labels=labels[:, 1:], **batch)
    with pytest.raises(ValueError, match="outputs"):
        model_logprob_stats(model, labels=labels, outputs=["logits"], **batch)  # within the model's forward
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(model(**batch).logits, before)


def test_logits_are_never_whole():
    config = Qwen3Config(**SHAPE | {"vocab_size": 32_768, "max_position_embeddings": 512}, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(32_768, (1, 512))

    def fused():
        model_logprob_stats(model, ids, ids, slab_bytes=1 << 23).log_prob.sum().backward()

    def plain():
        logprob_stats(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]).log_prob.sum().backward()

    fused(), plain()
    peaks = [peak_memory(call, torch.device("cpu")) for call in (fused, plain)]
    if None in peaks:
        pytest.skip("the system does not tell")
    logits = ids.numel() * 32_768 * 4
    assert peaks[1] > 2 * logits > 3 * peaks[0], peaks


# ------------------------------------------------------------------------------------------ with PerSampleGradNorms
def test_per_sample_norms_refuse_a_head_that_they_cannot_see():
    model = language_model("qwen3-untied")
    norms = PerSampleGradNorms(model)
    batch, labels = batch_and_labels()
    with pytest.raises(RuntimeError, match="lm_head"), norms.sequences(batch_size=3):
        model_logprob_stats(model, labels=labels, **batch).log_prob.sum().backward()
    with pytest.raises(RuntimeError, match="lm_head"), norms.sequences(batch_size=3):
        norms.backward(model_logprob_stats(model, labels=labels, **batch).log_prob.sum())


def test_norms_of_the_body_and_of_the_head_add_up(float64):
    model = language_model("qwen3-untied").double()
    batch, labels = batch_and_labels()
    whole = PerSampleGradNorms(model)
    with whole.sequences(batch_size=3):
        whole.backward(through_logits(model, batch, labels).log_prob.sum())
    whole.remove()
    body = PerSampleGradNorms(model, parameters=lambda name: name != "lm_head.weight")
    with body.sequences(batch_size=3):
        body.backward(model_logprob_stats(model, labels=labels, **batch).log_prob.sum())
    with torch.no_grad():
        hidden = model.model(**batch, use_cache=False).last_hidden_state
    following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    ends = labels.shape[1] * torch.arange(4)
    head = head_grad_norms(hidden.flatten(0, 1), model.lm_head.weight, following.flatten(), ends, outputs=["head"])
    torch.testing.assert_close(body.squared() + head.head, whole.squared(), rtol=1e-11, atol=0)


# ------------------------------------------------------------------------------------------------------ what is refused
class Toy(nn.Module):
    """A language model that does ``change`` to its logits, with what its config may say of it."""

    def __init__(self, change=lambda head, h: head(h), **config):
        super().__init__()
        self.embed, self.lm_head, self.change = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY), change
        text = SimpleNamespace(**config)
        self.config = SimpleNamespace(get_text_config=lambda: text)  # as of models that see, too

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache):
        return (self.change(self.lm_head, self.embed(input_ids)),)


IDS = torch.arange(10).view(2, 5)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda head, h: head(h).tanh(), "for logits of .*something else"),
        (lambda head, h: -2 * head(h), "something else"),
        (lambda head, h: head(h) + 0.1, "something else"),
        (lambda head, h: head(h).log_softmax(-1), "something else"),
        (lambda head, h: head(h).clamp_min(0), "something else"),
        (lambda head, h: head(h)[..., :1], "expected it to return what its head does"),
        (lambda head, h: h @ head.weight.t(), "without a call of its output head"),
        (lambda head, h: (head(h), head(2 * h))[0], "more than once"),
    ],
)
def test_other_changes_of_the_logits_are_noticed(change, names):
    assert model_logprob_stats(Toy(), IDS, IDS).log_prob[:, 1:].isfinite().all()
    with pytest.raises(RuntimeError, match=names):
        model_logprob_stats(Toy(change), IDS, IDS)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda head, h: 2 * head(input=h), {"lm_head_multiplier": 2.0}),
        (lambda head, h: 3 * torch.tanh(head(h) / 3), {"final_logit_softcapping": 3.0}),
        (lambda head, h: head(h)[..., :17], {"unpadded_vocab_size": 17, "vocab_size": VOCABULARY}),
    ],
)
def test_changes_that_the_config_tells_are_made(change, config):
    model = Toy(change, **config)
    got = model_logprob_stats(model, IDS, IDS)
    true = logprob_stats(model(IDS, use_cache=False)[0][:, :-1], IDS[:, 1:])
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a[:, 1:], b)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"vocab_size": 17}, f"its head has {VOCABULARY} words, its config 17"),
        ({"logit_scale": "inv_sqrt_d_model"}, "config.logit_scale to be a number"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, names):
    with pytest.raises(RuntimeError, match=names):
        model_logprob_stats(Toy(**config), IDS, IDS)


def test_under_another_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        assert model_logprob_stats(Toy(), IDS, IDS).log_prob.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_wrapper_with_a_config_of_its_own():
    wrapper = nn.Module()
    wrapper.module, wrapper.config = language_model("gemma2"), SimpleNamespace(vocab_size=1)
    wrapper.forward = wrapper.module.forward
    wrapper.get_output_embeddings = wrapper.module.get_output_embeddings
    batch, labels = batch_and_labels()
    got = model_logprob_stats(wrapper, labels=labels, **batch).log_prob
    assert torch.equal(got, model_logprob_stats(wrapper.module, labels=labels, **batch).log_prob)


def test_results_can_be_changed_in_place():
    batch, labels = batch_and_labels()
    log_prob = model_logprob_stats(language_model("qwen3"), labels=labels, **batch).log_prob
    log_prob[labels == -100] = 1.0
    log_prob.sum().backward()
    with torch.no_grad():
        model_logprob_stats(language_model("qwen3"), labels=labels, **batch).log_prob.add_(torch.ones(1))


def test_a_head_that_sees_fewer_states_is_named():
    ids = torch.randint(VOCABULARY, (2, 5))
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        model_logprob_stats(language_model("qwen3"), ids, ids, logits_to_keep=2)


def test_what_has_no_plain_head_is_refused():
    from peft import LoraConfig, get_peft_model

    ids = torch.randint(VOCABULARY, (2, 5))
    adapted = get_peft_model(language_model("qwen3-untied"), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(TypeError, match=r"plain torch.nn.Linear, got peft.*Linear"):
        model_logprob_stats(adapted, ids, ids)
    with pytest.raises(TypeError, match="get_output_embeddings"):
        model_logprob_stats(nn.Linear(2, 2), ids, ids)
    with pytest.raises(RuntimeError, match="compiled as a whole"):
        model_logprob_stats(torch.compile(language_model("qwen3")), ids, ids)
    patched = language_model("qwen3")
    patched.lm_head.forward = patched.lm_head.forward
    with pytest.raises(TypeError, match="its own forward, but that is replaced"):
        model_logprob_stats(patched, ids, ids)
    in_place = language_model("qwen3")
    in_place.compile()
    with pytest.raises(RuntimeError, match="compiled as a whole"):
        model_logprob_stats(in_place, ids, ids)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"labels": torch.zeros(2, 5)}, TypeError, "labels: expected integers"),
        ({"labels": torch.zeros(10, dtype=torch.long)}, ValueError, r"labels: expected \[B, T\]"),
        ({"labels": None}, TypeError, "labels: expected an integer tensor, got NoneType"),
        ({"input_ids": None}, TypeError, "input_ids: expected an integer tensor"),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, ValueError, r"input_ids: expected \[B, T\], got \[5\]"),
        ({"labels": torch.full((2, 5), -1)}, ValueError, "labels: expected input_ids, not shifted"),
        ({"temperature": torch.ones(2, 5, dtype=torch.long)}, TypeError, "temperature: expected .* floating"),
        ({"temperature": torch.ones(5)}, ValueError, "temperature: expected a number or"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive"),
    ],
)
def test_bad_input_is_named(change, error, names):
    ids = torch.randint(VOCABULARY, (2, 5))
    with pytest.raises(error, match=names):
        model_logprob_stats(**({"model": language_model("qwen3"), "input_ids": ids, "labels": ids} | change))
