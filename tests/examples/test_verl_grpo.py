"""examples/verl: the data that verl reads, the reward that it asks for, the config that it accepts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

pytest.importorskip("verl.trainer.ppo.v1", reason="verl, or its own dependencies, are not installed")
pytest.importorskip("wrapt", reason="what the plugin needs beside verl")

from datasets import Dataset
from pages import code
from verl.utils.import_utils import load_extern_object

FOLDER = ROOT / "examples" / "verl"
LINES = [
    {"question": "What is 6 x 7?", "answer": "6 times 7 is <<6*7=42>>42.\n#### 42"},
    {"problem": "Half of one?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
]


def dry_run(tmp_path, lines, *settings):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"DRY_RUN": "1", "DATA": str(tmp_path), "PATH": binaries}
    return subprocess.run(
        ["bash", str(FOLDER / "run.sh"), str(path), str(path), *settings], env=environment, cwd=FOLDER.parent.parent,
        capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip


def test_the_run_script_prepares_data_and_a_config_that_verl_accepts_and_that_is_unbiased(tmp_path):
    done = dry_run(tmp_path, LINES, "trainer.n_gpus_per_node=4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
    assert "biased" not in done.stdout
    rows = Dataset.from_parquet(str(tmp_path / "train.parquet")).to_list()
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["42", r"\frac{1}{2}"]
    assert rows[0]["prompt"][0]["role"] == "user"
    assert rows[0]["prompt"][0]["content"].startswith("What is 6 x 7?\n")
    score = load_extern_object(str(FOLDER / "reward.py"), "compute_score")  # as verl does it
    assert [score("math", text, r"\frac{1}{2}", {}) for text in (r"so \boxed{1/2}", r"\boxed{2}", "")] == [1, 0, 0]


def test_data_that_cannot_be_read_starts_nothing(tmp_path):
    done = dry_run(tmp_path, [LINES[0], {"question": "And then?"}])
    assert done.returncode != 0
    assert re.search(r"error: 1 bad lines: .*problems\.jsonl:2: no answer or solution", done.stderr)


def test_the_settings_of_the_page_are_those_of_the_example():
    [command, *_] = code("verl.md", "bash")
    lines = (FOLDER / "oblr_po.yaml").read_text()
    for value in re.findall(r"=(\S+) \\?", command):
        assert value.removesuffix("\\") in lines, value
