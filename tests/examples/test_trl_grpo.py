"""TRL's example and page: they run, resume, refuse in one line, and the change is as small as they say."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import runpy
import sys

import pytest
from paths import ROOT

pytest.importorskip("trl", reason="a trainer that is optional")

import trl
from datasets import Dataset
from pages import DOCS, changed_lines, code
from transformers.trainer_utils import get_last_checkpoint

from examples import trl_grpo
from examples.common.policy import tiny_qwen3, warm_start
from snr_optim.integrations.transformers import SNRCallback
from snr_optim.integrations.trl import TESTED, check_unbiased

SMALL = ["--prompts", "4", "--num-generations", "4", "--micro-batches", "2", "--warm-start-steps", "3"]
PAGE = (DOCS / "trl.md").read_text() if (DOCS / "trl.md").exists() else ""


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", *SMALL, *map(str, words)])
    trl_grpo.main()


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "step_time"} for row in rows]


def test_it_leaves_metrics_summary_and_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", *SMALL, "--steps", "2", "--out", str(tmp_path)])
    runpy.run_module("examples.trl_grpo", run_name="__main__")
    assert re.search(r"step    2  reward \S+  learning_rate \S+  factor \S+", capsys.readouterr().out)
    [first, second] = rows_of(tmp_path)
    assert second["learning_rate"] == pytest.approx(second["snr/factor"] * second["snr/ceiling"])
    assert first["baseline/kappa"] >= 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["biased_by"] == []
    assert summary["final_reward"] == pytest.approx((first["reward"] + second["reward"]) / 2)
    assert (tmp_path / "model" / "config.json").is_file()


def test_resume_repeats_the_run_and_other_settings_are_refused(tmp_path, monkeypatch, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(monkeypatch, "--steps", 4, "--out", straight)
    run(monkeypatch, "--steps", 2, "--out", resumed)
    with pytest.raises(SystemExit, match="has checkpoints; add --resume"):
        run(monkeypatch, "--steps", 4, "--out", resumed)
    with pytest.raises(SystemExit, match=r"was made with lr 0\.001$"):
        run(monkeypatch, "--steps", 4, "--out", resumed, "--resume", "--lr", 0.5)
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    run(monkeypatch, "--steps", 4, "--out", resumed, "--resume")
    assert len(rows_of(straight)) == 4
    assert rows_of(straight) == rows_of(resumed)


def test_ctrl_c_stops_after_the_step_and_saves_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trl_grpo, "stop_requested", lambda: len((tmp_path / "metrics.jsonl").read_text()) > 0)
    run(monkeypatch, "--steps", 1000, "--out", tmp_path)
    done = len(rows_of(tmp_path))
    assert 1 <= done <= 2  # the log of a step is written after the stop is asked for
    assert get_last_checkpoint(str(tmp_path)).endswith(f"checkpoint-{done}")


def test_grpo_is_trl_alone_on_the_same_problems(tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--steps", 1, "--out", tmp_path / "ours")
    run(monkeypatch, "--steps", 1, "--out", tmp_path / "theirs", "--method", "grpo", "--lr", 1e-3, "--warm-up", 0)
    [ours], [theirs] = rows_of(tmp_path / "ours"), rows_of(tmp_path / "theirs")
    assert ours["reward"] == theirs["reward"]  # before the first step nothing differs
    assert ours["completions/mean_length"] == theirs["completions/mean_length"]
    assert theirs["learning_rate"] == 1e-3
    assert not any(name.startswith(("snr/", "baseline/")) for name in theirs)
    [finding] = json.loads((tmp_path / "theirs" / "summary.json").read_text())["biased_by"]
    assert finding.startswith("scale_rewards='group'")


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
def test_a_local_model_and_a_file_of_problems(template, tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_qwen3(0)
    tokenizer.chat_template = template
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i}+{i}=", "answer": f"#### {2 * i}"} for i in range(12)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    words = ["--model", tmp_path / "model", "--dataset", file, "--micro-batches", 2, "--prompts", 4]
    words += ["--max-completion-length", 4, "--steps", 1, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"problems\.jsonl:13: no JSON"):
        run(monkeypatch, *words)
    run(monkeypatch, *words, "--skip-bad-lines", "--gradient-checkpointing")
    assert "1 bad lines left out" in capsys.readouterr().out
    [row] = rows_of(tmp_path / "out")
    assert 0 <= row["reward"] <= 1
    args = trl_grpo.parse_arguments(list(map(str, [*words, "--skip-bad-lines", "--resume"])))
    name, _, data, reward = trl_grpo.file_task(args)
    assert name == str(tmp_path / "model")
    prompt = data[0]["prompt"]
    assert (prompt if template is None else prompt[0]["content"]).count("0+0=") == 1
    assert isinstance(prompt, str if template is None else list)
    assert reward(completions=["so \\boxed{2.0}", "3"], answer=["2", "2"]) == [1.0, 0.0]
    assert reward(completions=[[{"role": "assistant", "content": "#### 2"}]], answer=["2"]) == [1.0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "ppo"], "--method"),
        (["--model", "x"], "--model, --dataset"),
        (["--dataset", "x.jsonl"], "--model, --dataset"),
        (["--model", "x", "--dataset", "/nowhere"], "--dataset: no file"),
        (["--prompts", "12"], "--prompts: expected a multiple of --micro-batches x processes = 8"),
        (["--micro-batches", "1"], "--micro-batches"),
        (["--num-generations", "1"], "--num-generations"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "--steps"),
        (["--lr", "nan"], "--lr"),
        (["--warm-up", "-1"], "--warm-up"),
        (["--report-to", "paper"], "--report-to"),
        (["--out", __file__], "--out"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_bad_options_get_one_line(words, says):
    with pytest.raises(SystemExit) as error:
        trl_grpo.parse_arguments(words)
    assert str(error.value).startswith("error: ")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_that_is_not_there_gets_one_line(tmp_path, monkeypatch):
    file = tmp_path / "problems.jsonl"
    file.write_text('{"question": "a", "answer": "1"}\n')
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "--model", tmp_path / "nothing", "--dataset", file, "--out", tmp_path / "out")
    assert str(error.value).startswith("error: --model: ")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- the page


def without_imports(text):
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("from ", "import ")))


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """What the reader of the page has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, use_cpu=True, bf16=False, max_steps=1))
    model, tokenizer = tiny_qwen3(0)
    warm_start(model, tokenizer, 10, 0, on_row=lambda row: None)  # it knows by now that outputs are short
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]

    def reward(completions, answer, **columns):
        return [float(text.startswith(right)) for text, right in zip(completions, answer, strict=True)]

    return {"model": model, "tokenizer": tokenizer, "dataset": Dataset.from_list(rows), "reward": reward}


def test_the_page_says_how_many_lines_its_change_takes():
    before, after, *_ = code("trl.md")
    assert changed_lines(without_imports(before), without_imports(after)) == 2
    assert changed_lines(before, after) == 4
    assert "**Two lines, and two imports.**" in PAGE


def test_the_script_before_and_after_runs_and_logs_what_the_page_says(theirs, capsys):
    before, after, *_ = code("trl.md")
    names = {}
    for script in (before, after):
        scope = dict(theirs)
        biased = pytest.warns(UserWarning, match="these settings bias the gradient")
        with biased if script is after else contextlib.nullcontext():
            exec(script, scope)
        names[script] = set().union(*scope["trainer"].state.log_history)
    new = set(re.findall(r"^\| `((?:snr|baseline)/\w+)`", PAGE, flags=re.MULTILINE))
    [callback] = [each for each in scope["trainer"].callback_handler.callbacks if isinstance(each, SNRCallback)]
    assert {"snr/factor", "baseline/kappa"} <= names[after]
    assert new <= names[after] | {f"snr/{name}" for name in callback.metrics()}  # some are not finite after one step
    assert not new & names[before]
    assert "learning_rate" in names[before] & names[after]


def test_the_settings_of_the_page_are_unbiased(theirs, capsys):
    _, _, settings = code("trl.md")
    scope = dict(theirs)
    exec(settings, scope)
    assert check_unbiased(scope["args"]) == []
    assert scope["trainer"].args is scope["args"]


def test_the_page_names_the_versions_that_are_tested():
    assert f"TRL {TESTED}" in PAGE


def test_the_table_of_the_page_is_the_measured_one():
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "trl_grpo.json").read_text())
    assert "+changes" not in result["environment"]["commit"]
    assert "/tmp" not in result["command"]
    for row in result["learning"]:
        name = {"grpo": "GRPO", "oblr-po": "OBLR-PO"}[row["method"]]
        final, spread = f"{row['final']:.3f} ± {row['final_std']:.3f}", f"{row['grad_norm_spread']:.2f}"
        assert f"| {name} | {row['lr']:.0e} | {final} | {spread} |".replace("e-0", "e-") in PAGE
    for row in result["time"]:
        cells = [f"{100 * row[name]:.1f} %" for name in ("weights_inside", "callback_inside", "mixin_inside")]
        assert " | ".join(cells) in PAGE
