"""The study of proxies: what it calls exact is exact, what it calls the head is the head alone, and ties are ties."""

from __future__ import annotations

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import policy_stages, proxy_fidelity
from snr_optim import PerSampleGradNorms


@pytest.fixture(scope="module")
def policy():
    """A Qwen3 with tied embeddings, and 12 outputs of three prompts."""
    model, tokenizer = policy_stages.tiny_qwen3(0)
    torch.manual_seed(0)
    rollout, _ = policy_stages.roll_out(model, tokenizer, policy_stages.problems("mixed", 3, "test"), 4)
    return model, rollout


def test_norms_are_those_of_every_gradient_and_of_parts_of_it(policy):
    model, rollout = policy
    weights, _ = proxy_fidelity.weigh(model, rollout)
    for i in range(len(rollout["input_ids"])):
        seen = proxy_fidelity.look(model, proxy_fidelity.rows_of(rollout, torch.tensor([i])))
        named = dict(model.named_parameters())
        gradients = dict(
            zip(named, torch.autograd.grad(seen.log_probs.sum(), list(named.values()), retain_graph=True), strict=True)
        )
        norms = {name: float(g.square().sum()) for name, g in gradients.items()}
        assert float(weights["exact"][i]) == pytest.approx(sum(norms.values()), rel=1e-4)
        of_norms = sum(norm for name, norm in norms.items() if "norm" in name)
        assert float(weights["RMSNorm only"][i]) == pytest.approx(of_norms, rel=1e-4)

        head = model.get_output_embeddings().weight.detach().clone().requires_grad_()  # tied no more
        log_probs = (seen.hidden @ head.T).log_softmax(-1).gather(-1, seen.tokens[..., None])[..., 0]
        (of_head,) = torch.autograd.grad((log_probs * seen.mask).sum(), head)
        assert float(weights["head"][i]) == pytest.approx(float(of_head.square().sum()), rel=1e-4)
        assert float(weights["length"][i]) == int(rollout["completion_mask"][i].sum())


def test_one_token_has_the_head_norm_of_its_sum(policy):
    model, rollout = policy
    one = rollout | {"completion_mask": rollout["completion_mask"].cumsum(1) * rollout["completion_mask"] == 1}
    seen = proxy_fidelity.look(model, one)
    assert torch.allclose(proxy_fidelity.head_norms(seen), proxy_fidelity.head_norms_by_token(seen), rtol=1e-4)


def test_equal_outputs_are_one(policy):
    _, rollout = policy
    twice = {name: tensor.repeat_interleave(2, 0) for name, tensor in rollout.items()}
    first, which = proxy_fidelity.distinct(twice, group=8)
    assert first.remainder(2).eq(0).all()
    assert len(first) <= 12
    for i, row in enumerate(which.tolist()):
        mask = twice["completion_mask"][i]
        tokens = [twice["input_ids"][j, -len(mask) :][mask] for j in (i, int(first[row]))]
        assert torch.equal(*tokens)
        assert i // 8 == int(first[row]) // 8


def test_the_training_step_is_the_same_with_norms(policy):
    model, rollout = policy
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    found = []
    for name, how in [("none", "extra"), ("exact", "extra"), ("exact", "riding"), ("RMSNorm only", "extra")]:
        norms: PerSampleGradNorms | None = None if name == "none" else proxy_fidelity.recorder(model, name)
        proxy_fidelity.training_step(model, rollout, advantages, name, norms, how)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        if norms is not None:
            norms.remove()
    model.zero_grad()
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairwise(found))


def test_correlations_are_their_definitions():
    x, y = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 10.0, 100.0, 1000.0])
    assert proxy_fidelity.ranks(x).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert proxy_fidelity.spearman(x, y) == pytest.approx(np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1])
    assert proxy_fidelity.log_pearson(y**2, y) == pytest.approx(1.0)
    assert proxy_fidelity.spearman(np.ones(4), y) == 0.0


def test_agreement_tells_prompts_from_outputs():
    """A proxy that knows the prompts, and ranks the outputs of each the wrong way round."""
    exact = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0], [5.0, 5.0, 5.0]])
    proxy = np.array([[3.0, 2.0, 1.0], [30.0, 20.0, 10.0], [5.0, 5.0, 5.0]])
    rewards = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    row = proxy_fidelity.agreement(proxy, exact, rewards)
    assert row["spearman"] > 0.5
    assert row["spearman_within"] == pytest.approx(-1.0)
    assert row["varied_prompts"] == 2
    baselines = [(3 / 6, 1 / 6), (20 / 60, 20 / 60), (0, 0)]  # by the proxy, by exact weights
    lost = [
        sum(w * (r - pair[k]) ** 2 for w_q, r_q, pair in zip(exact, rewards, baselines, strict=True)
            for w, r in zip(w_q, r_q, strict=True))
        for k in (0, 1)
    ]  # fmt: skip
    assert row["excess"] == pytest.approx(lost[0] / lost[1] - 1)
    assert proxy_fidelity.agreement(exact, exact, rewards)["excess"] == 0.0


def test_the_study_writes_its_table_and_picture(tmp_path, monkeypatch, capsys):
    small = {
        "mixed": proxy_fidelity.STUDIES["mixed"]._replace(stages=(0, 2), prompts=3, group=4, timed=4, turns=1),
        "chains": proxy_fidelity.STUDIES["chains"]._replace(
            stages=(0,), prompts=2, group=2, max_new_tokens=6, timed=2, turns=1
        ),
    }
    monkeypatch.setattr(proxy_fidelity, "STUDIES", small)
    monkeypatch.setattr(proxy_fidelity, "RESAMPLES", 5)
    monkeypatch.setattr(policy_stages, "SHARPENING", 1)
    monkeypatch.setattr(sys, "argv", ["bench", "--out", str(tmp_path)])
    proxy_fidelity.main()
    result = json.loads((tmp_path / "proxy_fidelity.json").read_text())
    assert {(row["policy"], row["stage"]) for row in result["rows"]} == {("mixed", 0), ("mixed", 2), ("chains", 0)}
    proxies = set(proxy_fidelity.PROXIES)
    assert {row["proxy"] for row in result["rows"]} == proxies - {"exact"}
    assert {row["proxy"] for row in result["costs"]} == proxies
    assert (tmp_path / "proxy_fidelity.png").stat().st_size > 5000
    assert "RMSNorm only" in capsys.readouterr().out
