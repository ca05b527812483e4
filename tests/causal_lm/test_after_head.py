"""What models and hooks do to logits after the head: taken over by `model_logprob_stats`, or refused."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from language_models import VOCABULARY, language_model, padded_batch
from torch import nn

from snr_kernels.logprob_stats import LogprobStats, logprob_stats
from snr_optim import model_logprob_stats

B, T = 3, 5
IDS = torch.randint(4, 17, (B, T), generator=torch.Generator().manual_seed(0))
RTOL = 1e-10  # float64, another order of summation
NUMBERS = torch.arange(VOCABULARY)
OF_ROWS = torch.tensor([1.0, 0.5, 3.0], dtype=torch.float64)[:, None, None]
OF_TOKENS = torch.rand(B, T, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5


class Toy(nn.Module):
    """A language model whose own code does ``change`` to its logits, with what its config may say of it."""

    def __init__(self, change=lambda logits: logits, bias=True, **config):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4), nn.Dropout(0.5)])
        self.lm_head, self.value = nn.Linear(4, VOCABULARY, bias=bias), nn.Linear(4, 1)
        self.change, self.config, self.calls = change, SimpleNamespace(**config), []
        for layer in self.layers:
            layer.register_forward_hook(lambda layer, args, output: self.calls.append(layer))
        self.double()
        self.eval()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, use_cache):
        h = input_ids
        for layer in self.layers:
            h = layer(h)
        logits = self.lm_head(h)
        return SimpleNamespace(logits=self.change(logits), value=self.value(h))


def masked(words, value=-torch.inf):
    def change(logits):
        logits = logits.clone()
        logits[..., words] = value
        return logits

    return change


def in_place(logits):
    logits[:, :, [9 + 10, 20]] = torch.finfo(logits.dtype).min
    return logits


CHANGES = {
    "padding": masked(slice(17, None)),
    "padding, with the least number": masked(slice(17, None), torch.finfo(torch.float64).min),
    "some words, in place": in_place,
    "the first word": masked(0, -1e9),
    "by a mask of all words": lambda logits: logits.masked_fill(NUMBERS % 19 == 1, -torch.inf),
    "a factor": lambda logits: 1.01 * logits,
    "a factor of each sequence": lambda logits: logits * OF_ROWS,
    "a temperature of each token": lambda logits: logits / OF_TOKENS,
    "both": lambda logits: masked(slice(18, None))(logits) / OF_TOKENS,
    "some words, and a factor of each sequence": lambda logits: in_place(logits) * OF_ROWS,
    "another dtype": lambda logits: logits.clone().to(torch.float64, copy=True),
}


def by_the_logits(model, ids, temperature=1.0):
    returned = model(input_ids=ids, use_cache=False)
    stats = logprob_stats(returned.logits[:, :-1], ids[:, 1:], temperature)
    return LogprobStats(*(torch.nn.functional.pad(x, (1, 0)) for x in stats))


def gradients_of(model, stats):
    model.zero_grad()
    factors = torch.randn(4, *stats[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sum((f * x).sum() for f, x in zip(factors, stats, strict=True)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def expect_alike(model, ids=IDS, called=None):
    for temperature in (1.0, 0.7, 0.5 + torch.rand(ids.shape, dtype=torch.float64)):
        shifted = temperature[:, 1:] if isinstance(temperature, torch.Tensor) else temperature
        got, true = (
            model_logprob_stats(called or model, ids, ids, temperature=temperature),
            by_the_logits(called or model, ids, shifted),
        )
        for a, b in zip(got, true, strict=True):
            torch.testing.assert_close(a, b, rtol=RTOL, atol=1e-12)
        found, expected = gradients_of(model, got), gradients_of(model, true)
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-10)


def hook_of_head(model, change):
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))


def hook_with_keywords(model, change):
    model.lm_head.register_forward_hook(lambda module, args, kwargs, logits: change(logits), with_kwargs=True)


def hook_of_model(model, change):
    def hook(module, args, returned):
        return SimpleNamespace(logits=change(returned.logits))

    model.register_forward_hook(hook)


def own_code(model, change):
    model.change = change


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", [own_code, hook_of_head, hook_with_keywords, hook_of_model])
def test_factors_of_rows_and_masks_of_words_are_taken_over(how, change):
    model = Toy()
    how(model, CHANGES[change])
    expect_alike(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [{}, {"logit_scale": 0.3}, {"final_logit_softcapping": 2.0}])
def test_beside_what_the_config_says(config, bias):
    softcap, scale = config.get("final_logit_softcapping"), config.get("logit_scale", 1.0)

    def change(logits):
        logits = logits * scale if softcap is None else softcap * torch.tanh(logits / softcap)
        return masked(slice(17, None))(logits) * OF_ROWS

    expect_alike(Toy(change, bias, **config))


def test_hooks_of_what_wraps_the_model():
    model = Toy()
    wrapper = nn.Module()
    wrapper.module = model
    wrapper.forward = lambda input_ids, use_cache: model(input_ids=input_ids, use_cache=use_cache)
    hook_of_model(wrapper, CHANGES["both"])
    hook_of_head(model, CHANGES["a factor of each sequence"])
    expect_alike(model, called=wrapper)


@pytest.mark.parametrize("name", ["qwen3", "cohere", "lora-qwen3"])
def test_hooks_of_the_heads_of_real_models(name):
    model = language_model(name).double()
    batch = padded_batch([7, 3, 5])
    ids = batch["input_ids"] % 17
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits / OF_ROWS.to(logits))
    model.get_output_embeddings().register_forward_hook(lambda m, args, logits: masked(slice(17, None))(logits))
    got = model_logprob_stats(model, ids, ids, attention_mask=batch["attention_mask"]).log_prob
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    true = logprob_stats(logits, ids[:, 1:]).log_prob
    torch.testing.assert_close(got[:, 1:].double(), true.double(), rtol=2e-5, atol=2e-6)  # float32 inside


def test_a_model_that_masks_words_by_their_numbers():
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    torch.manual_seed(0)
    quantiser = {
        "embed_dim": 8,
        "num_embeddings": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    }
    config = ChameleonConfig(
        vocab_size=41, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        vq_config=quantiser | {"attn_resolutions": None},
        vocabulary_map={"<image>": 8} | {f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(8)},
    )  # fmt: skip
    model = ChameleonForConditionalGeneration(config).double().eval()
    ids = torch.randint(20, 41, (2, 6))
    got = model_logprob_stats(model, ids, ids)
    true = by_the_logits(model, ids)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=2e-5, atol=2e-6)  # float32 inside
    gradients, expected = gradients_of(model, got), gradients_of(model, true)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4, atol=1e-6)


def test_a_label_that_is_masked_has_no_probability():
    ids = torch.tensor([[5, 19, 6]])
    got = model_logprob_stats(Toy(CHANGES["some words, in place"]), ids, ids).log_prob
    assert got[0, 1] == -torch.inf
    assert got[0, 2].isfinite()


def test_layers_are_called_once_and_randomness_goes_on_as_before():
    """Also those after the head, and in training: dropout has the masks that it would have had."""
    model = Toy().train()
    torch.manual_seed(3)
    got = model_logprob_stats(model, IDS, IDS).log_prob
    assert model.calls == list(model.layers)
    torch.manual_seed(3)
    torch.testing.assert_close(got, by_the_logits(model, IDS).log_prob, rtol=RTOL, atol=1e-12)


def test_the_model_is_left_as_it_was():
    model = Toy()
    before = [(name, id(module)) for name, module in model.named_modules()]
    model_logprob_stats(model, IDS, IDS)
    with pytest.raises(RuntimeError, match="something else"):
        model_logprob_stats(Toy(torch.tanh), IDS, IDS)
    model.change = lambda logits: 1 / 0
    with pytest.raises(RuntimeError, match=r"after its head fails .*division by zero.*hidden states"):
        model_logprob_stats(model, IDS, IDS)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert all(isinstance(module, nn.Module) and type(module).__module__ != "snr_optim.after_head"
               for module in model.modules())  # fmt: skip
    copy.deepcopy(model.layers)


@pytest.mark.parametrize("part", ["layers", "body", "body in place"])
def test_compiled_layers(part):
    model, plain = language_model("qwen3-untied").double(), language_model("qwen3-untied").double()
    if part == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif part == "body":
        model.model = torch.compile(model.model, backend="eager")
    else:
        model.model.compile(backend="eager")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits / OF_ROWS)
    plain.lm_head.register_forward_hook(lambda module, args, logits: logits / OF_ROWS)
    for a, b in zip(model_logprob_stats(model, IDS, IDS), by_the_logits(plain, IDS), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_what_only_looks_at_the_logits_is_no_harm():
    model, seen = Toy(), []
    model.lm_head.register_forward_hook(lambda module, args, logits: seen.append(logits.shape[-1]))
    expect_alike(model)
    assert seen.count(VOCABULARY) >= 3


# --------------------------------------------------------------------------------------------------- what is refused
REFUSED = {
    "other words in some rows": (
        lambda logits: logits.masked_fill((NUMBERS == 7) & (torch.arange(logits.shape[0]) == 1)[:, None, None], -1e9),
        "masks other words in some rows",
    ),
    "words by their logits": (
        lambda logits: logits.masked_fill(logits < logits.topk(min(8, logits.shape[-1])).values[..., -1:], -torch.inf),
        "masks other words",
    ),
    "a bias for one word": (lambda logits: logits + (NUMBERS == 7), "something else"),
    "a factor of one word": (lambda logits: logits * torch.where(NUMBERS == 7, 2.0, 1.0), "something else"),
    "a sequence upside down": (lambda logits: logits * (1 - 2 * (OF_ROWS == 3.0)), "something else"),
    "a bias for one sequence": (lambda logits: logits + (OF_ROWS == 3.0), "something else"),
    "another sequence": (lambda logits: logits * OF_TOKENS[:2], "fails on logits|return what its head does"),
    "all words": (lambda logits: torch.full_like(logits, -torch.inf), "masks all words"),
    "another shape": (lambda logits: logits.flatten(), "return what its head does"),
    "some words left out": (lambda logits: logits[..., :9], "return what its head does"),
}


@pytest.mark.parametrize("change", REFUSED)
@pytest.mark.parametrize("how", [own_code, hook_of_head, hook_of_model])
def test_other_changes_of_rows_or_words_are_refused(how, change):
    model = Toy()
    how(model, REFUSED[change][0])
    with pytest.raises(RuntimeError, match=REFUSED[change][1]):
        model_logprob_stats(model, IDS, IDS)


def test_a_factor_before_a_softcap():
    model = language_model("gemma2")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits / 2)
    with pytest.raises(RuntimeError, match=r"softcap 3\.0.*something else"):
        model_logprob_stats(model, IDS, IDS)


def test_masks_after_a_softcap():
    model = Toy(lambda logits: in_place(2 * torch.tanh(logits / 2)), final_logit_softcapping=2.0)
    with pytest.raises(RuntimeError, match="masks words after a softcap"):
        model_logprob_stats(model, IDS, IDS)


def test_a_factor_that_low_precision_does_not_show_is_refused():
    """In bfloat16 1 / 0.7 is off by a thousandth; what is a power of two, or 1 but for rounding, is known."""
    model = Toy(lambda logits: logits / 0.7).bfloat16()
    with pytest.raises(RuntimeError, match="temperature="):
        model_logprob_stats(model, IDS, IDS)
    got = model_logprob_stats(Toy(lambda logits: logits / 0.5).bfloat16(), IDS, IDS).log_prob
    true = model_logprob_stats(Toy().bfloat16(), IDS, IDS, temperature=0.5).log_prob
    assert torch.equal(got, true)
