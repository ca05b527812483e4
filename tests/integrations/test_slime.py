"""``advantages`` in slime: its numbers, the gradient that slime's loss makes of them, checkpoints, and the page.

Stand-ins follow slime at 624b824a898ab0ec1fcb4d373004c7f3852bf515. Where slime can be imported the same runs in its own
classes; What it imports and no test needs, SGLang and Megatron above all, is then replaced by mocks.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.machinery
import inspect
import itertools
import re
import shlex
import sys
import types
import warnings
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pages
import pytest
import torch

from snr_optim import GradWeightedBaseline, logit_grad_norms
from snr_optim.integrations.slime import SlimeAdvantages, check_unbiased
from snr_optim.integrations.slime import functions as integration

LONGEST = 8


@dataclass
class Sample:
    """What of slime's ``Sample`` is looked at."""

    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    tokens: list[int] = field(default_factory=list)
    response_length: int = 0
    reward: Any = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False


class Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of which anything can be imported, and none does anything."""

    ROOTS = ("sglang", "sglang_router", "megatron", "torch_memory_saver", "wandb")

    def find_spec(self, name, path=None, target=None):
        mocked = name.split(".")[0] in self.ROOTS
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mocked else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


@pytest.fixture
def slime_modules(monkeypatch):
    """How to import a module of slime; skips where there is none."""
    pytest.importorskip("slime.utils.types", reason="a trainer that is optional")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Mocks()])  # last: what is installed is taken
    return importlib.import_module


@pytest.fixture(params=["stand-in", "slime"])
def make_sample(request):
    if request.param == "stand-in":
        return Sample
    return pytest.importorskip("slime.utils.types", reason="a trainer that is optional").Sample


def settings(**changed):
    default = {
        "advantage_estimator": "grpo", "normalize_advantages": False, "rollout_max_response_len": LONGEST,
        "reward_key": None, "calculate_per_token_loss": False, "custom_pg_loss_reducer_function_path": None,
        "rollout_batch_size": 8, "n_samples_per_prompt": 4, "global_batch_size": 32, "load": None, "save": None,
    }  # fmt: skip
    return SimpleNamespace(**default | changed)


def batch(make_sample, sizes=(4, 2, 5), seed=0, first_group=0):
    """Groups of several sizes, as slime hands them over: flat."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for group, size in enumerate(sizes, first_group):
        for _ in range(size):
            length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
            log_probs = torch.rand(length, generator=generator, dtype=torch.float64).log()
            samples.append(
                make_sample(
                    group_index=group, index=len(samples), tokens=[0] * (length + 2), response_length=length,
                    reward=float(torch.rand((), generator=generator)), rollout_log_probs=log_probs.tolist(),
                )
            )  # fmt: skip
    return samples


def weight(sample):
    return sum((1 - torch.tensor(x, dtype=torch.float64).exp().item()) ** 2 for x in sample.rollout_log_probs)


def expected(baseline, samples):
    """Of the baseline, on what is to be read off the samples one by one; divided by slime's loss later."""
    columns = [(s.reward, weight(s), s.group_index, s.response_length / LONGEST) for s in samples]
    rewards, weights, groups, lengths = torch.tensor(columns, dtype=torch.float64).T
    return baseline.advantages(rewards, weights, groups.long(), update=True) * lengths


def test_advantages_are_the_baselines_times_lengths_whatever_order_and_size_groups_have(make_sample):
    advantages, reference = SlimeAdvantages(), GradWeightedBaseline()
    for seed in range(3):  # the later ones know the earlier ones
        samples = batch(make_sample, seed=seed, first_group=10 * seed)
        samples = [samples[i] for i in torch.randperm(len(samples)).tolist()]
        raw, processed = advantages(settings(), samples)
        assert raw == [sample.reward for sample in samples]
        torch.testing.assert_close(torch.tensor(processed, dtype=torch.float64), expected(reference, samples))


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])  # from uniform to nearly certain
def test_weights_from_chosen_tokens_alone_are_within_a_factor_of_two_of_those_from_logits(scale):
    logits = scale * torch.randn(200, 6, 50, dtype=torch.float64)
    chosen = torch.distributions.Categorical(logits=logits).sample()
    exact = logit_grad_norms(logits, chosen).sum(1)
    log_probs = logits.log_softmax(-1).gather(-1, chosen[..., None]).squeeze(-1)
    samples = [Sample(rollout_log_probs=row.tolist()) for row in log_probs]
    ours = torch.tensor([SlimeAdvantages().gradient_weight(s, torch.ones(6)) for s in samples], dtype=torch.float64)
    assert (ours <= exact * (1 + 1e-9)).all()
    assert (ours >= exact / 2 * (1 - 1e-9)).all()
    assert (exact > 0).all()


@pytest.mark.parametrize("missing", [None, float("nan"), {"score": None}])
def test_a_reward_that_is_missing_gives_no_advantage_and_counts_for_no_other_output(make_sample, missing):
    key = "score" if isinstance(missing, dict) else None
    samples, args = batch(make_sample), settings(reward_key=key)
    rewards = [sample.reward for sample in samples]
    for sample, reward in zip(samples, rewards, strict=True):
        sample.reward = {key: reward} if key else reward
    samples[1].reward = missing
    raw, processed = SlimeAdvantages()(args, samples)
    assert processed[1] == 0
    assert raw[1] != raw[1]  # NaN
    _, without = SlimeAdvantages()(args, samples[:1] + samples[2:])
    assert processed[:1] + processed[2:] == pytest.approx(without, rel=1e-12)


def test_an_output_that_was_aborted_before_its_first_token_counts_for_no_other_one(make_sample):
    samples = batch(make_sample)
    aborted = make_sample(group_index=1, response_length=0, reward=None, rollout_log_probs=None)
    _, processed = SlimeAdvantages()(settings(), [*samples, aborted])
    _, without = SlimeAdvantages()(settings(), samples)
    assert processed == [*without, 0.0]
    assert SlimeAdvantages()(settings(), []) == ([], [])


def test_samples_of_one_rollout_are_one_output(make_sample):
    """Two chains of an agent's output, against the output in one piece."""
    whole = batch(make_sample, sizes=(3, 3))
    pieces = batch(make_sample, sizes=(3, 3))
    long = max(pieces, key=lambda sample: sample.response_length)
    place, cut = pieces.index(long), long.response_length // 2
    parts = []
    for span in (slice(None, cut), slice(cut, None)):
        parts.append(
            make_sample(
                group_index=long.group_index, index=long.index, rollout_id=99, reward=long.reward, tokens=long.tokens,
                response_length=len(long.rollout_log_probs[span]), rollout_log_probs=long.rollout_log_probs[span],
            )
        )  # fmt: skip
    _, processed = SlimeAdvantages()(settings(), pieces[:place] + parts + pieces[place + 1 :])
    _, in_one = SlimeAdvantages()(settings(), whole)
    assert processed[place] == processed[place + 1] == pytest.approx(in_one[place], rel=1e-12)
    assert processed[:place] + processed[place + 1 :] == pytest.approx(in_one, rel=1e-12)
    parts[1].reward += 1
    with pytest.raises(ValueError, match=r"reward: expected one for all samples of a rollout_id"):
        SlimeAdvantages()(settings(), parts)


def test_tokens_that_are_not_trained_on_do_not_count(make_sample):
    samples, masked = batch(make_sample), batch(make_sample)
    for sample in masked:  # a tool's answer, of any probability, behind the policy's own tokens
        sample.loss_mask = [1] * sample.response_length + [0, 0]
        sample.response_length += 2
        sample.rollout_log_probs = [*sample.rollout_log_probs, 0.0, -9.0]
    assert SlimeAdvantages()(settings(), masked)[1] == pytest.approx(SlimeAdvantages()(settings(), samples)[1])
    masked[0].remove_sample = True
    assert SlimeAdvantages()(settings(), masked)[1][0] == 0


@pytest.mark.parametrize(
    ("changed", "of_args", "message"),
    [
        ({"group_index": None}, {}, "group_index: expected the number of the prompt"),
        ({"rollout_log_probs": None}, {}, "rollout_log_probs: expected one for each of the . tokens .* got None"),
        ({"rollout_log_probs": [-1.0] * 20}, {}, "got 20; set them in your generate function, or override"),
        ({}, {"advantage_estimator": "ppo"}, "advantage_estimator='ppo' does something of its own"),
        ({}, {"normalize_advantages": True}, "takes the baseline away again"),
        ({}, {"rollout_max_response_len": None}, "rollout_max_response_len: expected a number"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(make_sample, changed, of_args, message):
    samples = batch(make_sample)
    for name, value in changed.items():
        setattr(samples[0], name, value)
    with pytest.raises(ValueError, match=message):
        SlimeAdvantages()(settings(**of_args), samples)


def test_a_baseline_that_would_gather_is_refused():
    baseline = GradWeightedBaseline()
    baseline.process_group = object()
    with pytest.raises(ValueError, match="without process_group"):
        SlimeAdvantages(baseline)


def test_settings_that_bias_are_named_once():
    advantages, args = SlimeAdvantages(), settings(partial_rollout=True, global_batch_size=16)
    with pytest.warns(UserWarning, match=r"global_batch_size=16 makes several .*; partial_rollout=True trains on"):
        advantages(args, batch(Sample))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advantages(args, batch(Sample))
    assert check_unbiased(settings()) == []


# ------------------------------------------------------------------------------------------------------- the gradient
OUTPUTS = [[0], [1, 0], [1, 1, 0], [1, 1, 1]]  # a policy of one bit that ends at 0: lengths 1, 2, 3, 3
REWARDS = [0.3, 1.0, 0.0, 2.0]


def log_probs_of(theta, tokens):
    return torch.stack([theta[t].log_softmax(0)[token] for t, token in enumerate(tokens)])


def slime_loss(log_probs, old, advantages, denominators, count, per_token=False):
    """``policy_loss_function``, ``get_sum_of_sample_mean`` and ``loss_function`` without parallelism."""
    losses = []
    for now, before, advantage, denominator in zip(log_probs, old, advantages, denominators, strict=True):
        ratio = (now - before).exp()
        loss = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        losses.append(loss.sum() if per_token else loss.sum() / denominator)
    return sum(losses) / (sum(map(len, log_probs)) if per_token else count)


def drawn(theta, indices):
    return [
        Sample(
            group_index=0, response_length=len(OUTPUTS[i]), reward=REWARDS[i],
            rollout_log_probs=log_probs_of(theta.detach(), OUTPUTS[i]).tolist(),
        )
        for i in indices
    ]  # fmt: skip


def test_the_mean_gradient_of_slimes_loss_is_that_of_the_reward_which_it_is_not_without_the_lengths():
    theta = torch.tensor([[0.2, 0.5], [-0.3, 0.4], [0.1, -0.6]], dtype=torch.float64, requires_grad=True)
    probabilities = torch.stack([log_probs_of(theta, tokens).sum().exp() for tokens in OUTPUTS])
    (true,) = torch.autograd.grad((probabilities * torch.tensor(REWARDS)).sum(), theta)

    def mean_gradient(undo):
        total = torch.zeros_like(theta)
        for indices in itertools.product(range(len(OUTPUTS)), repeat=3):  # every group of three
            samples = drawn(theta, indices)
            _, advantages = SlimeAdvantages()(settings(), samples)
            lengths = [sample.response_length for sample in samples]
            if undo:
                advantages = [a * LONGEST / n for a, n in zip(advantages, lengths, strict=True)]
            now = [log_probs_of(theta, OUTPUTS[i]) for i in indices]
            loss = slime_loss(now, [x.detach() for x in now], advantages, lengths, count=3)
            total += probabilities[list(indices)].prod().detach() * torch.autograd.grad(loss, theta)[0]
        return -total

    torch.testing.assert_close(mean_gradient(undo=False) * LONGEST, true)
    biased = mean_gradient(undo=True)
    assert torch.nn.functional.cosine_similarity(biased.flatten(), true.flatten(), dim=0) < 0.999


@pytest.mark.parametrize("how", [{"calculate_per_token_loss": True}, {"custom_pg_loss_reducer_function_path": "a.b"}])
def test_where_the_loss_is_not_divided_by_lengths_neither_are_advantages_multiplied(how):
    samples = batch(Sample)
    with pytest.warns(UserWarning, match=next(iter(how))):
        _, processed = SlimeAdvantages()(settings(rollout_max_response_len=None, **how), samples)
    lengths = torch.tensor([sample.response_length for sample in samples]) / LONGEST
    torch.testing.assert_close(
        torch.tensor(processed, dtype=torch.float64) * lengths, expected(GradWeightedBaseline(), samples)
    )


def test_the_gradient_of_slimes_own_loss_is_that_of_the_sum_of_log_probs(slime_modules, monkeypatch):
    """From its ``RolloutManager``, over two data-parallel ranks that hold parts of groups, to its loss function."""
    rollout, loss = map(slime_modules, ("slime.ray.rollout", "slime.backends.megatron_utils.loss"))
    Sample = slime_modules("slime.utils.types").Sample
    theta = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    picks = [0, 1, 2, 3, 3, 1, 0, 2]
    samples = [
        Sample(
            group_index=i // 4, index=i, tokens=[5, *OUTPUTS[pick]], response_length=len(OUTPUTS[pick]),
            reward=REWARDS[pick], rollout_log_probs=log_probs_of(theta.detach(), OUTPUTS[pick]).tolist(),
            status=Sample.Status.COMPLETED,
        )
        for i, pick in enumerate(picks)
    ]  # fmt: skip
    args = settings(
        rollout_batch_size=2, global_batch_size=8, use_dynamic_batch_size=False, micro_batch_size=2, balance_data=False,
        balance_by_flops=False,
        max_tokens_per_gpu=None, loss_type="policy_loss", use_rollout_logprobs=False, eps_clip=0.2, eps_clip_high=0.2,
        eps_clip_c=None, use_opsm=False, get_mismatch_metrics=False, use_tis=False, entropy_coef=0.0, use_kl_loss=False,
        recompute_loss_function=False, allgather_cp=False, rollout_top_p=1.0,
    )  # fmt: skip
    manager = object.__new__(rollout.RolloutManager.__ray_metadata__.modified_class)
    manager.args, manager.custom_convert_samples_to_train_data_func = args, None
    manager.custom_reward_post_process_func = SlimeAdvantages()
    manager.train_parallel_config = {
        "dp_size": 2, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1
    }  # fmt: skip
    monkeypatch.setattr(rollout.ray, "put", lambda value, **_: value)
    ranks = [box.inner for box in manager._split_train_data_by_dp(manager._convert_samples_to_train_data(samples))]
    assert all({samples[i].group_index for i in rank["partition"]} == {0, 1} for rank in ranks)

    def its_log_probs(logits, *, unconcat_tokens, response_lengths, **_):
        each = [log_probs_of(theta, t[-n:].tolist()) for t, n in zip(unconcat_tokens, response_lengths, strict=True)]
        return None, {"log_probs": each, "entropy": [torch.zeros_like(x) for x in each]}

    monkeypatch.setattr(loss, "get_log_probs_and_entropy", its_log_probs)
    for module in {loss, slime_modules("slime.backends.megatron_utils.cp_utils")}:
        mpu = MagicMock()
        mpu.get_context_parallel_world_size.return_value, mpu.get_data_parallel_world_size.return_value = 1, 2
        monkeypatch.setattr(module, "mpu", mpu)
    gradient = torch.zeros_like(theta)
    for rank in ranks:
        rewards = torch.tensor(rank["rewards"], dtype=torch.float64)
        shaped = [r.expand(n) for r, n in zip(rewards, rank["response_lengths"], strict=True)]
        for rows in rank["micro_batch_indices"]:
            of_batch = {
                "advantages": [shaped[i] for i in rows],
                "unconcat_tokens": [torch.as_tensor(rank["tokens"][i]) for i in rows],
                "response_lengths": [rank["response_lengths"][i] for i in rows],
                "total_lengths": [len(rank["tokens"][i]) for i in rows],
                "loss_masks": [torch.as_tensor(rank["loss_masks"][i]) for i in rows],
                "rollout_mask_sums": [torch.as_tensor(rank["rollout_mask_sums"][i]) for i in rows],
            }
            micro = len(rank["micro_batch_indices"])
            value, *_ = loss.loss_function(args, of_batch, micro, 8, torch.zeros(1))
            gradient += torch.autograd.grad(value, theta)[0] / micro / 2  # Megatron's means over both

    plain = expected(GradWeightedBaseline(), samples) / torch.tensor([s.response_length / LONGEST for s in samples])
    objective = sum(a * log_probs_of(theta, OUTPUTS[pick]).sum() for a, pick in zip(plain, picks, strict=True))
    torch.testing.assert_close(-gradient * 8 * LONGEST, torch.autograd.grad(objective, theta)[0])


# --------------------------------------------------------------------------------------------------------- checkpoints
@pytest.fixture(params=["stand-in", "slime"])
def with_data_source(request, monkeypatch):
    if request.param == "slime":
        request.getfixturevalue("slime_modules")
        return

    class RolloutDataSourceWithBuffer:
        def __init__(self, args):
            self.saved, self.loaded = [], []

        def save(self, rollout_id):
            self.saved.append(rollout_id)

        def load(self, rollout_id=None):
            self.loaded.append(rollout_id)

    module = types.ModuleType("slime.rollout.data_source")
    module.RolloutDataSourceWithBuffer = RolloutDataSourceWithBuffer
    for name in ("slime", "slime.rollout"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "slime.rollout.data_source", module)


def test_a_resumed_run_goes_on_with_the_baseline_of_its_checkpoint(with_data_source, tmp_path):
    args = settings(save=str(tmp_path), load=str(tmp_path), rollout_global_dataset=False, buffer_filter_path=None)
    before, after, anew = SlimeAdvantages(), SlimeAdvantages(), SlimeAdvantages()
    source = before.data_source(args)
    for rollout_id in range(3):
        before(args, batch(Sample, seed=rollout_id))
        source.save(rollout_id)
    names = sorted(path.name for path in (tmp_path / "rollout").glob("*baseline*"))
    assert names == [f"snr_optim_baseline_{i}.pt" for i in range(3)]
    after.data_source(args).load(2)
    anew.data_source(args).load(7)  # no such checkpoint
    batches = [one(args, batch(Sample, seed=9))[1] for one in (before, after, anew)]
    assert batches[0] == batches[1] != batches[2]
    if hasattr(source, "saved"):
        assert source.saved == [0, 1, 2]


def test_without_a_checkpoint_to_load_a_run_begins_anew(with_data_source, tmp_path):
    SlimeAdvantages().data_source(settings(rollout_global_dataset=False, buffer_filter_path=None)).load(-1)


# ------------------------------------------------------------------------------------------------------------ the page
def test_slime_and_megatron_are_not_imported_with_the_module():
    tree = ast.parse(inspect.getsource(integration))
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names]
    assert names
    assert not [name for name in names if name.split(".")[0] in ("slime", "megatron", "ray", "sglang")]


def paths_of(command):
    """``--option a.b.c`` of a shell command, resolved as slime's ``load_function`` does it."""
    words = shlex.split(command, comments=True)
    for option, value in itertools.pairwise(words):
        if re.fullmatch(r"--[a-z-]+-path", option):
            module, _, name = value.rpartition(".")
            yield option, getattr(importlib.import_module(module), name)


def test_the_paths_of_the_page_are_callable_with_what_slime_calls_them_with():
    [before, after] = pages.code("slime.md", "bash")
    paths = dict(paths_of(after))
    assert inspect.signature(paths.pop("--custom-reward-post-process-path")).bind("args", "samples")
    assert inspect.signature(paths.pop("--data-source-path")).bind("args")
    assert not paths
    assert pages.changed_lines(before, after) <= 2
    words = shlex.split(after, comments=True)
    assert words[words.index("--advantage-estimator") + 1] in integration.ESTIMATORS


def test_the_module_of_the_page_is_as_good_as_the_default(monkeypatch):
    [code] = pages.code("slime.md")
    own: dict[str, Any] = {}
    exec(code, own)
    samples = batch(Sample)
    for sample in samples:
        sample.rollout_log_probs = None
    _, processed = own["advantages"](settings(), samples)
    lengths = torch.tensor([float(sample.response_length) for sample in samples], dtype=torch.float64)
    groups, rewards = (torch.tensor([getattr(s, name) for s in samples]) for name in ("group_index", "reward"))
    plain = GradWeightedBaseline(scope="group").advantages(rewards.double(), lengths, groups)
    torch.testing.assert_close(
        torch.tensor(processed, dtype=torch.float64), plain * lengths / LONGEST, check_dtype=False
    )
    assert inspect.signature(own["data_source"]).bind("args")
