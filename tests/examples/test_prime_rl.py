"""The example for prime-rl: gradients of its loss, advantages of its algorithm, and the page's settings.

Stand-ins follow prime-rl at 559b44772e471d1538537b8805cc77f3824a5e64. Where it can be imported the same runs in its own
classes.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import itertools
import shlex
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pages
import pytest
import torch
from torch import Tensor

from examples import prime_rl_loss
from examples.prime_rl_loss import DECAY, gradient_weight, group_advantages, reinforce
from snr_optim import GradientMoments, GradWeightedBaseline, SNRAdaptiveLR, logit_grad_norms

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib


@dataclass
class LossInputs:
    """prime-rl's."""

    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = field(default=None)


def stand_in_loss(*, trainer_logprobs, inference_logprobs, advantages, loss_mask, rl_weights, rl_loss_fn, rl_scale):
    """``compute_loss`` for the rl component: a sum over sequences, by the number of trained tokens of the batch."""
    streams = [None] * len(trainer_logprobs) if rl_weights is None else rl_weights
    total = trainer_logprobs[0].sum() * 0.0
    columns = zip(trainer_logprobs, inference_logprobs, advantages, loss_mask, streams, strict=True)
    for ours, theirs, credit, mask, weights in columns:
        mask = mask if weights is None else mask & (weights != 0)
        if weights is None or mask.any():
            total = total + rl_loss_fn(LossInputs(ours, theirs, None, credit, mask, weights)).loss
    return total / rl_scale


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch):
    """The folder with the copied file, as the page tells the reader to put it there."""
    monkeypatch.syspath_prepend(str(Path(prime_rl_loss.__file__).parent))


@pytest.fixture(params=["stand-in", "prime-rl"])
def loss_of(request):
    if request.param == "stand-in":
        return stand_in_loss
    module = pytest.importorskip("prime_rl.trainer.rl.loss", reason="a trainer that is optional")
    unused = {
        "ref_logprobs": None, "ce_weights": None, "ref_kl_weights": None, "ce_scale": 1, "ref_kl_scale": 1
    }  # fmt: skip
    config = module.CustomLossConfig(import_path="prime_rl_loss.reinforce", kwargs={})

    def its_loss(rl_loss_fn, **given):
        configured = module.setup_rl_loss_fn(config) if rl_loss_fn is reinforce else rl_loss_fn
        loss, metrics = module.compute_loss(rl_loss_fn=configured, **given, **unused)
        assert set(metrics) == {"sequence_ratio", "reinforce_mismatch_kl"}
        return loss

    return its_loss


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_advantages_times_log_probs(loss_of, weighted):
    lengths = [3, 7, 4]
    log_probs = [torch.randn(n, requires_grad=True) for n in lengths]
    masks = [torch.rand(n) < 0.6 for n in lengths]
    credits = [torch.full((n,), value) for n, value in zip(lengths, (0.7, -1.3, 2.0), strict=True)]
    streams = [torch.rand(n).round(decimals=1) for n in lengths] if weighted else None
    scale = int(sum(mask.sum() for mask in masks))
    loss = loss_of(
        trainer_logprobs=log_probs, inference_logprobs=[x.detach() + 0.1 for x in log_probs], advantages=credits,
        loss_mask=masks, rl_weights=streams, rl_loss_fn=reinforce, rl_scale=scale,
    )  # fmt: skip
    ones = [torch.ones(n) for n in lengths]
    sums = [
        (credit[mask] * stream[mask] * x[mask]).sum()
        for credit, mask, stream, x in zip(credits, masks, streams or ones, log_probs, strict=True)
    ]
    expected = torch.autograd.grad(-torch.stack(sums).sum() / scale, log_probs)
    for ours, theirs in zip(torch.autograd.grad(loss, log_probs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_off_policy_the_mean_gradient_over_what_another_policy_says_is_that_of_the_reward():
    theta = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)  # two tokens out of three
    other = torch.randn(2, 3, dtype=torch.float64).log_softmax(1)
    rewards = torch.rand(3, 3, dtype=torch.float64)
    means = dict.fromkeys([True, False], 0)
    objective = 0
    for tokens in itertools.product(range(3), repeat=2):
        ours, theirs = (x[torch.arange(2), tokens] for x in (theta.log_softmax(1), other))
        objective = objective + ours.sum().exp() * rewards[tokens]
        inputs = LossInputs(ours, theirs, None, rewards[tokens].expand(2), torch.ones(2, dtype=torch.bool))
        for off_policy in means:
            (gradient,) = torch.autograd.grad(reinforce(inputs, off_policy=off_policy).loss, theta, retain_graph=True)
            means[off_policy] = means[off_policy] - theirs.sum().exp() * gradient
    (true,) = torch.autograd.grad(objective, theta)
    torch.testing.assert_close(means[True], true)
    assert not torch.allclose(means[False], true, rtol=0.05)


def test_masked_tokens_may_be_anything():
    mask = torch.tensor([False, True])
    log_probs = torch.tensor([-torch.inf, -1.0], requires_grad=True)
    bad = torch.tensor([torch.nan, 0.5])
    loss, metrics = reinforce(LossInputs(log_probs, bad, None, bad, mask), off_policy=True)
    loss.backward()
    assert log_probs.grad[0] == 0
    assert all(value.isfinite() for value in metrics.values())
    nothing = reinforce(LossInputs(log_probs, bad, None, bad, mask & False))
    assert nothing.loss == 0


# -------------------------------------------------------------------------------------------------------- the baseline
def trace(reward, log_probs, prompt=2):
    """Of a single message; log-probs of the sampled tokens alone, as verifiers keep them."""
    sampled = SimpleNamespace(
        token_ids=[0] * (prompt + len(log_probs)), logprobs=list(log_probs),
        mask=[False] * prompt + [True] * len(log_probs), advantages=None,
    )  # fmt: skip
    asked = SimpleNamespace(token_ids=[0], mask=[False], logprobs=[0.0], advantages=None)
    return SimpleNamespace(
        id="t", reward=reward, nodes=[asked, sampled], has_error=False, agent=SimpleNamespace(trainable=True, name="a")
    )  # fmt: skip


def groups(count=4, size=3):
    for _ in range(count):
        yield [trace(torch.rand(()).item(), torch.rand(int(n)).log().tolist()) for n in torch.randint(1, 6, (size,))]


def test_the_weight_is_within_a_factor_of_two_of_that_from_logits():
    logits = torch.randn(100, 5, 20) * torch.logspace(-1, 1, 100)[:, None, None]
    chosen = torch.distributions.Categorical(logits=logits).sample()
    exact = logit_grad_norms(logits.double(), chosen).sum(1)
    log_probs = logits.double().log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
    ours = torch.tensor([gradient_weight(trace(0.0, row.tolist())) for row in log_probs], dtype=torch.float64)
    assert ((ours <= exact * (1 + 1e-6)) & (ours >= exact / 2 * (1 - 1e-6))).all()


def test_a_group_at_a_time_the_baseline_learns_of_the_ones_before():
    ours, reference = (GradWeightedBaseline(decay=DECAY) for _ in range(2))
    for traces in groups():
        rewards = torch.tensor([t.reward for t in traces], dtype=torch.float64)
        weights = torch.stack([(1 - torch.tensor(t.nodes[1].logprobs).double().exp()).square().sum() for t in traces])
        expected = reference.advantages(rewards, weights, groups=len(traces), update=True)
        torch.testing.assert_close(torch.tensor(group_advantages(ours, traces), dtype=torch.float64), expected)


def test_a_reward_that_is_missing_has_no_advantage_and_a_group_without_outputs_none():
    traces = [trace(reward, [-1.0, -2.0]) for reward in (1.0, None, 0.0)]
    advantages = group_advantages(GradWeightedBaseline(), traces)
    assert advantages[1] == 0
    assert advantages[0] > 0 > advantages[2]
    assert group_advantages(GradWeightedBaseline(), []) == []


def test_log_probs_that_are_missing_are_refused():
    broken = trace(1.0, [-1.0, -2.0])
    broken.nodes[1].logprobs = []
    with pytest.raises(ValueError, match=r"one for each of the 2 sampled tokens of a message in trace 't', got 0"):
        gradient_weight(broken)


@pytest.fixture(params=["stand-in", "prime-rl"])
def algorithm(request, monkeypatch):
    """prime-rl's modules that the example imports, and a config of theirs."""
    if request.param == "prime-rl":
        pytest.importorskip("prime_rl.orchestrator.algo.grpo", reason="a trainer that is optional")
        config = importlib.import_module("prime_rl.configs.algorithm").GRPOAlgoConfig()
        return prime_rl_loss.oblr_algorithm(), config

    class GRPOAlgorithm:
        def __init__(self, config, policy_pool):
            self.length_penalty = config.length_penalty

    def iter_trainable_traces(episodes):
        for episode in episodes:
            for one in episode.traces:
                if not one.has_error and one.agent.trainable and any(any(node.mask) for node in one.nodes):
                    yield episode, one

    def assign_advantages(one, value):
        for node in one.nodes:
            if any(node.mask):
                node.advantages = [value] * sum(node.mask)

    parts = {"base": iter_trainable_traces, "grpo": GRPOAlgorithm, "routing": assign_advantages}
    for package in ("prime_rl", "prime_rl.orchestrator", "prime_rl.orchestrator.algo"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for name, value in parts.items():
        module = types.ModuleType(f"prime_rl.orchestrator.algo.{name}")
        setattr(module, value.__name__, value)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return prime_rl_loss.oblr_algorithm(), SimpleNamespace(length_penalty=None)


def test_the_algorithm_gives_every_sampled_token_the_advantage_and_errors_none(algorithm):
    make, config = algorithm
    algo, reference = make(config, None), GradWeightedBaseline(decay=DECAY)
    for traces in groups():
        failed = trace(0.0, [-1.0])
        failed.has_error = True
        expected = group_advantages(reference, traces)
        asyncio.run(algo.score_group([SimpleNamespace(traces=[t]) for t in [*traces, failed]]))
        for one, value in zip(traces, expected, strict=True):
            assert one.nodes[1].advantages == [value] * len(one.nodes[1].logprobs)
            assert not one.nodes[0].advantages
        assert failed.nodes[1].advantages is None


def test_rewards_relative_to_the_group_and_outputs_that_are_not_independent_are_refused(algorithm):
    make, config = algorithm
    two = [SimpleNamespace(traces=traces) for traces in groups(2)]
    with pytest.raises(ValueError, match="one trainable trace in each"):
        asyncio.run(make(config, None).score_group(two))
    penalised = copy.copy(config)
    penalised.length_penalty = object()
    with pytest.raises(ValueError, match="length_penalty"):
        make(penalised, None)


def test_main_puts_the_algorithm_where_prime_rl_looks_it_up(monkeypatch):
    launched = []
    for package in ("prime_rl", "prime_rl.orchestrator", "prime_rl.entrypoints"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules["prime_rl.entrypoints"].orchestrator = SimpleNamespace(main=lambda: launched.append(dict(table)))
    algo = types.ModuleType("prime_rl.orchestrator.algo")
    algo.ALGORITHM_CLASSES = table = {"grpo": None, "rae": int}
    monkeypatch.setitem(sys.modules, "prime_rl.orchestrator.algo", algo)
    monkeypatch.setattr(prime_rl_loss, "oblr_algorithm", lambda: str)
    prime_rl_loss.main()
    assert launched == [{"grpo": str, "rae": int}]


# ------------------------------------------------------------------------------------------------------------ the page
def test_the_page_changes_few_lines_and_names_what_is_there():
    before, after = pages.code("prime-rl.md", "toml")
    assert pages.changed_lines(before, after) <= 3
    loss = tomllib.loads(after)["trainer"]["loss"]
    assert loss["type"] == "custom"
    module, _, name = loss["import_path"].rpartition(".")
    function = getattr(importlib.import_module(module), name)
    assert inspect.signature(function).bind("inputs", **loss["kwargs"])
    assert tomllib.loads(after)["orchestrator"]["algo"]["type"] == "grpo"
    [commands] = pages.code("prime-rl.md", "bash")
    scripts = [word for line in commands.splitlines() for word in shlex.split(line, comments=True) if ".py" in word]
    assert scripts == [Path(prime_rl_loss.__file__).name]


def test_prime_rl_takes_the_settings_of_the_page():
    config = pytest.importorskip("prime_rl.configs.trainer", reason="a trainer that is optional")
    config.CustomLossConfig(**tomllib.loads(pages.code("prime-rl.md", "toml")[1])["trainer"]["loss"])


class TrainLoop:
    """One step of prime-rl's ``train``, without what is of no consequence to gradients."""

    def __init__(self, changes):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 4)
        self.names = {"model": self.model, "optimizer": torch.optim.AdamW(self.model.parameters(), lr=0.1)}
        self.names["scheduler"] = torch.optim.lr_scheduler.ConstantLR(self.names["optimizer"], factor=1.0)
        setup, self.around = changes
        exec(setup, self.names)

    def step(self, micro_batches, scale):
        for inputs, tokens, masks in micro_batches:
            log_probs = self.model(inputs).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
            self.names |= {"loss": -(log_probs * torch.cat(masks)).sum() / scale}
            self.names |= {"loss_mask": torch.cat(masks)[None], "sequence_lengths": [len(mask) for mask in masks]}
            exec(self.around, self.names)
        for parameter in self.model.parameters():
            parameter.grad.mul_(1.0)  # scale_gradients_, one process
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.names["optimizer"].step()
        used = self.names["optimizer"].param_groups[0]["lr"]
        self.names["optimizer"].zero_grad()
        self.names["scheduler"].step()
        return used


def test_the_lines_for_the_trainer_measure_what_the_sub_batches_say():
    """Sums over unequal numbers of sequences, and a micro-batch of padding alone."""
    loop = TrainLoop(pages.code("prime-rl.md"))
    assert isinstance(loop.names["scheduler"], SNRAdaptiveLR)
    micro_batches = []
    for counts in ([2, 3], [4], [1, 1, 2], [3, 3]):
        n = sum(counts)
        masks = [torch.ones(count, dtype=torch.bool) for count in counts]
        micro_batches.append((1 + torch.randn(n, 3), torch.randint(2, (n,)), masks))  # two words of four: some signal
    micro_batches[1][2][0][:] = False
    model, scale = copy.deepcopy(loop.model), 13
    gradients = []
    for inputs, tokens, masks in micro_batches:
        loss = -(model(inputs).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1) * torch.cat(masks)).sum() / scale
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    sizes = torch.tensor([2.0, 1.0, 3.0, 2.0])  # padding counts as one
    means = torch.stack(gradients) * (sizes.sum() / sizes)[:, None]
    shares = sizes / sizes.sum()
    reference = SNRAdaptiveLR(torch.optim.SGD(model.parameters(), lr=0.1))
    reference.observe(
        GradientMoments(
            sq_norm_of_mean=(shares[:, None] * means).sum(0).square().sum().item(),
            mean_of_sq_norms=(shares * means.square().sum(1)).sum().item(), num_sub_batches=4,
        )
    )  # fmt: skip
    used = loop.step(micro_batches, scale)
    assert 0.05 < reference.factor < 0.95
    assert loop.names["scheduler"].metrics()["observations"] == 1
    assert used == pytest.approx(0.1 * reference.factor, rel=1e-4)
    loop.step(micro_batches, scale)
    assert loop.names["scheduler"].metrics()["observations"] == 2
