"""The example: learns, resumes bit for bit, stops at Ctrl-C, says what is wrong in one line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from paths import ROOT, environment
from rich.console import Console

from examples import qwen3_arithmetic as example
from examples.common.arithmetic import Problem, is_correct, problems
from examples.common.policy import sample, sequence_log_probs, tiny_qwen3
from examples.common.report import report, steps_to
from examples.common.runs import read_metrics
from snr_optim import GradWeightedBaseline, PerSampleGradNorms, SNRAdaptiveLR, per_sample_grad_norms_func

SMALL = ["--prompts", "4", "--group-size", "4", "--micro-batches", "2", "--warm-start-steps", "3"]


def command(*words):
    return [sys.executable, "-m", "examples.qwen3_arithmetic", *SMALL, *map(str, words)]


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, cwd=ROOT, env=environment())


def rows_without_time(folder):
    return [{k: repr(v) for k, v in row.items() if k != "seconds"} for row in read_metrics(folder)]


def test_resume_is_bit_exact_and_a_torn_last_line_is_dropped(tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert run("--steps", 6, "--out", straight).returncode == 0
    assert run("--steps", 3, "--out", resumed).returncode == 0
    with (resumed / "oblr-po-seed-0" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert run("--steps", 6, "--out", resumed, "--resume").returncode == 0
    a, b = straight / "oblr-po-seed-0", resumed / "oblr-po-seed-0"
    assert len(read_metrics(a)) == 6
    assert rows_without_time(a) == rows_without_time(b)
    ends = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b)]
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name])
    changed = run("--steps", 6, "--out", resumed, "--resume", "--lr", 0.5)
    assert changed.returncode != 0
    assert "lr" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_all_methods_in_two_processes_write_table_summary_and_picture(tmp_path):
    done = run("--method", "all", "--seeds", 0, 1, "--steps", 3, "--jobs", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "REINFORCE" in done.stdout
    methods = json.loads((tmp_path / "summary.json").read_text())["methods"]
    assert set(methods) == {"oblr-po", "grpo", "rloo", "reinforce"}
    assert all(entry["seeds"] == 2 and 0 <= entry["final_reward"] <= 1 for entry in methods.values())
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    first = json.loads((tmp_path / "grpo-seed-1" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "reward", "lr", "factor", "snr", "signal", "noise", "gradient_norm"} <= set(first)
    assert {"advantage_variance", "tokens", "seconds"} <= set(first)
    assert {"snr/snr_standard_error", "snr/skipped_invalid"} <= set(first)
    assert not any(name.startswith("baseline/") for name in first)  # GRPO's has nothing to say
    ours = json.loads((tmp_path / "oblr-po-seed-1" / "metrics.jsonl").read_text().splitlines()[0])
    assert ours["lr"] == ours["snr/lr"] == pytest.approx(ours["snr/ceiling"] * ours["factor"])
    assert {"baseline/kappa", "baseline/second_moment"} <= set(ours)


# -- one method in this process ----------------------------------------------------------------------------------------


def train_here(method, folder, *words):
    """The rows that it logs."""
    args = example.parse_arguments([*SMALL, "--steps", "2", "--out", str(folder), *map(str, words)])
    example.WarmStart(args, 0)(lambda row: None)
    job = example.Training(args, method, 0)
    job(lambda row: None)
    return rows_without_time(job.folder)


@pytest.fixture
def seen(monkeypatch):
    """What ``train`` sampled and from which weights, what its baseline was given, and who hooked the model."""
    seen = SimpleNamespace(rollouts=[], policies=[], weights=[], hooked=[])

    def recorded(model, *args):
        seen.policies.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        seen.rollouts.append(sample(model, *args))
        return seen.rollouts[-1]

    class Baseline(GradWeightedBaseline):
        def advantages(self, rewards, weights=None, **options):
            seen.weights.append(weights)
            return super().advantages(rewards, weights, **options)

    class Norms(PerSampleGradNorms):
        def __init__(self, model):
            seen.hooked.append("norms")
            super().__init__(model)

    class Scheduler(SNRAdaptiveLR):
        def attach(self, model):
            seen.hooked.append("noise")
            return super().attach(model)

    monkeypatch.setattr(example, "sample", recorded)
    monkeypatch.setattr(example, "PerSampleGradNorms", Norms)
    monkeypatch.setattr(example, "SNRAdaptiveLR", Scheduler)
    methods = {name: replace(each, baseline=lambda scope: Baseline()) for name, each in example.METHODS.items()}
    monkeypatch.setattr(example, "METHODS", methods)
    return seen


def test_the_weights_are_the_squared_norms_of_every_output(seen, tmp_path):
    """By torch.func, output by output. Both sum float32 products in another order: 1e-6 or so, and 1e-4 is ample."""
    train_here("oblr-po", tmp_path)
    assert len(seen.policies) == len(seen.weights) == 2
    model, _ = tiny_qwen3(0)
    for policy, (rollout, _), weights in zip(seen.policies, seen.rollouts, seen.weights, strict=True):
        model.load_state_dict(policy)
        expected = per_sample_grad_norms_func(model, lambda m, one: sequence_log_probs(m, one).sum(), rollout)
        assert weights.shape == (16,)
        assert torch.allclose(weights, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "words", "hooked", "weighted"),
    [
        ("oblr-po", [], ["noise", "norms"], True),
        ("oblr-po", ["--weights", "logit", "--no-measure"], ["noise"], True),
        ("oblr-po", ["--weights", "none"], ["noise"], False),
        ("rloo", [], ["noise"], False),
        ("rloo", ["--no-measure"], [], False),
        ("reinforce", ["--no-measure"], [], False),
    ],
)
def test_a_method_pays_for_the_hooks_that_it_uses(seen, tmp_path, method, words, hooked, weighted):
    rows = train_here(method, tmp_path, *words)
    assert seen.hooked == hooked
    assert ("snr/snr" in rows[0]) == ("noise" in hooked)
    assert [weights is not None for weights in seen.weights] == [weighted, weighted]


@pytest.fixture
def easy(monkeypatch):
    """A verifier that a policy without training satisfies now and then."""
    monkeypatch.setattr(example, "is_correct", lambda text, problem: len(text) % 2 == 0)


def test_measuring_does_not_change_the_training(easy, tmp_path):
    measured, bare = (train_here("grpo", tmp_path / word, f"--{word}") for word in ("measure", "no-measure"))
    assert 0 < float(measured[0]["reward"]) < 1
    for name in ("reward", "lr", "advantage_variance", "tokens"):
        assert [row[name] for row in measured] == [row[name] for row in bare]
    assert {row["noise"] for row in bare} == {"nan"}
    console = Console(file=io.StringIO(), width=120)
    report(tmp_path, {"grpo": [tmp_path / "no-measure" / "grpo-seed-0"]}, example.METHODS, console)
    assert json.loads((tmp_path / "summary.json").read_text())["methods"]["grpo"]["gradient_norm_spread"] is None
    assert "GRPO" in console.file.getvalue()


def test_the_smoothing_may_be_that_of_the_library(easy, tmp_path):
    assert example.parse_arguments([]).smoothing == 0.9
    auto, number = (train_here("oblr-po", tmp_path, "--smoothing", value)[1] for value in ("auto", "0.95"))
    # Step 0 says nothing about errors yet. From then on auto pulls the factor to its floor, by its standard error.
    assert auto["snr/signal"] == number["snr/signal"]
    assert float(auto["factor"]) < float(number["factor"])


@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_keeps_what_was_done(tmp_path, jobs):
    words = command("--method", "rloo", "--seeds", 0, 1, "--steps", 100_000, "--jobs", jobs, "--out", tmp_path)
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path / "rloo-seed-0")) < 3 and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "RLOO" in out
    rows = read_metrics(tmp_path / "rloo-seed-0")
    checkpoint = torch.load(tmp_path / "rloo-seed-0" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == len(rows) - 1 >= 2


def test_a_local_model_takes_the_place_of_the_built_in_one(tmp_path):
    model, tokenizer = tiny_qwen3(0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = run("--model", tmp_path / "model", "--steps", 2, "--optimizer", "sgd", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "out" / "oblr-po-seed-0")) == 2


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--model", "/nowhere"], "--model"),
        (["--method", "ppo"], "--method"),
        (["--group-size", "1"], "--group-size"),
        (["--micro-batches", "5"], "--micro-batches"),
        (["--steps", "many"], "--steps"),
        (["--lr", "-1"], "--lr"),
        (["--smoothing", "1"], "--smoothing"),
        (["--smoothing", "little"], "--smoothing"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--device", "abacus"], "--device"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_get_one_line(words, names):
    with pytest.raises(SystemExit) as error:
        example.parse_arguments(words)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_log_probs_are_those_of_the_sampler():
    model, tokenizer = tiny_qwen3(0)
    torch.manual_seed(0)
    batch = problems(5, seed=0, step=0)
    rollout, texts = sample(model, tokenizer, batch, group_size=2, max_new_tokens=6)
    assert len(texts) == 10
    mask, num = rollout["completion_mask"], rollout["completion_mask"].shape[1]
    for i in range(10):  # one unpadded sequence at a time, by the model's own loss
        keep = rollout["attention_mask"][i].bool()
        ids = rollout["input_ids"][i][keep][None]
        logits = model(input_ids=ids).logits[0].log_softmax(-1)
        length = int(mask[i].sum())
        expected = logits[:-1].gather(1, ids[0, 1:, None])[-length:].sum()
        one = {name: tensor[i : i + 1] for name, tensor in rollout.items()}
        assert torch.allclose(sequence_log_probs(model, one), expected[None], atol=1e-4)
    assert num <= 6


def test_verifier_and_problems():
    assert is_correct("12 ", Problem("5+7=", "12"))
    assert is_correct(" 12+3", Problem("5+7=", "12"))
    assert not any(is_correct(text, Problem("5+7=", "12")) for text in ("", "112", "1 2", "123", "x12"))
    assert problems(9, seed=1, step=2) == problems(9, seed=1, step=2) != problems(9, seed=1, step=3)


def test_steps_to_a_reward():
    import numpy as np

    assert steps_to(0.5, {"reward": np.array([[0.0, 1.0, 1.0]])}) == 2
    assert steps_to(0.9, {"reward": np.array([[0.0, 1.0, 1.0]])}) is None


@pytest.mark.parametrize("example", ["qwen3_arithmetic", "ddp_fsdp"])
def test_help_names_the_command_and_the_defaults(example):
    command = [sys.executable, "-m", f"examples.{example}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment())
    assert done.stdout.startswith(f"usage: python -m examples.{example}")
    assert done.stdout.count("(default: ") >= 5
