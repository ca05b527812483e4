"""The studies of baselines measure what they say: the covariance itself, the peers' own formulas, no bias by scale."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import baseline_speed, baseline_variance, learning_curves, policy_stages
from benchmarks.baseline_variance import PEERS, Study
from snr_optim import GradWeightedBaseline


def made_up_stage(prompts=8, outputs=3, length=4, parameters=6, seed=0):
    """A stage of random gradients; outputs of two to ``length`` tokens, the first of them shared."""
    generator = torch.Generator().manual_seed(seed)
    per_prompt, total = [], 0
    for _ in range(prompts):
        nodes = torch.full((outputs, length), -1)
        lengths = torch.randint(2, length + 1, (outputs,), generator=generator)
        for u, n in enumerate(lengths.tolist()):
            nodes[u, 0] = total
            nodes[u, 1:n] = torch.arange(n - 1) + total + 1 + u * length
        total += 1 + outputs * length
        token_weights = torch.rand(outputs, length, dtype=torch.float64, generator=generator) * (nodes >= 0)
        p = torch.rand(outputs, dtype=torch.float64, generator=generator) + 0.2
        rewards = torch.rand(outputs, dtype=torch.float64, generator=generator).round()
        per_prompt.append(policy_stages.Outputs(p / p.sum(), rewards, nodes, token_weights, token_weights.sum(1)))
    gradients = torch.randn(total, parameters, dtype=torch.float64, generator=generator)
    ids = torch.arange(prompts)
    history = [
        policy_stages.Recorded(
            torch.rand(prompts, 16, dtype=torch.float64, generator=generator).round(),
            torch.rand(prompts, 16, dtype=torch.float64, generator=generator), ids,
        )
        for _ in range(policy_stages.RECORDED)
    ]  # fmt: skip
    raw = policy_stages.Stage("addition", 1, per_prompt, ids, history, gradients @ gradients.T)
    sibling, share = policy_stages.siblings(per_prompt, total)
    for group in sibling.unique():
        members = sibling == group
        gradients[members] -= (share[members, None] * gradients[members]).sum(0)
    return raw, gradients


def test_coefficients_stand_for_gradients():
    stage, gradients = made_up_stage()
    policy_stages.centre(stage.gram, stage.outputs)
    study = Study(stage, torch.tensor([1, 4, 6]))
    d = study.draw(5, torch.Generator().manual_seed(0))
    used = torch.unique(torch.cat([stage.outputs[q].nodes[stage.outputs[q].nodes >= 0] for q in (1, 4, 6)]))
    advantages = torch.randn(1, 15, 4, dtype=torch.float64)
    explicit = torch.zeros(6, dtype=torch.float64)
    for i in range(15):
        for t in range(4):
            if d.mask[i, t]:
                explicit += advantages[0, i, t] * gradients[used[d.nodes[i, t]]]
    c = study.coefficients(d.nodes, advantages)
    assert torch.allclose(c @ gradients[used], explicit[None])
    assert torch.allclose(study.inner(c, c), explicit.square().sum())
    norms = [gradients[used[row[row >= 0]]].sum(0).square().sum() for row in d.nodes]
    assert torch.allclose(d.exact, torch.stack(norms))


def test_gradients_have_mean_zero_after_every_beginning():
    stage, gradients = made_up_stage()
    policy_stages.centre(stage.gram, stage.outputs)
    assert torch.allclose(stage.gram, gradients @ gradients.T, atol=1e-5)  # shares are float32
    for o in stage.outputs:
        scores = torch.stack([gradients[row[row >= 0]].sum(0) for row in o.nodes])
        assert (o.probability @ scores).abs().max() < 1e-6


def test_the_variance_is_that_of_the_batch_gradient():
    """One prompt, RLOO with two outputs: all nine pairs by hand against the draws of the study."""
    stage, gradients = made_up_stage(prompts=8)
    policy_stages.centre(stage.gram, stage.outputs)
    study = Study(stage, torch.arange(8))
    group, by_hand = 2, 0.0
    for o in stage.outputs:
        scores = torch.stack([gradients[row[row >= 0]].sum(0) for row in o.nodes])
        mean, second = 0.0, 0.0
        for i in range(3):
            for j in range(3):
                g = (o.rewards[i] - o.rewards[j]) * (scores[i] - scores[j]) / 2
                mean = mean + o.probability[i] * o.probability[j] * g
                second = second + o.probability[i] * o.probability[j] * g.square().sum()
        by_hand += float(second - mean.square().sum()) / 8**2
    scales = dict.fromkeys(baseline_variance.UNKNOWN_SCALES, (1.0, 0.0))
    rows = baseline_variance.measure(stage, 8, group, [study], 1500, scales)
    [rloo] = [row for row in rows if row["method"] == "RLOO"]
    assert rloo["variance"] == pytest.approx(by_hand, rel=0.05)  # 1500 draws: a standard error of about 2.1 %
    assert rloo["low"] <= rloo["to_oracle"] <= rloo["high"]
    [dr_grpo] = [row for row in rows if row["method"] == "Dr. GRPO"]
    assert dr_grpo["variance"] == pytest.approx(rloo["variance"])  # the same up to its scale
    [oracle] = [row for row in rows if row["method"] == "oracle"]
    assert oracle["to_oracle"] == 1.0


def test_the_length_of_a_biased_mean_is_found():
    stage, _ = made_up_stage()
    policy_stages.centre(stage.gram, stage.outputs)
    study = Study(stage, torch.arange(8))
    known = dict(PEERS)
    PEERS["GRPO"] = lambda d: 0.25 * known["RLOO"](d)
    try:
        lengths = baseline_variance.mean_lengths(study, group=4, draws=400)
    finally:
        PEERS["GRPO"] = known["GRPO"]
    length, error = lengths["GRPO"]
    assert 0 < error < 0.03
    assert length == pytest.approx(0.25, abs=4 * error)


def test_a_prompt_with_one_output_has_no_gradient():
    stage, _ = made_up_stage()
    lonely = stage.outputs[0]
    stage.outputs[0] = policy_stages.Outputs(*(field[:1] for field in lonely))._replace(
        probability=torch.ones(1).double()
    )
    policy_stages.centre(stage.gram, stage.outputs)
    study = Study(stage, torch.arange(8))
    assert study.oracle[0] == 0
    assert study.exact[0, 0] < 1e-5
    scales = baseline_variance.mean_lengths(study, 4, draws=5)
    rows = baseline_variance.measure(stage, 8, 4, [study], 5, scales)
    assert all(row["to_oracle"] > 0 for row in rows)


def test_peers_are_those_of_verl():
    algorithms = pytest.importorskip("verl.trainer.ppo.core_algos")
    stage, _ = made_up_stage()
    d = Study(stage, torch.arange(8)).draw(4, torch.Generator().manual_seed(0))
    mask, index = d.mask.double(), torch.arange(32).div(4, rounding_mode="floor").numpy()
    token_rewards = torch.zeros_like(mask)
    token_rewards[torch.arange(32), d.mask.sum(1) - 1] = d.rewards
    log_probs = torch.zeros_like(mask)  # p = 1, so that 1 - 2 p + sum p^2 is the weight where that is one more
    theirs = {
        "GRPO": algorithms.compute_grpo_outcome_advantage(token_rewards, mask, index)[0],
        "Dr. GRPO": algorithms.compute_grpo_outcome_advantage(
            token_rewards, mask, index, norm_adv_by_std_in_grpo=False
        )[0],
        "RLOO": algorithms.compute_rloo_outcome_advantage(token_rewards, mask, index)[0],
        "OPO": algorithms.compute_opo_outcome_advantage(token_rewards, mask, index)[0],
        "OTB": algorithms.compute_optimal_token_baseline_advantage(
            token_rewards, mask, index, log_probs, 1 + d.tokens
        )[0],
    }  # fmt: skip
    for name, expected in theirs.items():
        advantages = PEERS[name](d)
        by_token = advantages if advantages.dim() > 1 else advantages[:, None] * mask
        assert torch.allclose(by_token, expected, rtol=1e-5, atol=1e-6), name


def test_james_stein_is_its_definition():
    """Everything from the other prompts, one output at a time."""
    stage, _ = made_up_stage()
    d = Study(stage, torch.arange(8)).draw(4, torch.Generator().manual_seed(0))
    r, advantages = d.rewards.view(8, 4), PEERS["James-Stein"](d).view(8, 4)
    for q in range(8):
        others = torch.cat([r[:q], r[q + 1 :]])
        within, means = (others.var(1) / 4).mean(), others.mean(1)
        shrinkage = within / (within + means.var(correction=0) + 1e-6)
        for i in range(4):
            own = (r[q].sum() - r[q, i]) / 3
            baseline = (1 - shrinkage) * own + shrinkage * others.mean()
            assert advantages[q, i] == pytest.approx(float(r[q, i] - baseline), abs=1e-9)


def test_equal_beginnings_are_one_node():
    nodes, rows, places = policy_stages.prefix_tree(torch.tensor([[3, 4, -1], [3, 4, 5], [6, -1, -1]]))
    assert nodes.tolist() == [[0, 1, -1], [0, 1, 2], [3, -1, -1]]
    assert rows.tolist() == [0, 0, 1, 2]
    assert places.tolist() == [0, 1, 2, 0]


def test_token_gradients_add_up_to_those_of_outputs():
    model, tokenizer = policy_stages.tiny_qwen3(0)
    torch.manual_seed(0)
    batch = policy_stages.problems("mixed", 2, "test")
    outputs, gram = policy_stages.differentiate(model, tokenizer, batch, 4)
    torch.manual_seed(0)
    rollout, rewards = policy_stages.roll_out(model, tokenizer, batch, 4)
    norms = policy_stages.exact_norms(model, rollout)
    for q, o in enumerate(outputs):
        found = baseline_variance.squared_norms(o.nodes, gram)  # before centring
        for norm in norms[4 * q : 4 * q + 4]:
            assert (found / norm - 1).abs().min() < 1e-3
        assert float(o.probability.sum()) == pytest.approx(1.0)
        assert float((o.probability * o.rewards).sum()) == pytest.approx(float(rewards[4 * q : 4 * q + 4].mean()))
    assert torch.allclose(gram, gram.T)


def test_the_study_writes_its_table_and_picture(tmp_path, monkeypatch, capsys):
    stage, _ = made_up_stage()
    torch.save(stage, tmp_path / "stage.pt")
    monkeypatch.setattr(baseline_variance, "build_all", lambda *_: [tmp_path / "stage.pt"])
    options = ["--tasks", "addition", "--prompts", "8", "--groups", "2", "4", "--resamples", "0.2", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--out", str(tmp_path)])
    baseline_variance.main()
    result = json.loads((tmp_path / "baseline_variance.json").read_text())
    assert "--groups 2 4" in result["command"]
    assert {row["group"] for row in result["rows"]} == {2, 4}
    [oracle] = [row for row in result["summary"] if row["method"] == "oracle"]
    assert (oracle["median"], oracle["cells"]) == (1.0, 2)
    assert (tmp_path / "baseline_variance.png").stat().st_size > 5000


def test_the_summary_counts_cells():
    rows = [
        {"task": "t", "pass_rate": p, "prompts": 8, "group": 2, "method": method, "to_oracle": value}
        for p, values in (
            (0.1, {"RLOO": 2.0, "ours": 1.2, "oracle": 1.0}), (0.9, {"RLOO": 1.1, "ours": 1.3, "oracle": 1.0}),
        )
        for method, value in ({peer: 3.0 for peer in PEERS} | values).items()
    ]  # fmt: skip
    [ours] = [row for row in baseline_variance.summary(rows) if row["method"] == "ours"]
    assert ours["below_all_peers"] == 0.5
    assert ours["within_1.5"] == 1.0  # of the one cell where RLOO is at 1.5 or more
    assert ours["to_rloo_worst"] == pytest.approx(1.3 / 1.1)


def test_learning_curves_take_the_best_rate_of_other_seeds():
    rows = [
        dict(baseline=b, schedule="constant", lr=lr, seed=seed, steps=25, final=area, mean=area, rewards=[area] * 25)
        for b, areas in {"rloo": {1e-4: 0.2, 2e-4: 0.3}, "snr-optim": {1e-4: 0.4, 2e-4: 0.1}}.items()
        for lr, area in areas.items()
        for seed in (0, 1, *learning_curves.TUNING_SEEDS)
    ]  # fmt: skip
    chosen = {(b, "constant"): learning_curves.best_lr(rows, b, "constant", 25) for b in ("rloo", "snr-optim")}
    assert chosen == {("rloo", "constant"): 2e-4, ("snr-optim", "constant"): 1e-4}
    [_, ours] = learning_curves.summary(rows, chosen, [0, 1])
    assert ours["mean_minus_rloo"] == pytest.approx(0.1)
    assert ours["mean_minus_rloo_interval"] == pytest.approx([0.1, 0.1])


def test_speed_is_measured_on_the_same_result(tmp_path, monkeypatch, capsys):
    options = ["--batch", "16", "--length", "20", "--many", "64", "--seconds", "0", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    baseline_speed.main()
    rows = json.loads((tmp_path / "baseline_speed.json").read_text())["rows"]
    assert {"otb", "opo", "many"} == {row["what"] for row in rows}
    for name, theirs in baseline_speed.peers().items():  # where verl is installed: the same but for the own output
        o = baseline_speed.outputs(16, 20, torch.device("cpu"))
        included = GradWeightedBaseline("group", leave_one_out=False)
        monkeypatch.setattr(baseline_speed, "GradWeightedBaseline", lambda *_, b=included: b)
        ours = baseline_speed.by_token("group")(o) if name == "otb" else baseline_speed.by_output("group")(o)
        alone = (o["mask"].view(2, 8, 20).sum(1, keepdim=True) == 1).expand(2, 8, 20).reshape(16, 20)
        assert torch.allclose(torch.where(alone, 0, ours), torch.where(alone, 0, theirs(o)), rtol=1e-4, atol=1e-5)
