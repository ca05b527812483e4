"""The bench of the head compares what computes the same: values and gradients of all that is installed are checked."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.testing import assert_close

from benchmarks import harness
from benchmarks import linear_logprob_stats as bench

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_implementation_agrees_with_the_reference(dtype):
    """In bfloat16 but for the logits of most, which are rounded by up to 1/16 around 30."""
    data = bench.make_data(30, 64, 500, dtype, CPU)
    rounded = dtype == torch.bfloat16
    found = bench.implementations(CPU, dtype)
    assert {which.task for which in found} >= {bench.LOG_PROB, bench.EVERYTHING}
    for which in found:
        truth = bench.truth_of(which.task, data)
        with torch.compiler.set_stance("force_eager"):
            worst, gradient = bench.errors(which, data, truth)
            values = which.forward(data)
        for name, value in zip(which.task.outputs, values, strict=True):
            true, tolerance = getattr(truth.stats, name), 0.1 if rounded else 1e-5
            where = f"{which.name}: {name}"
            assert_close(value[bench.CHECKED].double(), true, rtol=tolerance, atol=tolerance, msg=where)
        assert gradient < (0.02 if rounded else 1e-4), which
        if which.name.startswith("snr-optim") and (not rounded or "float32 logits" in which.name):
            assert worst < 1e-4, which


def test_half_of_the_rows_are_confident():
    data = bench.make_data(400, 128, 1000, torch.float32, CPU)
    log_prob = bench.linear_logprob_stats_reference(data.hidden, data.weight, data.labels).log_prob
    missing = -torch.expm1(log_prob)
    assert 5e-7 < missing[::2].min() < 1e-5
    assert 1e-4 < missing[::2].median() < 1e-2
    assert missing[1::2].median() > 0.99
    assert {row % 2 for row in range(400)[bench.CHECKED]} == {0, 1}


def test_the_command_line_writes_a_row_per_pass_and_says_who_refused(tmp_path, monkeypatch, capsys):
    def refuse(hidden, weight, labels):
        raise AssertionError("wants a GPU\nand more")

    def chosen(device, dtype):
        plain = next(which for which in bench.plain_torch() if which.task == bench.EVERYTHING)
        return [*bench.ours(bench.EVERYTHING, device, dtype), plain, plain._replace(name="peer", call=refuse)]

    monkeypatch.setattr(bench, "implementations", chosen)
    monkeypatch.setattr(bench, "measure_limits", lambda *_: harness.Limits(1e9, 1e12))
    monkeypatch.setattr(harness, "LAST_LEVEL_CACHE", 1 << 16)
    options = ["--rows", "30", "--widths", "64", "--vocab", "500", "--dtypes", "float32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench", *options, "--seconds", "0", "--out", str(tmp_path)])
    bench.main()
    result = json.loads((tmp_path / "linear_logprob_stats.json").read_text())
    assert "--rows 30" in result["command"]
    *rows, refused = result["rows"]
    assert refused["refused"] == "AssertionError: wants a GPU"
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"] * 4  # three slabs of ours, and torch
    for row in rows:
        products = 1 if row["pass"] == "forward" else 3
        assert row["flops"] == 2 * 30 * 64 * 500 * products
        assert row["of_limit"] == pytest.approx(row["flops"] / 1e12 / (row["ms"] / 1e3))
        if row["peak_mib"] is not None:
            gradients = (30 + 500) * 64 * 4 / 2**20 if products == 3 else 0
            assert row["peak_mib"] - row["extra_mib"] == pytest.approx(gradients)
    errors = {row["implementation"]: row["worst_error"] for row in rows if row["pass"] == "forward"}
    assert errors["snr-optim"] < 1e-4
    assert "peer" in capsys.readouterr().out
