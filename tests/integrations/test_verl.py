"""The estimators in verl's own registry, trainers and batches; the optimizers in its own FSDP engine."""

from __future__ import annotations

import math
import pickle
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paths import HELPERS

pytest.importorskip("verl", reason="a trainer that is optional")
pytest.importorskip("wrapt", reason="what the plugin needs beside verl")
pytest.importorskip("verl.trainer.ppo.v1", reason="verl without its own dependencies")

import numpy as np
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.v1 import PPOTrainerSync, trainer_base
from verl.utils import torch_functional as verl_functional

from snr_optim import GradWeightedBaseline, logit_grad_norms
from snr_optim.integrations.verl import SNRAdamW, estimators, replacing, trainers
from snr_optim.integrations.verl.__main__ import main
from snr_optim.integrations.verl.settings import check_required, check_unbiased

ACTOR = "actor_rollout_ref.actor"
OURS = ["algorithm.adv_estimator=grad_weighted", f"{ACTOR}.calculate_sum_pi_squared=True"]
UNBIASED = [
    f"{ACTOR}.loss_agg_mode=seq-mean-token-sum", "data.train_batch_size=128", f"{ACTOR}.ppo_mini_batch_size=128",
    f"{ACTOR}.optim.clip_grad=1e9", f"{ACTOR}.use_dynamic_bsz=True",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_learned():
    estimators._baselines.clear()


def configuration(*overrides):
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=list(overrides))


def batch(prompts=5, size=4, length=6, seed=0):
    """Rows in random order, as verl balances them over ranks, with a reward at their last token."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * size
    mask = (torch.arange(length) < torch.randint(1, length + 1, (rows, 1), generator=generator)).long()
    rewards = torch.zeros(rows, length)
    rewards[torch.arange(rows), mask.sum(1) - 1] = torch.rand(rows, generator=generator)
    probabilities = torch.rand(rows, length, generator=generator)
    tensors = {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "old_log_probs": probabilities.log(),
        "sum_pi_squared": probabilities**2 + (1 - probabilities) ** 2 * torch.rand(rows, length, generator=generator),
    }
    order = torch.randperm(rows, generator=generator)
    uid = np.array([f"prompt {i // size}" for i in order.tolist()], dtype=object)
    return DataProto(TensorDict({k: v[order] for k, v in tensors.items()}, [rows]), {"uid": uid})


def weights_by_hand(data):
    """One token after the other."""
    weights = []
    importance = data.batch.get("rollout_is_weights", torch.ones(data.batch["response_mask"].shape))
    for row in range(len(data)):
        total = 0.0
        for token in range(data.batch["response_mask"].shape[1]):
            if data.batch["response_mask"][row, token]:
                p = math.exp(data.batch["old_log_probs"][row, token])
                norm = 1 - 2 * p + float(data.batch["sum_pi_squared"][row, token])
                total += norm * float(importance[row, token]) ** 2
        weights.append(total)
    return weights


def advantages(data, name, config=None):
    return ray_trainer.compute_advantage(data, name, config=config or {}).batch["advantages"]


# -- estimators -----------------------------------------------------------------------------------------------


def test_oblr_po_is_the_weighted_mean_of_the_other_outputs_of_the_prompt():
    data = batch()
    found = advantages(data, "oblr_po")
    rewards, weights, uid = data.batch["token_level_rewards"].sum(1).tolist(), weights_by_hand(data), None
    rows = defaultdict(list)
    for row, uid in enumerate(data.non_tensor_batch["uid"]):
        rows[uid].append(row)
    for row, uid in enumerate(data.non_tensor_batch["uid"]):
        others = [j for j in rows[uid] if j != row]
        baseline = sum(weights[j] * rewards[j] for j in others) / sum(weights[j] for j in others)
        expected = (rewards[row] - baseline) * data.batch["response_mask"][row].float()
        assert torch.allclose(found[row], expected, rtol=1e-4, atol=1e-6)
    to_go = data.batch["token_level_rewards"].flip(1).cumsum(1).flip(1) * data.batch["response_mask"]
    assert torch.allclose(data.batch["returns"], to_go)


def test_grad_weighted_is_the_baseline_of_the_library_and_learns_from_every_batch_once():
    reference = GradWeightedBaseline()
    for seed in range(3):
        data = batch(seed=seed)
        groups = torch.tensor([int(uid.split()[1]) for uid in data.non_tensor_batch["uid"]])
        rewards = data.batch["token_level_rewards"].sum(1)
        expected = reference.advantages(rewards, torch.tensor(weights_by_hand(data)), groups=groups, update=True)
        assert torch.allclose(advantages(data, "grad_weighted")[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_without_weights_and_within_the_prompt_it_is_the_rloo_of_verl():
    data = batch()
    config = {"snr_optim": {"weights": "none", "scope": "group"}}
    theirs = advantages(batch(), "rloo")
    assert torch.allclose(advantages(data, "grad_weighted", config), theirs, rtol=1e-5, atol=1e-6)


def test_rows_that_pad_the_batch_change_nothing_and_have_no_advantage():
    data, padded = batch(), batch()
    rows, length = data.batch["response_mask"].shape
    tensors = {k: torch.cat([v, torch.zeros(3, length, dtype=v.dtype)]) for k, v in padded.batch.items()}
    uid = np.array([*padded.non_tensor_batch["uid"], "pad", "pad", "pad"], dtype=object)
    found = []
    for each in (data, DataProto(TensorDict(tensors, [rows + 3]), {"uid": uid})):
        estimators._baselines.clear()
        found.append((advantages(each, "grad_weighted"), estimators.baseline_of("grad_weighted").state_dict()))
    assert torch.equal(found[0][0], found[1][0][:rows])
    assert (found[1][0][rows:] == 0).all()
    for name, value in found[0][1]["_extra_state"].items():
        assert torch.equal(value, found[1][1]["_extra_state"][name]), name


def test_a_reward_at_a_token_that_is_not_trained_on_counts():
    data = batch()  # verl puts it at the last token, which may be a tool's, or rejected
    data.batch["response_mask"][torch.arange(20), data.batch["response_mask"].sum(1) - 1] = 0
    data.batch["response_mask"][:, 0] = 1
    theirs = advantages(DataProto(data.batch.clone(), dict(data.non_tensor_batch)), "rloo")
    found = advantages(data, "oblr_po", {"snr_optim": {"weights": "none"}})
    assert torch.allclose(found, theirs, rtol=1e-5, atol=1e-6)


def test_importance_weights_between_rollout_and_training_weigh_twice():
    data = batch()
    data.batch["rollout_is_weights"] = torch.rand(20, 6) + 0.5
    groups = torch.tensor([int(uid.split()[1]) for uid in data.non_tensor_batch["uid"]])
    rewards, weights = data.batch["token_level_rewards"].sum(1), torch.tensor(weights_by_hand(data))
    expected = GradWeightedBaseline("group").advantages(rewards, weights, groups=groups)
    assert torch.allclose(advantages(data, "oblr_po")[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(advantages(batch(), "oblr_po")[:, 0], expected, rtol=1e-2)


@pytest.mark.parametrize(("name", "value"), [("old_log_probs", math.nan), ("token_level_rewards", math.inf)])
def test_rows_that_are_not_finite_are_said_and_count_nowhere(name, value):
    data, without = batch(), batch()
    token = int(data.batch["response_mask"][3].sum()) - 1
    data.batch[name][3, token] = value
    without.batch["response_mask"][3] = 0
    with pytest.warns(UserWarning, match=r"NaN or infinite in 1 rows"):
        found = advantages(data, "oblr_po")
    assert torch.equal(found, advantages(without, "oblr_po"))
    assert (found[3] == 0).all()


def test_weights_below_zero_by_rounding_count_as_zero():
    data = batch()
    data.batch["old_log_probs"][:] = 0.0
    data.batch["sum_pi_squared"][:] = 1 - 1e-6
    assert torch.allclose(advantages(data, "oblr_po"), advantages(batch(), "rloo"), atol=1e-6)  # all alike: RLOO


def confident(rest, words, count=50):
    """Logits of tokens with probability ``1 - rest``, which are the first; the others share the rest at random."""
    others = torch.randn(count, words - 1, dtype=torch.float64).log_softmax(-1) + math.log(rest)
    logits = torch.cat([torch.full((count, 1), math.log1p(-rest), dtype=torch.float64), others], -1)
    return logits, torch.zeros(count, dtype=torch.long)


@pytest.mark.parametrize("words", [2, 5, 1000])
@pytest.mark.parametrize("rest", [0.5, 1e-2, 1e-4, 1e-6, 1e-9])
def test_weights_of_confident_tokens_are_within_a_factor_of_two_of_those_from_logits(rest, words):
    logits, chosen = confident(rest, words)
    reference = logit_grad_norms(logits, chosen)
    # The best that verl can hand over: the right numbers, rounded to float32.
    log_probs = torch.full((len(logits),), math.log1p(-rest), dtype=torch.float64).float()
    sum_pi_squared = logits.softmax(-1).square().sum(-1).float()
    found = estimators.token_grad_norms(log_probs, sum_pi_squared)
    assert ((found >= reference / 2 * (1 - 1e-6)) & (found <= reference * 2 * (1 + 1e-6))).all()
    error = 2**-24 + 2**-23 * rest  # of sum_pi_squared <= 1, and of p^2 by log p
    assert ((found - reference).abs() <= error + 1e-6 * reference).all()
    textbook = 1 - 2 * log_probs.exp() + sum_pi_squared
    if rest <= 1e-6:
        assert not ((textbook >= reference / 2) & (textbook <= reference * 2)).any()


@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0, 10.0])
def test_what_verl_computes_from_logits_gives_weights_near_those_from_logits(scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(200, 2000, generator=generator) + 10
    chosen = torch.distributions.Categorical(logits=logits).sample()
    log_probs = verl_functional.logprobs_from_logits(logits, chosen)
    sum_pi_squared = verl_functional.calculate_sum_pi_squared_from_logits(logits)
    found, reference = estimators.token_grad_norms(log_probs, sum_pi_squared), logit_grad_norms(logits, chosen)
    # Both are made of logsumexp, some tens here, which float32 rounds at 2e-6; the norm is a difference of such terms.
    assert torch.allclose(found.float(), reference, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 5e-7, 5e-5), (torch.bfloat16, 0.05, 1.0)])
def test_verls_sums_are_off_by_as_much_as_the_page_says(dtype, least, most):
    """The page has 7e-6 and 16 to 61 %; how logsumexp rounds is the machine's business, its order of magnitude not."""
    worst = 0.0
    for scale in (1.0, 3.0, 6.0):
        logits = (scale * torch.randn(50, 32_000, generator=torch.Generator().manual_seed(0)) + 10).bfloat16()
        exact = logits.double().softmax(-1).square().sum(-1)
        found = verl_functional.calculate_sum_pi_squared_from_logits(logits.to(dtype))
        worst = max(worst, float((found / exact - 1).abs().max()))
    assert least < worst < most


def test_a_token_that_is_not_finite_has_no_weight_that_is():
    nan, half = torch.tensor([math.nan]), torch.tensor([0.5])
    assert estimators.token_grad_norms(nan, half).isnan().all()
    assert estimators.token_grad_norms(half.log(), nan).isnan().all()


def test_lengths_as_weights():
    data = batch()
    config = {"snr_optim": {"weights": "length", "scope": "group"}}
    groups = torch.tensor([int(uid.split()[1]) for uid in data.non_tensor_batch["uid"]])
    rewards, lengths = data.batch["token_level_rewards"].sum(1), data.batch["response_mask"].sum(1)
    expected = GradWeightedBaseline("group").advantages(rewards, lengths.float(), groups=groups)
    assert torch.allclose(advantages(data, "grad_weighted", config)[:, 0], expected, atol=1e-6)


def test_a_batch_without_a_mask_gets_verls():
    data = batch()
    data.batch["responses"] = torch.zeros(20, 6)
    data.batch["attention_mask"] = torch.cat([torch.ones(20, 2), data.batch["response_mask"]], dim=1)
    del data.batch["response_mask"]
    assert torch.equal(advantages(data, "oblr_po"), advantages(batch(), "oblr_po"))


def test_arguments_by_position_are_those_of_verl():
    by_position = ray_trainer.compute_advantage(batch(), "oblr_po", 1.0, 1.0, 4, True, {}).batch["advantages"]
    assert torch.equal(by_position, advantages(batch(), "oblr_po"))


def test_what_is_missing_or_unknown_is_named_with_the_way_out():
    data = batch()
    del data.batch["sum_pi_squared"]
    with pytest.raises(ValueError, match=r"sum_pi_squared not in the batch.*calculate_sum_pi_squared=True"):
        advantages(data, "grad_weighted")
    with pytest.raises(ValueError, match=r"algorithm.snr_optim.weights: expected one of logit, length, none"):
        advantages(batch(), "grad_weighted", {"snr_optim": {"weights": "exact"}})
    with pytest.raises(ValueError, match=r"algorithm\.snr_optim.*scop"):
        advantages(batch(), "grad_weighted", {"snr_optim": {"scop": "group"}})
    data = batch()
    del data.non_tensor_batch["uid"]
    with pytest.raises(ValueError, match="uid"):
        advantages(data, "oblr_po")


def test_other_estimators_are_verls_own():
    data, same = batch(), batch()
    found = advantages(data, "grpo")
    expected, _ = core_algos.compute_grpo_outcome_advantage(
        same.batch["token_level_rewards"], same.batch["response_mask"], same.non_tensor_batch["uid"]
    )
    assert torch.equal(found, expected)


# -- the V1 trainer -------------------------------------------------------------------------------------------


class Queue(dict):
    """TransferQueue: fields by name, one row for each key."""

    def kv_batch_get(self, keys, partition_id, select_fields):
        found = {name: self[name] for name in select_fields if name in self}
        assert keys == self["keys"]
        return TensorDict(found, batch_size=[len(keys)])

    def kv_batch_put(self, keys, partition_id, fields):
        self.update(fields.items())
        return KVBatchMeta(keys=keys, partition_id=partition_id, tags=[{} for _ in keys])


def nested(tensor, mask):
    return torch.nested.as_nested_tensor(
        [row[: int(n)] for row, n in zip(tensor, mask.sum(1), strict=True)], layout=torch.jagged
    )


def v1_trainer(monkeypatch, data, config, keys=None):
    """A trainer of verl with a queue and an actor that stand in for those that need a cluster."""
    mask = data.batch["response_mask"]
    keys = keys or [f"{uid.replace(' ', '')}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
    queue = Queue(
        keys=keys,
        response_mask=nested(mask, mask),
        rm_scores=nested(data.batch["token_level_rewards"], mask),
        responses=nested(mask, mask),
        rollout_log_probs=nested(data.batch["old_log_probs"], mask),
        uid=torch.tensor([int(uid.split()[1]) for uid in data.non_tensor_batch["uid"]]),
    )
    asked = []

    def compute_log_prob(meta):
        """The outputs of the whole sequences, two tokens of prompt before them, each about the next token."""
        asked.append(dict(meta.extra_info))
        names = {"log_probs": "old_log_probs", "entropy": "old_log_probs"}
        if meta.extra_info.get("calculate_sum_pi_squared"):
            names["sum_pi_squared"] = "sum_pi_squared"
        for name, source in names.items():
            rows = [
                torch.cat([torch.zeros(1), row[: int(n)], torch.zeros(1)])
                for row, n in zip(data.batch[source], mask.sum(1), strict=True)
            ]
            queue[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
        return keys

    monkeypatch.setattr(trainer_base, "tq", queue)
    trainer = object.__new__(PPOTrainerSync)
    trainer.config = config
    trainer.actor_rollout_wg = SimpleNamespace(compute_log_prob=compute_log_prob)
    trainer.global_steps = 3
    meta = KVBatchMeta(keys=keys, partition_id="train", tags=[{} for _ in keys])
    return trainer, meta, queue, asked


def test_the_v1_trainer_asks_its_actor_for_the_weights_and_hands_them_on(monkeypatch):
    data = batch()
    trainer, meta, queue, asked = v1_trainer(monkeypatch, data, configuration(*OURS))
    metrics = {}
    meta = trainer._compute_old_log_prob(meta, metrics)
    assert asked[0]["calculate_sum_pi_squared"] is True
    assert "calculate_sum_pi_squared" not in meta.extra_info  # the training pass would compute it again
    trainer._compute_advantage(meta, metrics)
    assert trainers._extra_tensors.get() is None
    estimators._baselines.clear()
    expected = advantages(batch(), "grad_weighted")
    found = torch.nested.to_padded_tensor(queue["advantages"], 0.0)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert metrics["baseline/kappa"] == 64


def test_the_v1_trainer_does_as_before_with_estimators_of_its_own(monkeypatch):
    trainer, meta, queue, asked = v1_trainer(monkeypatch, batch(), configuration("algorithm.adv_estimator=grpo"))
    metrics = {}
    trainer._compute_advantage(trainer._compute_old_log_prob(meta, metrics), metrics)
    assert "calculate_sum_pi_squared" not in asked[0]
    found = torch.nested.to_padded_tensor(queue["advantages"], 0.0)
    assert torch.allclose(found, advantages(batch(), "grpo"), atol=1e-5)
    assert not any(name.startswith("baseline/") for name in metrics)


@pytest.mark.parametrize("settings", [["+algorithm.snr_optim.weights=length"], []])
def test_the_v1_trainer_asks_for_weights_only_where_the_config_does(monkeypatch, settings):
    data = batch()
    config = configuration(*OURS, f"{ACTOR}.calculate_sum_pi_squared=false", *settings)
    trainer, meta, _, asked = v1_trainer(monkeypatch, data, config)
    meta = trainer._compute_old_log_prob(meta, {})
    assert "calculate_sum_pi_squared" not in asked[0]
    if settings:
        trainer._compute_advantage(meta, {})
    else:
        with pytest.raises(ValueError, match="sum_pi_squared not in the batch"):
            trainer._compute_advantage(meta, {})


def test_several_outputs_of_one_session_are_refused(monkeypatch):
    data = batch()
    keys = [f"a_{row // 2}_{row % 2}" for row in range(len(data))]
    trainer, meta, _, _ = v1_trainer(monkeypatch, data, configuration(*OURS), keys)
    with pytest.raises(NotImplementedError, match="several outputs for one session"):
        trainer._compute_advantage(meta, {})


@pytest.mark.parametrize("kind", [trainer_base.PPOTrainer, ray_trainer.RayPPOTrainer])
def test_checkpoints_keep_what_the_baseline_has_learned(kind, tmp_path, monkeypatch):
    replaced = {name: getattr(kind, name) for name in ("_save_checkpoint", "_load_checkpoint")}
    assert all(getattr(method, "_snr_optim", False) for method in replaced.values())
    saved, loaded = [], []
    save = trainers._saving(lambda self: saved.append(self.global_steps))
    load = trainers._loading(lambda self: loaded.append(self.global_steps))
    config = configuration(*OURS, f"trainer.default_local_dir={tmp_path}")
    trainer = SimpleNamespace(config=config, global_steps=7)
    advantages(batch(), "grad_weighted")
    save(trainer)
    expected = advantages(batch(seed=1), "grad_weighted")
    estimators._baselines.clear()
    load(trainer)
    assert torch.equal(advantages(batch(seed=1), "grad_weighted"), expected)
    assert saved == loaded == [7]
    OmegaConf.update(config, "trainer.resume_mode", "resume_path")
    OmegaConf.update(config, "trainer.resume_from_path", str(tmp_path / "elsewhere" / "global_step_7"))
    estimators._baselines.clear()
    load(trainer)
    assert estimators.baseline_of("grad_weighted") is None  # there is none
    OmegaConf.update(config, "trainer.resume_from_path", str(tmp_path / "global_step_7"))
    OmegaConf.update(config, "algorithm.snr_optim", {"scope": "batch"}, force_add=True)
    with pytest.raises(ValueError, match=r"snr_optim_baseline\.pt: .*Resume with the algorithm\.snr_optim"):
        load(trainer)
    other = SimpleNamespace(config=configuration("algorithm.adv_estimator=grpo"), global_steps=7)
    save(other)  # writes nothing: another folder, and another estimator
    assert not Path(other.config.trainer.default_local_dir).exists()


# -- configs --------------------------------------------------------------------------------------------------


def test_check_names_what_cannot_work_and_what_is_biased(capsys):
    assert check_required(configuration(*OURS)) == []
    assert check_unbiased(configuration(*OURS, *UNBIASED)) == []
    [none, alone] = check_required(configuration("algorithm.adv_estimator=oblr_po"))
    assert "rollout.n=1 leaves no other output" in alone
    assert none.endswith(f"set {ACTOR}.calculate_sum_pi_squared=True")
    weighted = ["algorithm.adv_estimator=grad_weighted", "+algorithm.snr_optim.weights=none"]
    assert check_required(configuration(*weighted)) == []
    assert check_required(configuration("algorithm.adv_estimator=grpo")) == []
    optimizer = [f"{ACTOR}.optim.optimizer_impl=snr_optim.integrations.verl", f"{ACTOR}.optim.optimizer=SNRAdamW"]
    [finding] = check_required(configuration(*optimizer))
    assert finding.endswith(f"set {ACTOR}.strategy=fsdp2")
    assert check_required(configuration(*optimizer, f"{ACTOR}.strategy=fsdp2")) == []
    biased = {
        f"{ACTOR}.loss_agg_mode": "token-mean", f"{ACTOR}.ppo_mini_batch_size": 64, f"{ACTOR}.ppo_epochs": 2,
        f"{ACTOR}.use_kl_loss": True, f"{ACTOR}.entropy_coeff": 0.1, f"{ACTOR}.optim.clip_grad": 1.0,
        f"{ACTOR}.policy_loss.loss_mode": "gspo", "algorithm.use_kl_in_reward": True,
        "algorithm.filter_groups.enable": True, "algorithm.use_pf_ppo": True,
        "algorithm.rollout_correction.rollout_rs": "token_k1", "algorithm.rollout_correction.rollout_is": "token",
        "distillation.enabled": True, "actor_rollout_ref.rollout.do_sample": False,
        "algorithm.rollout_correction.bypass_mode": True, "trainer.v1.trainer_mode": "colocate_async",
        "actor_rollout_ref.rollout.temperature": 0.7,
        "actor_rollout_ref.rollout.top_p": 0.9, "actor_rollout_ref.rollout.top_k": 50,
    }  # fmt: skip
    good = configuration(*OURS, *UNBIASED)
    for name, value in biased.items():
        before = OmegaConf.select(good, name, default="nothing")
        assert before != "nothing", name  # this version has it
        OmegaConf.update(good, name, value)
        [finding] = check_unbiased(good)
        OmegaConf.update(good, name, before)
        assert finding.startswith(f"{name}={value!r} ")
        assert f"set {name}" in finding
    OmegaConf.update(good, f"{ACTOR}.loss_agg_mode", "seq-mean-token-sum-norm")  # by the longest of a micro-batch
    assert check_unbiased(good)
    OmegaConf.update(good, f"{ACTOR}.loss_scale_factor", 512)
    assert check_unbiased(good) == []


def test_the_command_finds_its_way_into_verl_and_reads_a_config(capsys):
    assert main(["check", *OURS, *UNBIASED]) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "PROBLEM" not in out
    assert "biased" not in out
    assert "ok       registered: grad_weighted" in out
    assert main(["check", "algorithm.adv_estimator=oblr_po", f"{ACTOR}.use_dynamic_bsz=True"]) == 1
    assert "PROBLEM  actor_rollout_ref.actor.calculate_sum_pi_squared=False" in capsys.readouterr().out
    assert main(["check", *OURS, *UNBIASED, "no.such.setting=1"]) == 1
    assert "verl does not accept the config" in capsys.readouterr().out
    optimizer = [f"{ACTOR}.strategy=fsdp2", f"{ACTOR}.optim.optimizer_impl=snr_optim.integrations.verl"]
    for wrong, said in {
        f"{ACTOR}.optim.optimizer=SNRAdam": "SNRAdam",
        f"{ACTOR}.optim.override_optimizer_config={{snr: {{floor: 1}}}}": "floor",
        "+algorithm.snr_optim.scop=group": "scop",
    }.items():
        assert main(["check", *OURS, *UNBIASED, *optimizer, f"{ACTOR}.optim.optimizer=SNRAdamW", wrong]) == 1
        assert re.search(rf"PROBLEM .*{said}", capsys.readouterr().out)


@pytest.mark.parametrize(("policy", "code"), [("none", 1), ("other, snr_optim", 0)])
def test_the_command_says_whether_verl_loads_us(policy, code, monkeypatch, capsys):
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", policy)
    assert main(["check"]) == code


def test_a_version_of_verl_that_is_laid_out_differently_is_said_and_left_alone(caplog):
    module = SimpleNamespace(__name__="verl.other", PPOTrainer=type("PPOTrainer", (), {}))
    before = dict(replacing.problems)
    replacing.guarded(trainers.change_ray_trainer)(module)
    try:
        assert "verl.other" in " ".join(replacing.problems)
        assert "snr-optim does not know this version of verl" in caplog.text
        assert not hasattr(module, "compute_advantage")
    finally:
        replacing.problems.clear()
        replacing.problems.update(before)


# -- the engine -----------------------------------------------------------------------------------------------


def test_an_optimizer_that_nobody_attached_does_not_step():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = SNRAdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    for each in (optimizer, pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(RuntimeError, match=r"SNRAdamW: nobody has called attach\(model\)"):
            each.step()
    assert torch.equal(parameter, torch.ones(2))
    with pytest.raises(TypeError, match="floor"):
        SNRAdamW([parameter], lr=0.1, snr={"floor": 0.1})


def test_a_function_is_replaced_once_and_only_if_it_has_the_parameters():
    owner = type("Owner", (), {"step": lambda self, x: x})
    double = lambda original: lambda self, x: 2 * original(self, x)  # noqa: E731
    for _ in range(2):
        replacing.replace(owner, "step", double, ["self", "x"])
    assert owner().step(1) == 2
    before = dict(replacing.problems)
    replacing.replace(type("Owner", (), {"step": lambda self, y: y}), "step", double, ["x"])
    [where] = replacing.problems.keys() - before.keys()
    assert replacing.problems.pop(where) == "has no parameter x"


@pytest.mark.parametrize("processes", [1, 2])
def test_in_verls_fsdp_engine_the_step_is_that_of_measured_gradients(processes, tmp_path):
    cases = HELPERS / "verl_cases.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, str(cases), str(tmp_path)], capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(list(tmp_path.glob("passed*"))) == processes
