"""The bench measures what it says: memory that is there, errors that are there, and results that carry their origin."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import attach_overhead, estimators, harness, logprob_stats, lr_range
from benchmarks.roofline import Cost

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
    monkeypatch.setattr(logprob_stats, "measure_limits", lambda *_: harness.Limits(1e9, 1e12))
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


def test_the_range_is_read_off_the_means():
    rows = [
        {"optimizer": "sgd", "schedule": "snr", "ceiling": ceiling, "seed": seed, "final": final + 0.01 * seed}
        for ceiling, final in ((0.1, 0.1), (0.2, 0.38), (0.4, 0.4), (0.8, 0.33), (1.6, 0.0))
        for seed in (-1, 1)
    ]
    [row] = lr_range.summary(rows)
    assert row["best"] == pytest.approx(0.4)
    assert (row["best_ceiling"], row["within_10_percent"], row["highest_at_80_percent"]) == (0.4, [0.2, 0.4], 0.8)
    assert row["final_reward"]["0.8"] == pytest.approx([0.33, 0.01])


def test_adascale_is_its_gain_by_definition():
    """(sigma^2 + mu^2) / (sigma^2 / m + mu^2) with one batch seen; the lr is the ceiling times gain / m."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    rule = lr_range.AdaScale(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    moments = lr_range.GradientMoments(3.0, 9.0, 4)  # S = 1, V = 2, so sigma^2 = 8
    rule.observe(moments)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * ((8 + 1) / (8 / 4 + 1)) / 4)


def test_attach_overhead_measures_a_step(tmp_path, monkeypatch, capsys):
    options = ["--models", "tiny", "--norms", "euclidean", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    attach_overhead.main()
    [row] = json.loads((tmp_path / "attach_overhead.json").read_text())["rows"]
    assert 0 < row["inside_hooks"] < 1
    assert row["parameters"] > 50_000


def test_estimators_tell_good_from_bad(tmp_path, monkeypatch, capsys):
    options = ["--steps", "30", "--replicates", "50", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    estimators.main()
    result = json.loads((tmp_path / "estimators.json").read_text())
    assert "--steps 30" in result["command"]
    assert (tmp_path / "estimators.png").stat().st_size > 1000


def test_ways_to_norms_agree_or_say_why_not(monkeypatch):
    from benchmarks import per_sample_norms

    monkeypatch.setitem(per_sample_norms.QWEN3, "30M", (16, 24, 1, 2, 1, 8, 31))
    rows = per_sample_norms.measure(("30M", 3, 5), list(per_sample_norms.WAYS), 1, torch.device("cpu"), lambda _: None)
    by_way = {row["way"]: row for row in rows}
    assert by_way["exact"]["seconds"] > 0
    for way in ("sketch", "norms first", "vmap(grad)"):
        assert by_way[way]["from_exact"] < 1e-4
    for way in ("Opacus", "BackPACK"):  # the latter has no rule for norms
        assert by_way[way]["refused"] or by_way[way]["from_exact"] < 1e-4
