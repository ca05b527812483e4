"""The bench measures what it says: memory that is there, errors that are there, and results that carry their origin."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import harness, logprob_stats
from snr_optim.kernels._launch import Cost

CPU = torch.device("cpu")


def test_peak_memory_sees_what_is_freed_again():
    mebibytes = 64
    peak = harness.peak_memory(lambda: torch.ones(mebibytes << 18), CPU)
    if peak is None:
        pytest.skip("the system does not tell")
    assert 0.9 * mebibytes < peak / 2**20 < 1.5 * mebibytes
    assert harness.peak_memory(lambda: None, CPU) < 2**20


def test_inputs_are_taken_in_turn():
    turns = []
    timing = harness.time_calls(turns.append, CPU, seconds=0.0)
    assert turns == [0, 1, 0, *range(5)]  # to warm up, to see how long it takes, to measure
    assert 0 <= timing.low <= timing.median <= timing.high
    assert harness.copies(1 << 20) * (1 << 20) >= harness.LAST_LEVEL_CACHE
    assert harness.copies(4 * harness.LAST_LEVEL_CACHE) == 1


def test_the_bench_writes_its_origin_and_finds_the_cancellation(tmp_path, monkeypatch, capsys):
    plain = logprob_stats.Implementation("plain", logprob_stats.ALL, logprob_stats.plain)
    monkeypatch.setattr(logprob_stats, "implementations", lambda _: [logprob_stats.ours(plain.outputs), plain])
    monkeypatch.setattr(logprob_stats, "measure_limits", lambda _: harness.Limits(1e9, 1e12))
    monkeypatch.setattr(harness, "LAST_LEVEL_CACHE", 1 << 16)
    options = ["--rows", "16", "--vocab", "4096", "--seconds", "0", "--dtypes", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--out", str(tmp_path), "--plot", str(tmp_path / "p.png")])
    logprob_stats.main()
    result = json.loads((tmp_path / "logprob_stats.json").read_text())
    assert "--rows 16" in result["command"]
    assert result["environment"]["torch"] == torch.__version__
    assert {row["pass"] for row in result["rows"]} == {"forward", "backward", "forward+backward"}
    error = {row["implementation"]: row["worst_error"] for row in result["rows"] if row["pass"] == "forward"}
    assert error["snr-optim"] < 1e-5 < 1e-2 < error["plain"]
    [forward] = [r for r in result["rows"] if r["implementation"] == "plain" and r["pass"] == "forward"]
    assert forward["of_limit"] == pytest.approx(forward["bytes"] / 1e9 / (forward["ms"] / 1e3))
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert "snr-optim" in capsys.readouterr().out


def test_the_limit_is_time_for_the_bytes():
    assert harness.Limits(bandwidth=2e9, matmul=1e12).seconds(Cost(bytes=4_000_000_000, flops=1)) == 2.0
