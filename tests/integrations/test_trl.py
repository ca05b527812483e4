"""``OBLRTrainerMixin`` in TRL's own trainers: their advantages, logs, checkpoints and gradients."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl", reason="a trainer that is optional")

from trainers import tiny_qwen3
from trl import GRPOConfig, GRPOTrainer, RLOOConfig
from trl_runs import (
    ACCUMULATED,
    GRPO,
    GRPO_UNBIASED,
    NUM_GENERATIONS,
    RLOO,
    ROWS,
    SETTINGS,
    UNBIASED,
    dataset,
    lengths,
    small_words,
    tokenizer,
    trained,
    weights_of,
)

from snr_optim import GradWeightedBaseline
from snr_optim.integrations.transformers import SNRCallback
from snr_optim.integrations.trl import OBLRTrainerMixin, check_unbiased


def added_up(of_functions):
    return torch.where(of_functions.isnan().all(1), torch.nan, of_functions.nan_to_num() @ torch.tensor([1.0, 0.1]))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("kind", [GRPO, RLOO])
def test_advantages_are_those_of_the_baseline_on_rewards_and_weights_of_every_generated_batch(kind, tmp_path):
    trainer = trained(kind, tmp_path, temperature=0.8, eval_strategy="steps", eval_steps=2)
    reference, seen = GradWeightedBaseline(), []
    for training, batch, of_functions, model in trainer.watched:
        rewards = added_up(of_functions)
        weights = weights_of(batch, model, temperature=0.8)
        size = NUM_GENERATIONS if training else 2
        expected = reference.advantages(rewards, weights, groups=size, update=training)
        assert torch.allclose(batch["advantages"], expected, rtol=1e-4, atol=1e-6)
        seen.append(training)
        last = expected
    assert seen.count(True) == 3
    assert seen.count(False) >= 1
    for name, value in trainer.baseline.state_dict()["_extra_state"].items():
        assert torch.allclose(value, reference.state_dict()["_extra_state"][name], rtol=1e-4), name  # learned once each
    assert list(trainer._logs["advantages"])[-len(last) :] == pytest.approx(last.tolist(), rel=1e-4, abs=1e-6)
    assert len(trainer._logs["advantages"]) == len(trainer._logs["completion"])
    assert len(logged(trainer, "baseline/kappa")) == 3
    assert len(logged(trainer, "eval_baseline/kappa")) >= 1


def test_completions_that_nobody_scored_have_no_advantage(tmp_path):
    trainer = trained(GRPO, tmp_path, rewards=[small_words], reward_weights=None)
    missing = torch.cat([of_functions.isnan().all(1) for _, _, of_functions, _ in trainer.watched])
    advantages = torch.cat([batch["advantages"] for _, batch, _, _ in trainer.watched])
    assert missing.any()
    assert (advantages[missing] == 0).all()
    assert (advantages[~missing] != 0).any()


def test_every_micro_batch_has_whole_prompts_and_all_rows_are_there(tmp_path):
    trainer = trained(GRPO, tmp_path, max_steps=1, rewards=[lengths], reward_weights=None)
    _, batch, _, _ = trainer.watched[-1]
    parts = trainer._buffered_inputs
    assert len(parts) == ACCUMULATED
    for part in parts:
        _, counts = part["oblr_prompt_group"].unique(return_counts=True)
        assert (counts == NUM_GENERATIONS).all()
        assert part["num_items_in_batch"] == batch["num_items_in_batch"]
    together = torch.cat([torch.cat([part["completion_ids"], part["advantages"][:, None]], 1) for part in parts])
    whole = torch.cat([batch["completion_ids"], batch["advantages"][:, None]], 1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, whole.tolist()))
    order = torch.cat([part["oblr_prompt_group"] for part in parts])[::NUM_GENERATIONS].tolist()
    assert sorted(order) == list(range(ROWS * ACCUMULATED // NUM_GENERATIONS))


@pytest.mark.parametrize(
    ("kind", "settings", "exact"),
    [
        (RLOO, {}, True),
        (GRPO, {"loss_type": "luspo"}, True),
        (GRPO, {"loss_type": "luspo", "importance_sampling_level": "sequence"}, True),
        (GRPO, {"loss_type": "dr_grpo"}, True),
        (GRPO, {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"}, True),
        (GRPO, {"loss_type": "grpo"}, False),
    ],
)
def test_the_gradient_is_the_sum_of_advantages_times_scores_where_check_unbiased_says_so(
    kind, settings, exact, tmp_path
):
    gradients = []

    class Keep(SNRCallback):
        def on_pre_optimizer_step(self, *args, model, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))

    trainer = trained(kind, tmp_path, callbacks=[Keep()], max_steps=1, **settings)
    findings = check_unbiased(trainer.args)
    assert bool(findings) is not exact, findings
    _, batch, _, model = trainer.watched[0]
    ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
    said = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)[:, 1:]
    log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    log_pi = (log_probs.gather(2, ids[:, 1:, None]).squeeze(2) * said).sum(1)
    (-(batch["advantages"] * log_pi).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    ratio = 1 / SETTINGS["max_completion_length"] if settings.get("loss_type") == "dr_grpo" else 1.0
    same = torch.allclose(gradients[0], expected * ratio, rtol=1e-3, atol=1e-6)
    assert same is exact
    assert bool(torch.cosine_similarity(gradients[0], expected, dim=0) > 0.9999) is exact


def test_learning_rate_and_baseline_resume_bit_for_bit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "loss_type": "dr_grpo"}
    whole = trained(GRPO, tmp_path, callbacks=[SNRCallback()], **saving)
    resumed = trained(GRPO, tmp_path / "b", callbacks=[SNRCallback()], resume=str(tmp_path / "checkpoint-2"), **saving)
    for name in ("learning_rate", "snr/factor", "snr/observations", "baseline/second_moment", "reward", "grad_norm"):
        assert logged(whole, name) == logged(resumed, name), name
    assert logged(whole, "snr/lr") == logged(whole, "learning_rate")
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_check_unbiased_names_every_setting_and_its_remedy(tmp_path):
    args = GRPOConfig(output_dir=str(tmp_path), **SETTINGS | GRPO_UNBIASED)
    assert check_unbiased(args) == []
    rloo = RLOOConfig(output_dir=str(tmp_path), **SETTINGS | UNBIASED | {"normalize_advantages": False})
    assert check_unbiased(rloo) == []
    defaults = " ".join(check_unbiased(GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)))
    for remedy in ("loss_type='luspo'", "scale_rewards='none'", "disable_dropout=True", "max_grad_norm=0"):
        assert remedy in defaults
    bad = {
        "loss_type": "bnpo", "scale_rewards": "batch", "multi_objective_aggregation": "normalize_then_sum",
        "beta": 0.1, "num_iterations": 2, "steps_per_generation": 4, "temperature": 0.7, "top_p": 0.9, "top_k": 50,
        "min_p": 0.1, "repetition_penalty": 1.1, "generation_kwargs": {"typical_p": 0.5}, "use_vllm": True,
        "disable_dropout": False, "neftune_noise_alpha": 5.0, "max_grad_norm": 1.0, "mask_truncated_completions": True,
        "entropy_coef": 0.1,
        "use_adaptive_entropy": True, "top_entropy_quantile": 0.8, "off_policy_mask_threshold": 0.5,
    }  # fmt: skip
    for name, value in bad.items():
        if not hasattr(args, name):
            continue
        good = getattr(args, name)
        setattr(args, name, value)
        [finding] = check_unbiased(args)
        assert finding.startswith(f"{name}={value!r} ")
        assert f"set {name}=" in finding
        setattr(args, name, good)
    args.steps_per_generation, args.gradient_accumulation_steps = 2, 4  # two generations for a step: on-policy
    assert check_unbiased(args) == []


def test_what_cannot_work_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(TypeError, match="put OBLRTrainerMixin first"):
        type("Wrong", (GRPOTrainer, OBLRTrainerMixin), {})
    with pytest.raises(RuntimeError, match="lacks _generate_and_score_completions"):
        type("Other", (OBLRTrainerMixin, GRPOTrainer.__mro__[2]), {})
    with pytest.raises(ValueError, match=r"Set beta=0\.0"):
        trained(RLOO, tmp_path, beta=0.05, max_steps=1)
    with pytest.warns(UserWarning, match="scale_rewards='group' divides"):
        trained(GRPO, tmp_path, scale_rewards="group", max_steps=1)
    for kind in (SNRCallback, type("Mine", (SNRCallback,), {})):
        with pytest.warns(UserWarning, match="size=2 is not a multiple of num_generations=4"):
            trained(GRPO, tmp_path, callbacks=[kind()], per_device_train_batch_size=2, max_steps=1)
    with pytest.raises(ValueError, match="without process_group"):
        trained(GRPO, tmp_path, baseline=GradWeightedBaseline(process_group=object()))
    args = GRPOConfig(output_dir=str(tmp_path), **SETTINGS)
    with pytest.raises(ValueError, match=r"require_unbiased:\n- loss_type='dapo'"):
        GRPO(tiny_qwen3(), lengths, args, train_dataset=dataset([{"prompt": "w2"}]), processing_class=tokenizer(),
             require_unbiased=True)  # fmt: skip


def test_the_head_in_float32_is_weighed_by_its_logits(tmp_path):
    trainer = trained(GRPO, tmp_path, max_steps=1, cast_lm_head_to_fp32=True)
    _, batch, _, model = trainer.watched[0]
    trainer.model.load_state_dict(model.state_dict())  # as it was when it generated the batch
    assert torch.allclose(trainer.gradient_weights(batch), weights_of(batch, model), rtol=1e-5)


def test_what_tools_have_said_does_not_weigh_and_images_are_refused(tmp_path):
    trainer = trained(GRPO, tmp_path, max_steps=1)
    _, batch, of_functions, model = trainer.watched[0]
    trainer.model.load_state_dict(model.state_dict())  # as it was when it generated the batch
    tool_mask = (torch.rand_like(batch["completion_mask"], dtype=torch.float) < 0.5).long()
    expected = weights_of(batch, model, chosen=batch["completion_mask"] * tool_mask)
    assert torch.allclose(trainer.gradient_weights({**batch, "tool_mask": tool_mask}), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match="override it"):
        trainer.gradient_weights({**batch, "pixel_values": torch.zeros(1)})
    trainer.reward_clip_range = (0.2, 0.5)  # RLOO has it
    assert torch.equal(
        trainer._rewards(of_functions).nan_to_num(7), added_up(of_functions).clamp(0.2, 0.5).nan_to_num(7)
    )


def test_a_loss_that_is_not_the_trainers_own_is_named():
    for changed in ({"_compute_loss": lambda self, model, inputs: 0.0}, {"aux_loss_enabled": True}):
        [finding] = object.__new__(type("Mine", (GRPO,), changed))._other_losses()
        assert finding.startswith("_compute_loss comes from" if "_compute_loss" in changed else "the router's")
    for kind in (GRPO, RLOO):
        assert object.__new__(kind)._other_losses() == []


def test_on_a_trainer_of_trl_without_the_mixin_the_callback_says_what_it_does_not_see(tmp_path):
    with pytest.warns(UserWarning, match="OBLRTrainerMixin .* keeps prompts whole"):
        trained(GRPOTrainer, tmp_path, callbacks=[SNRCallback()], max_steps=1)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed here")
def test_two_processes_share_one_baseline_and_one_lr(two_trainer_processes):
    ranks = [torch.load(two_trainer_processes / f"grpo{rank}.pt") for rank in range(2)]
    reference = GradWeightedBaseline()
    for of_functions, *local in zip(ranks[0]["rewards"], *(rank["local"] for rank in ranks), strict=True):
        weights, advantages = (torch.cat([part[i] for part in local]) for i in range(2))
        expected = reference.advantages(added_up(of_functions), weights, groups=NUM_GENERATIONS, update=True)
        assert torch.allclose(advantages, expected, rtol=1e-4, atol=1e-6)
    assert ranks[0]["log"] == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    for pair in zip(ranks[0]["rewards"], ranks[1]["rewards"], strict=True):
        assert torch.equal(*(of_functions.nan_to_num(-1) for of_functions in pair))
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    assert ranks[0]["metrics"]["observations"] == 2
