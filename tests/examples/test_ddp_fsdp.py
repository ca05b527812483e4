"""The example of several processes: its steps are those of one, it resumes bit for bit, and ends when it should.

Run as a script it is what each of two processes does, all cases in one go: ``... test_example_ddp_fsdp.py FOLDER``.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from paths import ROOT, environment

from examples import ddp_fsdp
from examples.common.arithmetic import is_correct, problems
from examples.common.policy import local_model, logit_weights, sequence_log_probs, tiny_qwen3, warm_start
from examples.common.runs import read_metrics
from examples.ddp_fsdp import parse_arguments
from snr_optim import GradientMoments, GradWeightedBaseline

GROUP, MICRO_BATCHES = 4, 2  # of each process
SMALL = ["--prompts", "8", "--group-size", str(GROUP), "--micro-batches", str(MICRO_BATCHES),
         "--warm-start-steps", "1", "--device", "cpu"]  # fmt: skip
KINDS = ["ddp"] if torch.__version__.startswith("2.6") else ["ddp", "fsdp"]  # whose fully_shard is not for CPUs


def launch(*words):
    """By ``torchrun``, two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.Popen(
        list(map(str, command)),
        cwd=ROOT,
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# -- what each process does --------------------------------------------------------------------------------------------


def train_example(*words):
    args = parse_arguments([*SMALL, *map(str, words)], processes=2)
    ddp_fsdp.train(args, torch.device("cpu"))


def resume(folder):
    """From a model that knows a little: four steps at once, and two and two. Rank by rank, the samples of the first."""
    sample, train = ddp_fsdp.sample, partial(train_example, "--model", folder / "model")
    for kind in KINDS:
        rollouts = []

        def recorded(*args, rollouts=rollouts):
            rollouts.append(sample(*args))
            return rollouts[-1]

        ddp_fsdp.sample = recorded
        train("--parallel", kind, "--steps", 4, "--out", folder / kind)
        torch.save([rollout for rollout, _ in rollouts], folder / f"{kind}-{dist.get_rank()}.pt")
        ddp_fsdp.sample = sample
        train("--parallel", kind, "--steps", 2, "--out", folder / f"{kind}-again")
        train("--parallel", kind, "--steps", 4, "--out", folder / f"{kind}-again", "--resume")
    with pytest.raises(SystemExit, match=r"was made with lr 0\.001"):
        train("--steps", 4, "--out", folder / "ddp", "--resume", "--lr", 0.5)
    if dist.get_rank() == 0:
        shutil.copytree(folder / "ddp", folder / "crossed")
    dist.barrier()
    train("--parallel", KINDS[-1], "--steps", 5, "--out", folder / "crossed", "--resume")


def fail(folder):
    """One rank cannot go on, and the others wait for it."""
    if dist.get_rank() == 1:
        ddp_fsdp.is_correct = None
    train_example("--steps", 4, "--out", folder / "failed")


# -- and what came out -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp_fsdp")
    model, tokenizer = tiny_qwen3(0)
    warm_start(model, tokenizer, 200, 0, lambda row: None)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    process = launch(__file__, folder)
    _, errors = process.communicate(timeout=180)
    assert (folder / "failed").exists(), errors[-6000:]  # all was done before
    (folder / "errors").write_text(f"{process.returncode} {errors}")
    return folder


def rows(folder):
    return [{name: repr(value) for name, value in row.items()} for row in read_metrics(folder)]  # NaN equals NaN


@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_exact(folder, kind):
    ends = [torch.load(folder / name / "checkpoint.pt", weights_only=True) for name in (kind, f"{kind}-again")]
    straight = rows(folder / kind)
    assert [row["step"] for row in straight] == ["0", "1", "2", "3"]
    assert straight == rows(folder / f"{kind}-again")
    assert float(straight[3]["factor"]) < 1
    for name, tensor in ends[0]["model"].items():
        assert torch.equal(tensor, ends[1]["model"][name])
    of_optimizer = [end["optimizer"]["state"] for end in ends]
    for name, state in of_optimizer[0].items():
        assert all(torch.equal(value, of_optimizer[1][name][key]) for key, value in state.items())


def test_one_kind_of_parallelism_goes_on_from_the_checkpoint_of_the_other(folder):
    assert rows(folder / "crossed")[:4] == rows(folder / "ddp")
    assert float(rows(folder / "crossed")[4]["observations"]) > float(rows(folder / "ddp")[3]["observations"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_is_measured_as_one_process_does(folder, kind):
    """Its baseline sees the outputs of all ranks, and every backward pass of each is a sub-batch."""
    model, tokenizer = local_model(str(folder / "model"), "cpu")
    parts, rewards, weights = [], [], []
    for rank in range(2):
        rollout = torch.load(folder / f"{kind}-{rank}.pt")[0]
        length = rollout["completion_mask"].shape[1]
        texts = tokenizer.batch_decode(rollout["input_ids"][:, -length:], skip_special_tokens=True)
        batch = problems(8, 0, 0)[rank::2]
        rewards += [float(is_correct(text, batch[i // GROUP])) for i, text in enumerate(texts)]
        weights.append(logit_weights(model, rollout))
        size = len(texts) // MICRO_BATCHES
        parts += [{name: t[i : i + size] for name, t in rollout.items()} for i in range(0, len(texts), size)]
    rewards = torch.tensor(rewards)
    advantages = GradWeightedBaseline().advantages(rewards, torch.cat(weights), groups=GROUP)
    gradients = []
    for part, of_part in zip(parts, advantages.split(size), strict=True):
        model.zero_grad()
        (-(of_part * sequence_log_probs(model, part)).mean()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    moments = GradientMoments.from_gradients(gradients)
    row = read_metrics(folder / kind)[0]
    assert row["reward"] == pytest.approx(float(rewards.mean()))
    assert 0 < row["reward"] < 1
    assert row["signal"] == pytest.approx(float(moments.signal), rel=1e-3)
    assert row["noise"] == pytest.approx(float(moments.noise), rel=1e-3)


@pytest.mark.skipif(len(KINDS) < 2, reason="no fully_shard on this CPU")
def test_ranks_of_fully_shard_may_end_their_samples_at_different_tokens(folder):
    lengths = [
        [rollout["completion_mask"].shape[1] for rollout in torch.load(folder / f"fsdp-{rank}.pt")] for rank in (0, 1)
    ]
    assert lengths[0] != lengths[1]


def test_ctrl_c_ends_all_ranks_after_the_same_step(tmp_path):
    process = launch(
        "-m",
        "examples.ddp_fsdp",
        *SMALL,
        "--warm-start-steps",
        1,
        "--parallel",
        KINDS[-1],
        "--steps",
        10**6,
        "--out",
        tmp_path,
    )
    deadline = time.monotonic() + 120
    while len(read_metrics(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # as a terminal does
    out, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors.split("torch/distributed")[0]
    steps = [row["step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(len(steps)))
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == steps[-1]
    assert out.count("step ") == len(steps)


def test_where_a_rank_fails_all_end(folder):
    code, errors = (folder / "errors").read_text().split(" ", maxsplit=1)
    assert code != "0"
    assert "'NoneType' object is not callable" in errors


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--parallel", "pipeline"], "--parallel"),
        (["--model", "/nowhere"], "--model"),
        (["--group-size", "1"], "--group-size"),
        (["--micro-batches", "1"], "--micro-batches"),
        (["--prompts", "6"], "--prompts"),
        (["--steps", "many"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--every", "0"], "--every"),
        (["--out", __file__], "--out"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_get_one_line(words, names):
    with pytest.raises(SystemExit) as error:
        parse_arguments(words)
    assert names in str(error.value)
    assert "\n" not in str(error.value)


def test_one_process_trains_a_local_model_without_torchrun(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_qwen3(0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [*SMALL, "--parallel", KINDS[-1], "--model", tmp_path / "model", "--steps", 2, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["ddp_fsdp.py", *map(str, words)])
    ddp_fsdp.main()
    assert len(read_metrics(tmp_path / "out")) == capsys.readouterr().out.count("factor") == 2
    assert not dist.is_initialized()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    resume(Path(sys.argv[1]))
    fail(Path(sys.argv[1]))
